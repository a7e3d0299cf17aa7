"""Killed at a random moment and started again: as if nothing had happened."""

from __future__ import annotations

import random
import shutil
import signal
import time

import psutil
import pytest

from megatron_srpo.checkpoints.folder import damage, published, read_manifest
from megatron_srpo.core import exit_codes
from tests import tiny_run

RANKS = 2  # data parallel: the distributed optimizer's shards differ between the ranks
STOP_SECONDS = 30  # what Slurm gives between the signal and SIGKILL
SERVERS = ("--rollout.placement=servers", "--rollout.num_servers=2", "--checkpoint.every=3", "--checkpoint.keep=9")
DROPOUT = ("--model.hidden_dropout=0.1", "--model.attention_dropout=0.1")  # draws from every rank's generators
TURNS = ("--rollout.sleep_while_training=true", "--train.offload_while_generating=true")
OVERRIDES = (
    "--observe.tensorboard=true",
    "--observe.wandb=true",
    "--checkpoint.keep=9",
    "--checkpoint.every=3",
    "--algorithm.distill_patience=2",  # hands over within the run, also between two checkpoints
    "--algorithm.distill_decay=2",
    *DROPOUT,
)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    config = tiny_run.make_run(folder)
    tiny_run.train(config, *OVERRIDES, ranks=RANKS)
    return folder


def kill_everything(process) -> None:
    """SIGKILL to the launcher and all below it, whatever sessions they are in."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        member.kill()
    psutil.wait_procs(family, timeout=30)


def killed_after(config, iteration: int, *overrides: str) -> None:
    """Start a run and kill all of it when it has said that `iteration` is done, and has a checkpoint. Checkpoints are
    written while the training goes on, so on a busy machine the first one may come some iterations late."""
    process = tiny_run.start(config, *overrides, ranks=RANKS)
    done = 0
    for line in process.stdout:
        if line.startswith("iteration "):
            done = int(line.removeprefix("iteration ").partition("/")[0])
        if done >= iteration and published(config.parent / "out/checkpoints"):
            break
    kill_everything(process)


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows, but for what a clock decides on."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "out/tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    unsteady = ("timing_s/", "perf/tokens_per", "perf/memory", "perf/tflops")
    names = [tag for tag in events.Tags()["scalars"] if not tag.startswith(unsteady)]
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in names}


def wandb_steps(folder) -> list[int]:
    from tests.wandb_records import offline_steps

    return sorted(offline_steps(folder / "out", (folder / "out/wandb_run_id").read_text().strip()))


@pytest.mark.slow
def test_a_run_killed_at_a_random_moment_and_started_again_equals_the_straight_one_bit_for_bit(straight, tmp_path):
    config = tiny_run.make_run(tmp_path)
    assert (tmp_path / "model/model.safetensors").read_bytes() == (straight / "model/model.safetensors").read_bytes()
    moment = random.SystemRandom().randint(5, 7)
    killed_after(config, moment, *OVERRIDES)
    output = tiny_run.train(config, *OVERRIDES, ranks=RANKS)
    assert "going on from" in output, f"killed after iteration {moment}:\n{output}"
    assert tiny_run.records(tmp_path / "out") == tiny_run.records(straight / "out"), f"killed after iteration {moment}"
    handed_over = [line["srpo/handed_over"] for line in tiny_run.records(tmp_path / "out")]
    assert handed_over[0] == 0 and handed_over[-1] == 1, handed_over
    exported = [(folder / "out/hf/model.safetensors").read_bytes() for folder in (straight, tmp_path)]
    assert exported[0] == exported[1]
    for mine, theirs in zip(
        published(tmp_path / "out/checkpoints"), published(straight / "out/checkpoints"), strict=True
    ):
        assert damage(mine) == []
        files = [read_manifest(folder)["files"] for folder in (mine, theirs)]
        same = [name for name in files[0] if name.endswith((".distcp", ".pt")) or name == "run.json"]
        assert len(same) >= 5 and all(files[0][name] == files[1][name] for name in same)
    assert scalars(tmp_path) == scalars(straight)
    assert wandb_steps(tmp_path) == wandb_steps(straight) == list(range(1, 9))


@pytest.mark.slow
def test_with_engine_servers_a_killed_run_goes_on_from_the_same_tokens(tmp_path):
    """Two servers share out the prompts, and batch them, as they come to be free; log-probs therefore differ in their
    last bits, and the tokens do not."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    for folder in (straight, killed):
        folder.mkdir()
    tiny_run.train(tiny_run.make_run(straight), *SERVERS, ranks=RANKS)
    config = tiny_run.make_run(killed)
    killed_after(config, random.SystemRandom().randint(4, 5), *SERVERS)
    assert "going on from" in tiny_run.train(config, *SERVERS, ranks=RANKS)
    texts = [(folder / "out/rollouts.jsonl").read_text() for folder in (straight, killed)]
    assert texts[0] == texts[1] and '"responses"' in texts[0]  # every text, score, branch and teacher
    mine, theirs = (tiny_run.records(folder / "out") for folder in (killed, straight))
    assert [line["step"] for line in mine] == [line["step"] for line in theirs] == list(range(1, 9))
    for found, expected in zip(mine, theirs, strict=True):
        for name in ("critic/score/mean", "response_length/mean", "srpo/sdpo_fraction", "rollout/weight_version"):
            assert found[name] == expected[name], (found["step"], name)
        for name in ("actor/loss", "actor/grad_norm", "actor/entropy"):
            assert found[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-6), (found["step"], name)


@pytest.mark.slow
def test_a_run_goes_on_with_fewer_ranks_and_another_layout(tmp_path):
    """Two data-parallel ranks straight; the same to iteration 4, then one rank, then two tensor-parallel ones."""
    tp2 = ("--parallel.tensor_model_parallel_size=2", "--parallel.sequence_parallel=true")
    config = tiny_run.make_run(tmp_path)
    tiny_run.train(config, "--checkpoint.keep=9", ranks=2)  # checkpoints after 4 and 8
    shutil.copytree(tmp_path / "out", tmp_path / "other", ignore=shutil.ignore_patterns("step_00000008"))
    for ranks, overrides in ((1, ("--run.iterations=6",)), (2, tp2)):
        output = tiny_run.train(config, f"--run.output_dir={tmp_path}/other", *overrides, ranks=ranks)
        assert "seeded again" in output
    expected, found = tiny_run.records(tmp_path / "out"), tiny_run.records(tmp_path / "other")
    assert [line["step"] for line in found] == list(range(1, 9))
    for mine, theirs in zip(found, expected, strict=True):
        for name in ("critic/score/mean", "actor/loss", "actor/grad_norm", "response_length/mean"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), (mine["step"], name)


@pytest.mark.slow
def test_a_killed_rank_is_started_again_by_torchrun_and_the_run_resumes_by_itself(straight, tmp_path):
    config = tiny_run.make_run(tmp_path)
    process = tiny_run.start(config, *OVERRIDES, ranks=RANKS, launcher=("--max-restarts=2",))
    said = []
    for line in process.stdout:
        said.append(line)
        if line.startswith("iteration 6/"):
            break
    ranks = [child for child in psutil.Process(process.pid).children() if "megatron_srpo" in child.cmdline()]
    assert len(ranks) == RANKS
    ranks[-1].kill()
    code, output = tiny_run.finish(process)
    assert code == 0 and "going on from" in output, "".join(said) + output
    assert tiny_run.records(tmp_path / "out") == tiny_run.records(straight / "out")
    assert (tmp_path / "out/hf/model.safetensors").read_bytes() == (straight / "out/hf/model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_the_launcher_is_a_checkpoint_an_exit_code_and_no_restart(straight, tmp_path, number):
    """The run that goes on afterwards equals the straight one."""
    config = tiny_run.make_run(tmp_path)
    process = tiny_run.start(config, *OVERRIDES, ranks=RANKS, launcher=("--max-restarts=2",))
    for line in process.stdout:
        if line.startswith("iteration 2/"):
            break
    process.send_signal(number)
    code, output = tiny_run.finish(process, STOP_SECONDS)
    asked = {signal.SIGTERM: 128 + signal.SIGTERM, signal.SIGUSR1: exit_codes.REQUEUE}
    assert code == asked[number] and "last checkpoint:" in output, output
    assert "Traceback" not in output and "going on from" not in output
    tiny_run.train(config, *OVERRIDES, ranks=RANKS)
    assert tiny_run.records(tmp_path / "out") == tiny_run.records(straight / "out")


@pytest.mark.slow
def test_a_refused_run_is_not_started_again(tmp_path):
    config = tiny_run.make_run(tmp_path)
    process = tiny_run.start(config, "--parallel.tensor_model_parallel_size=3", launcher=("--max-restarts=3",))
    code, output = tiny_run.finish(process)
    assert code == exit_codes.MISTAKE and output.count("error:") == 1, output


@pytest.mark.slow
@pytest.mark.parametrize("options", [TURNS, ("--parallel.overlap_grad_reduce=true",)], ids=["in turns", "overlapped"])
def test_a_run_that_spares_memory_or_time_equals_the_straight_one(straight, tmp_path, options):
    config = tiny_run.make_run(tmp_path)
    tiny_run.train(config, *OVERRIDES, *options, ranks=RANKS)
    assert tiny_run.records(tmp_path / "out") == tiny_run.records(straight / "out")
    assert (tmp_path / "out/hf/model.safetensors").read_bytes() == (straight / "out/hf/model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_run_with_drafts_equals_the_straight_one(straight, tmp_path):
    config = tiny_run.make_run(tmp_path)
    tiny_run.train(config, *OVERRIDES, "--rollout.speculative_tokens=3", ranks=RANKS)
    lines = tiny_run.records(tmp_path / "out")
    drafted, accepted = ([line.pop(f"rollout/{what}_tokens", 0) for line in lines] for what in ("drafted", "accepted"))
    assert 0 < sum(accepted) < sum(drafted)
    assert lines == tiny_run.records(straight / "out")
    assert (tmp_path / "out/hf/model.safetensors").read_bytes() == (straight / "out/hf/model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_disk_that_is_full_for_a_while_costs_checkpoints_and_no_metrics(tmp_path):
    """Standard output is a file there too."""
    config, log = tiny_run.make_run(tmp_path), tmp_path / "log.txt"
    command = tiny_run.command(config, "--run.iterations=40", "--checkpoint.every=3")
    with log.open("a") as output:
        run = psutil.Popen(command, cwd=tiny_run.ROOT, stdout=output, stderr=output)
    while "iteration  4/" not in log.read_text():
        assert run.poll() is None, log.read_text()
        time.sleep(0.1)
    (rank,) = [child for child in run.children() if "megatron_srpo" in child.cmdline()]
    rank.rlimit(psutil.RLIMIT_FSIZE, (1000, psutil.RLIM_INFINITY))
    time.sleep(3)
    rank.rlimit(psutil.RLIMIT_FSIZE, (psutil.RLIM_INFINITY, psutil.RLIM_INFINITY))
    assert run.wait(120) == 0, log.read_text()[-3000:]
    said = log.read_text()
    missing = [number for number in range(1, 41) if f"iteration {number:2}/40 " not in said]
    assert len(missing) <= 1, missing  # the line that the disk cut
    assert "could not be written" in said and "metrics.jsonl: writing again" in said
    assert [line["step"] for line in tiny_run.records(tmp_path / "out")] == list(range(1, 41))
    assert damage(published(tmp_path / "out/checkpoints")[-1]) == []
