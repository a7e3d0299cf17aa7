"""The export on real gloo ranks: bitwise, in one order, bucket by bucket, for TP, PP, experts and all of them."""

from __future__ import annotations

import itertools
import time
import weakref

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megatron_srpo.bridge import Exporter, export_hf, load_hf_weights, read_config
from megatron_srpo.core.tensors import ModelShards
from tests.distributed_harness import run_distributed
from tests.tiny_models import make_tiny_model
from tests.tiny_shards import empty_shards

TP, PP = 2, 2
SIZES = {"hidden": 48, "layers": 2, "heads": 12, "kv_heads": 4, "head_dim": 6, "ffn": 28, "vocab": 37}


def _grid(tp: int, pp: int) -> dict:
    """This rank's place and groups in a tp × pp grid, or in copies of it; tensor parallel ranks next to each other."""
    rank, world = dist.get_rank(), dist.get_world_size()
    place: dict = {"tp_rank": rank % tp, "tp_size": tp, "pp_rank": rank // tp % pp, "pp_size": pp}
    for size, name, members in (
        (tp, "tp_group", [list(range(start, start + tp)) for start in range(0, world, tp)]),
        (pp, "pp_group", [list(range(c + s, c + tp * pp, tp)) for c in range(0, world, tp * pp) for s in range(tp)]),
    ):
        groups = [dist.new_group(ranks) for ranks in members] if size > 1 else []
        place[name] = next((g for g, ranks in zip(groups, members, strict=False) if rank in ranks), None)
    return place


def _loaded(folder: str, place: dict, **layout) -> ModelShards:
    shards = empty_shards(read_config(folder), **place, **layout)
    load_hf_weights(shards, folder)
    return shards


def _expert_grid(place: dict, ep: int, etp: int) -> dict:
    """`place`, and this rank's part of a stage's experts: ep runs of them, each split over etp ranks."""
    ranks = range(dist.get_world_size())
    run = ep * etp
    groups = [dist.new_group(list(ranks[start : start + run])) for start in range(0, len(ranks), run)]
    where = dist.get_rank() % run
    experts = {"ep_rank": where // etp, "ep_size": ep, "etp_rank": where % etp, "etp_size": etp}
    return place | experts | {"expert_group": groups[dist.get_rank() // run]}


def _check_exports(folder: str, tp: int, pp: int, ep: int = 1, etp: int = 1) -> dict:
    """Exports with small, middling and one bucket, compared here with the file; returns what ranks must agree on."""
    place, config = _grid(tp, pp), read_config(folder)
    if ep * etp > 1:
        place = _expert_grid(place, ep, etp)
    expected = load_file(f"{folder}/model.safetensors")
    orders = []
    for bucket_bytes, layout in ((1, {}), (40_000, {"transformer_engine": True, "pad_to": 4}), (10**9, {"pad_to": 16})):
        exporter = Exporter(_loaded(folder, place, **layout), config, bucket_bytes=bucket_bytes)
        for _ in range(2):  # an exporter is used again and again
            items = list(exporter.items())
            assert [name for name, _ in items] == exporter.names()
            assert {name: tuple(t.shape) for name, t in items} == {n: tuple(t.shape) for n, t in expected.items()}
            assert all(torch.equal(tensor, expected[name]) for name, tensor in items)
        orders.append(sorted(exporter.names()))
    converted = dict(export_hf(_loaded(folder, place), config, dtype=torch.bfloat16))
    assert all(torch.equal(tensor, expected[name].bfloat16()) for name, tensor in converted.items())
    return {"order": exporter.names(), "names": orders}


def _check_live(folder: str) -> None:
    """The export reads the parameters as they are when it runs."""
    shards = _loaded(folder, _grid(2, 1))
    exporter = Exporter(shards, read_config(folder))
    with torch.no_grad():
        for parameter in shards.parameters.values():
            parameter.mul_(2)
    expected = load_file(f"{folder}/model.safetensors")
    kept = list(exporter.items())
    with torch.no_grad():
        for parameter in shards.parameters.values():
            parameter.zero_()
    list(exporter.items())
    assert all(torch.equal(tensor, expected[name] * 2) for name, tensor in kept)  # never overwritten afterwards


def _settled(alive, most):
    """Whether at most so many of the buffers are alive: gloo's thread may hold one a moment longer than its result is
    known."""
    end = time.monotonic() + 10
    while (found := sum(storage() is not None for storage in alive)) > most and time.monotonic() < end:
        time.sleep(0.01)
    return found <= most


def _check_memory(folder: str, place: dict, bucket_bytes: int) -> None:
    """What is gathered at once is bounded by the bucket, and while one is consumed one more is there."""
    gathered: list[int] = []
    alive: list[weakref.ref] = []
    gather = dist.all_gather_into_tensor

    def record(full, flat, group, async_op):
        gathered.append(full.numel())
        alive.append(weakref.ref(full.untyped_storage()))
        return gather(full, flat, group=group, async_op=async_op)

    dist.all_gather_into_tensor = record
    shards, times = _loaded(folder, place), []
    for size in (bucket_bytes, 10**9):
        gathered.clear()
        exporter = Exporter(shards, read_config(folder), bucket_bytes=size)
        buckets = [bucket for bucket in exporter.buckets if bucket[0].copies > 1]
        begun = []
        for _ in exporter.items():
            assert _settled(alive, 2)
            begun.append(len(gathered))
        assert max(gathered) <= size
        assert len(buckets) == len(gathered)
        if len(buckets) == len(exporter.buckets):  # the second is on its way once the first begins to be consumed
            assert begun[:2] == [1, min(2, len(buckets))]
        times.append(len(gathered))
    assert times[0] > times[1]
    dist.all_gather_into_tensor = gather


def _check_reuse(folder: str) -> None:
    """The next export takes the memory of the last one, and what a stage has in one piece travels as it stands."""
    shards = _loaded(folder, _grid(1, 2))
    exporter = Exporter(shards, read_config(folder), bucket_bytes=1)
    live = {parameter.data_ptr() for parameter in shards.parameters.values()}

    def export() -> tuple[list[int], int]:
        mine = sum(tensor.data_ptr() in live for _, tensor in exporter)
        return [id(memory) for memory in exporter._shards_memory._memory], mine

    exports = [export() for _ in range(6)]  # they grow until they are as large as they have to be
    assert all(1 <= len(memory) <= 3 and mine > len(shards.parameters) // 2 for memory, mine in exports)
    assert any(set(one[0]) == set(next_one[0]) for one, next_one in itertools.pairwise(exports))


def _on_two_ranks(tied: str, untied: str) -> dict:
    results = {
        (tp, pp, folder): _check_exports(folder, tp, pp) for tp, pp in ((TP, 1), (1, PP)) for folder in (tied, untied)
    }
    _check_live(tied)
    _check_reuse(untied)
    _check_memory(
        untied, _grid(2, 1), 2 * max(tensor.nbytes for tensor in load_file(f"{untied}/model.safetensors").values())
    )
    return results


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    make = tmp_path_factory.mktemp
    return [str(make_tiny_model(make(f"tied-{tied}"), tied=tied, **SIZES)) for tied in (True, False)]


def test_tp2_and_pp2_exports_are_bitwise_and_in_one_order(folders):
    ours, theirs = run_distributed(_on_two_ranks, 2, *folders)
    assert ours == theirs


MOE_LAYOUTS = [  # TP, PP, EP, expert TP on four ranks
    (2, 2, 2, 1),  # the tensor-parallel ranks of a stage have different experts
    (2, 1, 2, 2),
    (4, 1, 4, 1),
    (1, 1, 2, 1),  # experts and everything else have copies
]


def _on_four_ranks(untied: str, moe: str) -> dict:
    experts = {n: t.nbytes for n, t in load_file(f"{moe}/model.safetensors").items() if "experts.0" in n}
    largest = sum(size for name, size in experts.items() if "down" not in name)  # gate and up, which are one parameter
    _check_memory(moe, _expert_grid(_grid(1, 1), 4, 1), 4 * largest)  # of each of four experts
    return {"dense": _check_exports(untied, TP, PP)} | {layout: _check_exports(moe, *layout) for layout in MOE_LAYOUTS}


def test_exports_over_four_ranks_are_bitwise_and_in_one_order_with_experts_too(folders, tmp_path):
    moe = make_tiny_model(tmp_path, "qwen3_moe", **SIZES, expert_ffn=20, dense_layers=(0,))
    results = run_distributed(_on_four_ranks, 4, folders[1], str(moe))
    assert all(result == results[0] for result in results)
