"""Process groups: Megatron's, and the control group over which rank 0 and the other ranks exchange objects."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_srpo.config import ParallelConfig
from megatron_srpo.mcore import generators
from megatron_srpo.mcore.device import DevicePath

SEEDS_APART = 2**16  # Megatron adds smaller numbers to a seed, for tensor- and expert-parallel ranks


@dataclass(frozen=True)
class Topology:
    """The place of this rank in every kind of parallelism."""

    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    tp_group: dist.ProcessGroup
    pp_rank: int
    pp_size: int
    pp_group: dist.ProcessGroup
    cp_rank: int
    cp_size: int
    cp_group: dist.ProcessGroup
    dp_rank: int
    dp_size: int
    dp_group: dist.ProcessGroup  # data parallel only
    dp_cp_group: dist.ProcessGroup  # data and context parallel: gradients are summed over it
    control_group: dist.ProcessGroup  # gloo over all ranks, for tensors in host memory, with a long time-out
    device: torch.device
    ep_rank: int = 0
    ep_size: int = 1
    etp_rank: int = 0
    etp_size: int = 1
    # Expert and expert tensor parallel: the ranks that together have all experts of a stage.
    expert_group: dist.ProcessGroup | None = None
    expert_dp_group: dist.ProcessGroup | None = None  # gradients of experts are summed over it

    @property
    def is_driver(self) -> bool:
        return self.rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1


def initialize(
    parallel: ParallelConfig, path: DevicePath, *, seed: int, timeout_minutes: float, control_backend: str = "gloo"
) -> Topology:
    """Join the ranks that torchrun started, and build Megatron's groups. `seed` starts all random generators, those
    of dropout with another number on ranks that have other layers or tokens.

    Megatron's groups have the backend of `path`, and connect when they are first used. On GPUs the control group is the
    only one of gloo, which connects all pairs of its ranks at once.
    """
    timeout = timedelta(minutes=timeout_minutes)
    if not dist.is_initialized():
        dist.init_process_group(path.backend, timeout=timeout)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual_size(parallel),
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        distributed_timeout_minutes=int(timeout_minutes) or 1,
        # Megatron's gloo groups serve checkpoints of its own optimizer only. Each would be a mesh of sockets.
        create_gloo_process_groups=False,
    )
    state = parallel_state
    generators.seed(seed)
    model_parallel_cuda_manual_seed(seed + SEEDS_APART * _seed_number())
    return Topology(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp_rank=state.get_tensor_model_parallel_rank(),
        tp_size=state.get_tensor_model_parallel_world_size(),
        tp_group=state.get_tensor_model_parallel_group(),
        pp_rank=state.get_pipeline_model_parallel_rank(),
        pp_size=state.get_pipeline_model_parallel_world_size(),
        pp_group=state.get_pipeline_model_parallel_group(),
        cp_rank=state.get_context_parallel_rank(),
        cp_size=state.get_context_parallel_world_size(),
        cp_group=state.get_context_parallel_group(),
        dp_rank=state.get_data_parallel_rank(),
        dp_size=state.get_data_parallel_world_size(),
        dp_group=state.get_data_parallel_group(),
        dp_cp_group=state.get_data_parallel_group(with_context_parallel=True),
        control_group=dist.new_group(backend=control_backend, timeout=timeout),
        device=path.device,
        ep_rank=state.get_expert_model_parallel_rank(),
        ep_size=state.get_expert_model_parallel_world_size(),
        etp_rank=state.get_expert_tensor_parallel_rank(),
        etp_size=state.get_expert_tensor_parallel_world_size(),
        expert_group=state.get_expert_tensor_and_model_parallel_group(),
        expert_dp_group=state.get_expert_data_parallel_group(),
    )


def _seed_number() -> int:
    """A number of its own for each pipeline stage, context-parallel rank and data-parallel rank. They have other layers
    or other tokens, and would drop the same units of them from the same seed. Tensor-parallel ranks share it."""
    state = parallel_state
    place = state.get_pipeline_model_parallel_rank()
    place = place * state.get_context_parallel_world_size() + state.get_context_parallel_rank()
    return place * state.get_data_parallel_world_size() + state.get_data_parallel_rank()


def virtual_size(parallel: ParallelConfig) -> int | None:
    """The number of pieces of a pipeline stage. Megatron expects None, not 1, for a schedule that is not
    interleaved."""
    size = parallel.virtual_pipeline_model_parallel_size
    return size if size > 1 else None


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def shutdown() -> None:
    """Destroy all groups. It is safe to call this twice."""
    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
