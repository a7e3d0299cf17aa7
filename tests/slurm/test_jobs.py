"""The real script on a real Slurm: two pretend nodes of one rank each, tensor parallel over both."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import dataclass

import pytest

from megatron_srpo.core import exit_codes
from slurm.supervisor import CRASH_LOOP
from tests.slurm.jobs import Inputs, SubmittedJob
from tests.slurm.stand_ins import APPTAINER, SRUN, StandIn

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Inputs:
    return Inputs(tmp_path_factory.mktemp("slurm"))


@dataclass
class Eventful:
    """A job to which everything happened, and the iteration that was saved when it had."""

    job: SubmittedJob
    code: int
    stopped_at: int
    preempted_at: int
    crashed_after: int


@pytest.fixture(scope="module")
def eventful(cluster, inputs) -> Eventful:
    """Asked to stop and requeued; told to end by Slurm and requeued; a launcher killed and requeued; done. The only
    checkpoints are those that are made because of it."""
    job = SubmittedJob(cluster, inputs, "eventful", {"run.iterations": "60", "checkpoint.every": "0"})
    job.wait(lambda: len(job.iterations()) >= 2)
    job.ask_to_stop()
    job.wait(lambda: job.facts()["Restarts"] == "1")
    stopped_at = job.checkpoints[-1]
    job.wait(lambda: len(job.iterations()) > stopped_at)
    job.signal_steps("TERM")
    job.wait(lambda: job.facts()["Restarts"] == "2")
    preempted_at = job.checkpoints[-1]
    job.wait(lambda: len(job.iterations()) > preempted_at)
    job.kill_launcher(1)
    job.wait(lambda: job.facts()["Restarts"] == "3")
    crashed_after = job.checkpoints[-1]
    return Eventful(job, job.wait_for_end(), stopped_at, preempted_at, crashed_after)


def test_a_job_over_two_nodes_trains_to_its_end_whatever_happens_to_it(eventful):
    assert eventful.code == exit_codes.DONE, eventful.job.report()
    assert eventful.job.iterations() == list(range(1, 61))
    assert (eventful.job.output / "hf/model.safetensors").exists()
    assert not (eventful.job.output / "slurm_attempts.json").exists()


def test_what_was_done_is_saved_before_the_job_is_requeued(eventful):
    assert 2 <= eventful.stopped_at < eventful.preempted_at <= eventful.crashed_after < 60
    log = eventful.job.log
    assert log.count("stopped in time: asking Slurm to start the job again") == 2
    assert log.count("it crashed: asking Slurm to start the job again") == 1


def test_both_nodes_are_checked_before_every_start_and_have_a_log_of_their_own(eventful):
    for node in ("nodea", "nodeb"):
        assert eventful.job.log.count(f"health of {node}: ") == 4
    first, second = (eventful.job.node_logs / f"node-{number}.log" for number in (0, 1))
    assert "iteration 60/60" in first.read_text() and "iteration" not in second.read_text()
    assert "training ended: nodea" in eventful.job.log and "nodeb ended with exit code 137" in eventful.job.log


def test_a_wrong_configuration_ends_the_job_at_once_and_for_good(cluster, inputs):
    job = SubmittedJob(cluster, inputs, "wrong", {"rollout.n_sample_per_prompt": "4"})
    assert job.wait_for_end() == exit_codes.MISTAKE
    assert job.facts()["Restarts"] == "0" and not job.output.exists()
    assert "no such key; the nearest is rollout.n_samples_per_prompt" in job.log and "Traceback" not in job.log
    assert "health" not in job.log


def test_a_layout_that_does_not_fit_the_nodes_is_told_before_any_rank_starts(cluster, inputs):
    job = SubmittedJob(cluster, inputs, "misfit", {"parallel.pipeline_model_parallel_size": "2"})
    assert job.wait_for_end() == exit_codes.MISTAKE
    assert "but 2 ranks were started" in job.log and "training" not in job.log


def test_a_mistake_that_only_the_training_finds_is_told_and_not_requeued(cluster, inputs):
    (inputs.folder / "broken.jsonl").write_text('{"prompt": "a", "answer": "b"}\n{\n')
    job = SubmittedJob(cluster, inputs, "mistake", {"data.train": f"{inputs.folder}/broken.jsonl"})
    assert job.wait_for_end() == exit_codes.MISTAKE
    assert job.facts()["Restarts"] == "0"
    assert "broken.jsonl:2" in job.log and "training ended: nodea told a mistake" in job.log


def test_a_node_that_fails_its_check_is_named_and_nothing_is_trained(cluster, inputs):
    site = "SRPO_MIN_DISK_GIB=1000000000\nSRPO_MAX_ATTEMPTS=1\n"
    job = SubmittedJob(cluster, inputs, "unhealthy", site=site)
    assert job.wait_for_end() == CRASH_LOOP
    assert "health: nodea: " in job.log and "health: nodeb: " in job.log and "SRPO_MIN_DISK_GIB = 1e+09" in job.log
    assert "training" not in job.log and not job.checkpoints


def test_a_crash_ends_the_job_where_no_attempt_is_left(cluster, inputs):
    job = SubmittedJob(cluster, inputs, "crash", {"run.iterations": "1000"}, site="SRPO_MAX_ATTEMPTS=1\n")
    job.wait(lambda: "training: 2 × 1 ranks" in job.log and job.launchers(0))
    job.kill_launcher(0)
    assert job.wait_for_end() == CRASH_LOOP
    assert "1 attempts in a row ended without a new checkpoint" in job.log and job.facts()["Restarts"] == "0"


def test_engine_servers_on_the_second_node_generate_for_the_training_on_the_first(cluster, inputs):
    one_rank = {"parallel.tensor_model_parallel_size": "1", "parallel.sequence_parallel": "false"}
    changes = one_rank | {"run.iterations": "3", "bridge.verify_every": "1"}
    job = SubmittedJob(cluster, inputs, "split", changes, script=["--rollout-nodes", "1"])
    assert job.wait_for_end() == exit_codes.DONE, job.report()
    assert job.iterations() == [1, 2, 3]
    assert "engine servers on nodeb" in job.log and "training: 1 × 1 ranks" in job.log
    assert (job.node_logs / "engine-0-0.log").exists() and not (job.node_logs / "node-1.log").exists()
    lines = [json.loads(line) for line in (job.output / "metrics.jsonl").read_text().splitlines()]
    assert [line["rollout/weight_version"] for line in lines] == [0, 1, 2]
    assert max(line["rollout_corr/logprob_diff_max"] for line in lines) < 1e-4


def test_each_step_enters_apptainer_once_a_node_and_the_job_trains_inside(cluster, inputs):
    image = inputs.folder / "my image.sif"
    image.touch()
    apptainer = StandIn(inputs.folder / "apptainer", "apptainer", APPTAINER)
    words = [str(apptainer.path), "exec", "--nv", "--bind", "/my data:/data", str(image), sys.executable]
    site = f"SRPO_PYTHON={shlex.quote(shlex.join(words))}\n"
    one_rank = {"parallel.tensor_model_parallel_size": "1", "parallel.sequence_parallel": "false"}
    changes = one_rank | {"run.iterations": "2"}
    job = SubmittedJob(cluster, inputs, "apptainer", changes, site=site, script=["--rollout-nodes", "1"])
    assert job.wait_for_end() == exit_codes.DONE, job.report()
    assert job.iterations() == [1, 2]
    noted = apptainer.noted()
    assert all(entry["options"] == ["--nv", "--bind", "/my data:/data"] for entry in noted)
    steps = [(entry["command"][2], entry["node"]) for entry in noted]  # python -m MODULE
    assert sorted(steps) == sorted(
        [("slurm.settings", "nodea"), *[("slurm.node", "nodea")] * 2, *[("slurm.node", "nodeb")] * 2]
    )  # health on both nodes, the servers on nodeb, training on nodea
    assert all(sys.executable == entry["command"][0] for entry in noted)


def test_pyxis_gets_its_options_for_every_step_and_the_job_trains(cluster, inputs):
    srun = StandIn(inputs.folder / "pyxis", "srun", SRUN)
    options = ["--container-image=/images/srpo.sqsh", "--container-mounts=/my data:/data,/home"]
    site = f'PATH="{srun.path.parent}:$PATH"\nSRPO_SRUN_OPTIONS={shlex.quote(shlex.join(options))}\n'
    job = SubmittedJob(cluster, inputs, "pyxis", {"run.iterations": "2"}, site=site)
    assert job.wait_for_end() == exit_codes.DONE, job.report()
    assert job.iterations() == [1, 2]
    assert srun.noted() == [options] * 3  # the configuration's check, the nodes' health, training
