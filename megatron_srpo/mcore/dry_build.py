"""The ranks of a real job, built on the meta device in one process: no GPU, no peers, no memory for weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_srpo.config import Config
from megatron_srpo.core.records import ModelShards
from megatron_srpo.mcore import cpu_shim, groups
from megatron_srpo.mcore.device import DevicePath
from megatron_srpo.mcore.model import build_model, model_shards, unwrap

META = DevicePath(torch.device("meta"), "fake", False, "rehearsal: Megatron Core's local layers, no memory")


@dataclass(frozen=True)
class BuiltRank:
    """One rank as the job would build it."""

    rank: int
    stage: int
    layers: list[int]  # global numbers, from 0
    shards: ModelShards  # parameters on the meta device; no process groups behind it


def distinct_ranks(config: Config, world_size: int) -> Iterator[tuple[int, int]]:
    """(rank, stage): every pipeline stage, on its first tensor-parallel rank and on its last, whose part of the
    vocabulary may be shorter. Data, context and expert parallel ranks have the same shapes."""
    parallel = config.parallel
    for stage in range(parallel.pipeline_model_parallel_size):
        first = stage * (world_size // parallel.pipeline_model_parallel_size)
        for rank in sorted({first, first + parallel.tensor_model_parallel_size - 1}):
            yield rank, stage


def rehearse(config: Config, hf_config: dict, world_size: int) -> Iterator[BuiltRank]:
    """Builds each distinct rank in turn, with process groups that only know their members (torch's fake backend)."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    cpu_shim.install()
    for rank, stage in distinct_ranks(config, world_size):
        dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
        try:
            topology = groups.initialize(
                config.parallel, META, seed=config.run.seed, timeout_minutes=1, control_backend="fake"
            )
            with torch.device("meta"):
                model = build_model(hf_config, config.model, config.parallel, topology, transformer_engine=False)
            layers = [layer.layer_number - 1 for piece in model for layer in unwrap(piece).decoder.layers]
            yield BuiltRank(rank, stage, layers, model_shards(model, topology, hf_config["vocab_size"]))
        finally:
            groups.shutdown()
