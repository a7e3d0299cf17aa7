"""Killed at a random moment and started again: as if nothing had happened."""

from __future__ import annotations

import random
import shutil

import psutil
import pytest

from megatron_srpo.checkpoints.folder import damage, published, read_manifest
from tests import tiny_run

RANKS = 2  # data parallel: the distributed optimizer's shards differ between the ranks
OVERRIDES = ("--observe.tensorboard=true", "--observe.wandb=true", "--checkpoint.keep=9")


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


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows, but for what a clock decides on."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "out/tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    names = [tag for tag in events.Tags()["scalars"] if not tag.startswith(("timing_s/", "perf/tokens_per"))]
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in names}


def wandb_steps(folder) -> list[int]:
    from megatron_srpo.observe.wandb_file import offline_steps

    return sorted(offline_steps(folder / "out", (folder / "out/wandb_run_id").read_text().strip()))


@pytest.mark.slow
def test_a_run_killed_at_a_random_moment_and_started_again_equals_the_straight_one_bit_for_bit(straight, tmp_path):
    config = tiny_run.make_run(tmp_path)
    assert (tmp_path / "model/model.safetensors").read_bytes() == (straight / "model/model.safetensors").read_bytes()
    process = tiny_run.start(config, *OVERRIDES, ranks=RANKS)
    moment = random.SystemRandom().randint(4, 7)
    for line in process.stdout:
        if line.startswith(f"iteration {moment}/"):
            break
    kill_everything(process)
    output = tiny_run.train(config, *OVERRIDES, ranks=RANKS)
    assert "going on from" in output, f"killed after iteration {moment}:\n{output}"
    assert tiny_run.records(tmp_path / "out") == tiny_run.records(straight / "out"), f"killed after iteration {moment}"
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
def test_a_run_goes_on_with_fewer_ranks_and_another_layout(straight, tmp_path):
    tiny_run.make_run(tmp_path)
    shutil.copytree(straight / "out", tmp_path / "out", ignore=shutil.ignore_patterns("step_00000008", "hf", "wandb*"))
    tp2 = ("--parallel.tensor_model_parallel_size=2", "--parallel.sequence_parallel=true")
    for ranks, overrides in ((1, ("--run.iterations=6",)), (2, tp2)):
        output = tiny_run.train(tmp_path / "config.toml", *overrides, ranks=ranks)
        assert "seeded anew" in output
    expected, found = tiny_run.records(straight / "out"), tiny_run.records(tmp_path / "out")
    assert [line["step"] for line in found] == list(range(1, 9))
    for mine, theirs in zip(found, expected, strict=True):
        for name in ("critic/score/mean", "actor/loss", "actor/grad_norm", "response_length/mean"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), (mine["step"], name)
