"""A run's checkpoints on two data-parallel ranks with real files: one instant, a full disk, damage, hostile files."""

from __future__ import annotations

import pickle
import resource
from pathlib import Path

import pytest
import torch

from tests.distributed.test_checkpoint_layouts import loss
from tests.distributed.test_policy import _policy, _rows
from tests.distributed_harness import run_distributed
from tests.tiny_models import make_tiny_model
from tests.unit.test_checkpoints import config_of, flip
from tests.unit.test_safe_files import Hostile


def weights(policy) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in policy.shards.parameters.items()}


def same(some, others) -> bool:
    return all(torch.equal(some[name], others[name]) for name in some)


def limit_files(size: int) -> None:
    """This process may write no more than `size` bytes into a file: what a full disk does, as an OSError (EFBIG)."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def _live(model: Path, out: Path) -> dict:
    from megatron_srpo.checkpoints.saving import Checkpoints
    from megatron_srpo.core.errors import UserError
    from megatron_srpo.mcore import checkpoint, generators
    from megatron_srpo.mcore.control import Control

    policy, said, report = _policy(model, {}), [], {"said": []}
    control = Control(policy.topology)

    def run() -> Checkpoints:
        return Checkpoints(config_of(out, model=str(model), checkpoint={"keep": 5}), control, checkpoint, said.append)

    def step() -> None:
        policy.train_step(_rows(policy.topology.dp_rank, policy.topology.dp_size), loss)

    checkpoints = run()
    assert checkpoints.restore(policy) is None
    step()
    saved, drawn = weights(policy), generators.states()
    checkpoints.save(policy, 1, {"position": 5}, {})
    with torch.no_grad():  # at once, while it may still be written
        for shard in policy.optimizer.shards():
            shard.main.fill_(7.0)
        policy.optimizer.publish_main_to_model()
    torch.rand(5)
    checkpoints.finish()
    report["overwritten"] = not same(weights(policy), saved)
    found = run().restore(policy)
    found.restore_generators()
    report["instant"] = found.iteration == 1 and found.state == {"position": 5} and same(weights(policy), saved)
    report["generators"] = torch.equal(generators.states()["torch"], drawn["torch"])

    step()
    checkpoints = run()
    checkpoints.restore(policy)
    limit_files(2000 if control.rank == 1 else resource.RLIM_INFINITY)
    checkpoints.save(policy, 2, {}, {})
    checkpoints.finish()
    limit_files(resource.RLIM_INFINITY)
    report["full"] = [text for text in said if "could not be written" in text]
    report["after_full"] = sorted(path.name for path in checkpoints.root.iterdir())
    step()
    checkpoints.save(policy, 3, {}, {}, last=True)
    control.share(lambda: flip(next((checkpoints.root / "step_00000003").glob("__1_*.distcp"))))
    said.clear()
    found = run().restore(policy)
    report["damaged"] = list(said)
    report["previous"] = found.iteration == 1 and same(weights(policy), saved)

    mark = out / "ran"
    control.share(lambda: (found_folder(out) / ".metadata").write_bytes(pickle.dumps(Hostile(mark))))
    try:
        checkpoint.load(policy, found_folder(out))
    except UserError as error:
        report["hostile"] = str(error)
    report["ran"] = mark.exists()
    return report


def found_folder(out: Path) -> Path:
    return out / "checkpoints/step_00000001"


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    folder = tmp_path_factory.mktemp("live")
    return run_distributed(_live, 2, make_tiny_model(folder / "model", vocab=101, layers=2), folder / "out")


def test_a_checkpoint_holds_the_weights_of_its_instant_and_no_newer_ones(live):
    assert all(report["overwritten"] and report["instant"] and report["generators"] for report in live)


def test_a_disk_that_is_full_for_one_rank_leaves_the_old_checkpoint_and_training_goes_on(live):
    (told,) = live[0]["full"]
    assert told.startswith("warning: checkpoint ") and "File too large" in told and "Training goes on" in told
    assert live[1]["full"] == []
    assert live[0]["after_full"] == ["latest", "step_00000001"]


def test_a_flipped_bit_in_another_ranks_shard_is_found_and_the_one_before_is_used(live):
    assert all(report["previous"] for report in live)
    assert "__1_0.distcp: its checksum differs" in live[0]["damaged"][0]


def test_a_hostile_index_is_refused_by_every_rank_before_it_runs(live):
    assert all("was not loaded: it names posix.mkdir" in report["hostile"] and not report["ran"] for report in live)
