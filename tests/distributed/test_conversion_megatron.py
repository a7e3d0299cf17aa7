"""Converted checkpoints against Megatron's own: the chunks that its ranks write, loading at other layouts, and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed.test_policy import _policy
from tests.distributed_harness import run_distributed
from tests.fresh_process import fresh_process
from tests.tiny_models import make_tiny_model

SIZES = {"vocab": 101, "layers": 2}  # padded for TP 2
TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}


def _convert(source: Path, out: Path, parallel: dict) -> None:
    from megatron_srpo.config import ParallelConfig
    from megatron_srpo.conversion.to_megatron import hf_to_megatron

    hf_to_megatron(source, out, ParallelConfig(**parallel))


def _on_ranks(source: Path, other: Path, converted: Path, saved: Path) -> None:
    """At TP 2: save with Megatron; then load what was converted for PP 2 into a model that has other weights."""
    from megatron_srpo.bridge import Exporter, read_config
    from megatron_srpo.mcore import checkpoint, groups

    policy = _policy(source, TP2)
    saved.mkdir(exist_ok=True)
    snapshot = checkpoint.snapshot(policy, saved)
    snapshot.write()
    results = policy.topology.world_size * [None]
    torch.distributed.all_gather_object(results, snapshot.results)
    if policy.topology.is_driver:
        snapshot.write_index(results)
    expected = {name: tensor.clone() for name, tensor in Exporter(policy.shards, read_config(source)).items()}
    groups.parallel_state.destroy_model_parallel()
    policy = _policy(other, TP2)
    before = dict(Exporter(policy.shards, read_config(source)).items())
    assert all(not torch.equal(before[name], tensor) for name, tensor in expected.items())
    checkpoint.load(policy, converted)
    assert policy.steps == 0
    for name, tensor in Exporter(policy.shards, read_config(source)).items():
        assert torch.equal(tensor, expected[name]), name
    with policy.weights("teacher"):  # has started anew, as a copy of the student
        for name, tensor in Exporter(policy.shards, read_config(source)).items():
            assert torch.equal(tensor, expected[name]), name
    groups.parallel_state.destroy_model_parallel()


def _chunks(folder: Path) -> dict:
    """(key, offset) → (whole shape, dtype, chunk) of the model's weights, read by torch's own reader."""
    from torch.distributed.checkpoint import FileSystemReader

    from megatron_srpo.mcore.sharded_files import ShardedReader

    index, reader = FileSystemReader(folder).read_metadata(), ShardedReader(folder)
    return {
        (key, tuple(chunk.offsets)): (
            tuple(entry.size), entry.properties.dtype, reader.read(key, chunk.offsets, chunk.sizes)
        )
        for key, entry in index.state_dict_metadata.items()
        if not key.startswith("optimizer.")
        for chunk in entry.chunks
    }  # fmt: skip


def _compare(converted: Path, saved: Path) -> int:
    ours, theirs = _chunks(converted), _chunks(saved)
    assert ours.keys() == theirs.keys()
    for place, (size, dtype, chunk) in theirs.items():
        assert ours[place][:2] == (size, dtype) and torch.equal(ours[place][2], chunk), place
    return len(ours)


def _back(saved: Path, source: Path, out: Path) -> None:
    from megatron_srpo.conversion.to_hf import megatron_to_hf

    megatron_to_hf(saved, out, hf_dir=source, verify_against=source)


@pytest.mark.parametrize(("family", "tied"), [("qwen3", True), pytest.param("qwen2", False, marks=pytest.mark.slow)])
def test_conversion_and_megatron_agree(family, tied, tmp_path):
    source, other = (
        make_tiny_model(tmp_path / name, family, tied=tied, seed=seed, **SIZES)
        for name, seed in (("source", 0), ("other", 1))
    )
    with fresh_process() as process:
        process.submit(_convert, source, tmp_path / "tp2", TP2).result()
        process.submit(_convert, source, tmp_path / "pp2", PP2).result()
        run_distributed(_on_ranks, 2, source, other, tmp_path / "pp2", tmp_path / "saved")
        assert process.submit(_compare, tmp_path / "tp2", tmp_path / "saved").result() > 30
        process.submit(_back, tmp_path / "saved", source, tmp_path / "back").result()
