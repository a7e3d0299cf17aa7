"""A checkpoint's snapshot copies every number once: each rank to its host memory what it writes, and no more."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed.test_checkpoint_layouts import loss
from tests.distributed.test_policy import _policy, _rows
from tests.distributed_harness import run_distributed
from tests.measured_memory import HostPeak
from tests.tiny_models import make_tiny_model

LAYOUTS = {
    "dp2": {},
    "tp2": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "dp2 bf16": {},
    "dp2 host": {},
}
SECTIONS = {"dp2 bf16": {"dtype": "bfloat16"}, "dp2 host": {"optimizer": {"lr": 1e-3, "offload": True}}}
KINDS = 5  # in fp32: main parameters, two moments, the teacher, the reference


def snapshots(model: Path, scratch: Path) -> dict[str, dict]:
    """For every layout: bytes that this rank's snapshot holds, the peak while it was made, and what it says."""
    from megatron.core import parallel_state

    from megatron_srpo.mcore import checkpoint, checkpoint_state

    found = {}
    for name, parallel in LAYOUTS.items():
        folder = scratch / name.replace(" ", "_")
        folder.mkdir(exist_ok=True)
        policy = _policy(model, parallel, **SECTIONS.get(name, {}))
        policy.train_step(_rows(policy.topology.dp_rank, policy.topology.dp_size), loss)
        moved = []
        with HostPeak() as host, pytest.MonkeyPatch.context() as patch:
            for collective in ("all_reduce", "broadcast"):
                patch.setattr(torch.distributed, collective, counted(getattr(torch.distributed, collective), moved))
            snapshot = checkpoint.snapshot(policy, folder)
        tensors = [tensor for *_, (_, tensors) in snapshot._plan.write_buckets for _, tensor in tensors]
        held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        policy_memory = {p.untyped_storage().data_ptr() for p in checkpoint_state.parameters(policy)}
        numbers = {key: value.numel() for key, value in policy.shards.parameters.items()}
        found[name] = {
            "held": sum(held.values()),
            "largest": max(4 * size for size in numbers.values()),
            "peak": host.peak,
            "copied": not policy_memory & held.keys(),
            "moved": sum(1 for size in moved if size > 64),
            "state": state_bytes(policy),
        }
        torch.distributed.barrier()
        parallel_state.destroy_model_parallel()
    return found


def counted(collective, sizes):
    """The collective, which adds the numbers of each tensor that it moves to `sizes`."""

    def call(tensor, *given, **named):
        sizes.append(tensor.numel())
        return collective(tensor, *given, **named)

    return call


def state_bytes(policy) -> int:
    """Bytes of all that a checkpoint stores, each number once: over the tensor-parallel ranks of one copy."""
    split = sum(p.numel() for p in policy.shards.parameters.values() if getattr(p, "tensor_model_parallel", False))
    whole = sum(p.numel() for p in policy.shards.parameters.values()) - split
    itemsize = next(iter(policy.shards.parameters.values())).dtype.itemsize
    return (split * policy.topology.tp_size + whole) * (4 * KINDS + itemsize)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    scratch = tmp_path_factory.mktemp("copies")
    model = make_tiny_model(scratch / "model", vocab=256, layers=4, hidden=64)
    return run_distributed(snapshots, 2, model, scratch)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_together_hold_every_number_once(ranks, layout):
    assert sum(rank[layout]["held"] for rank in ranks) == ranks[0][layout]["state"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rank_copies_its_half_and_never_holds_more_than_one_whole_parameter_beside_it(ranks, layout):
    for rank in ranks:
        found = rank[layout]
        assert found["copied"]
        assert found["held"] <= found["state"] / 2 + KINDS * found["largest"]
        assert found["peak"] <= found["held"] + 2 * found["largest"] + 2**12


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_the_parameter_on_the_border_of_two_ranks_slices_moves_between_them(ranks, layout):
    for rank in ranks:
        assert rank[layout]["moved"] <= (KINDS if layout.startswith("dp2") else 0)
