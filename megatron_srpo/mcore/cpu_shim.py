"""Lets Megatron Core train on a machine without CUDA. This is the only place that patches torch.

Megatron Core asks `torch.cuda` for devices, streams and generators, and passes device="cuda" to tensor factories, even
if it does not need them. `install()` makes these calls work on the CPU. It does nothing on a machine with CUDA, so it
can never change what a GPU run computes.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

_CPU = torch.device("cpu")
_FACTORIES = (
    "empty", "zeros", "ones", "full", "tensor", "arange", "rand", "randn", "randint", "as_tensor",
    "empty_like", "zeros_like", "ones_like", "full_like",
)  # fmt: skip
_installed = False


class _NullStream:
    """Replaces torch.cuda.Stream and torch.cuda.Event. It does nothing, because a CPU executes in order."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None

    def record_event(self, *args: object) -> _NullStream:
        return _NullStream()

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: object) -> float:
        return 0.0


def _is_cuda(device: object) -> bool:
    if isinstance(device, bool) or device is None:
        return False
    return isinstance(device, int) or str(device).startswith("cuda")


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def build(*args: object, **kwargs: object) -> torch.Tensor:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
            kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return build


def _patch_queries() -> None:
    cuda = torch.cuda
    cuda.current_device = lambda: _CPU
    cuda.device_count = lambda: 1
    for name in ("synchronize", "empty_cache", "set_device", "reset_peak_memory_stats", "ipc_collect", "init"):
        setattr(cuda, name, lambda *args, **kwargs: None)
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(cuda, name, lambda *args, **kwargs: 0)
    stream = _NullStream()
    cuda.current_stream = cuda.default_stream = lambda *args, **kwargs: stream
    cuda.Stream = cuda.Event = _NullStream
    cuda.stream = lambda *args, **kwargs: contextlib.nullcontext()
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *args: 0


def _patch_rng() -> None:
    # Not manual_seed_all: torch.manual_seed calls it, and would recurse.
    for module in (torch.cuda, torch.cuda.random):
        module.get_rng_state = lambda device=None: torch.get_rng_state()
        module.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
        module.manual_seed = lambda seed: torch.default_generator.manual_seed(seed) and None
    import megatron.core.tensor_parallel.random as megatron_random

    megatron_random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    logging.getLogger(megatron_random.__name__).addFilter(lambda r: "CPU RNG state changed" not in r.getMessage())


def _patch_tensors() -> None:
    # `with torch.device(...)` knows the factories by identity, from a list that torch makes on first use. It must be
    # made of the originals, which our replacements call, or models built on the meta device get uninitialised buffers.
    torch.utils._device._device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self

    original_to = torch.Tensor.to

    def to(self: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        if args and isinstance(args[0], (str, torch.device)) and _is_cuda(args[0]):
            args = (_CPU, *args[1:])
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        return original_to(self, *args, **kwargs)

    torch.Tensor.to = to

    original_type = torch.Tensor.type

    def type_(
        self: torch.Tensor, dtype: torch.dtype | str | None = None, *args: object, **kwargs: object
    ) -> torch.Tensor | str:
        if dtype is not None:
            return original_type(self, dtype, *args, **kwargs)
        name = original_type(self)
        # Megatron's optimizers group parameters by type names such as 'torch.cuda.FloatTensor'.
        if "megatron/core/optimizer" in sys._getframe(1).f_code.co_filename:
            name = name.replace("torch.", "torch.cuda.", 1)
        return name

    torch.Tensor.type = type_


def _patch_dispatcher() -> None:
    # Megatron converts tensors that it moves from the GPU to numpy, which torch's all-to-all accepts as a list of
    # sizes. It must convert those of a CPU too.
    from megatron.core.transformer.moe import token_dispatcher

    move = token_dispatcher.maybe_move_tensor_to_cpu

    def move_or_stay(
        tensor: torch.Tensor | None, as_numpy: bool = False, record_stream: bool = False
    ) -> torch.Tensor | np.ndarray | None:
        moved = move(tensor, as_numpy, record_stream)
        return moved.numpy() if as_numpy and torch.is_tensor(moved) else moved

    token_dispatcher.maybe_move_tensor_to_cpu = move_or_stay


def _patch_uneven_collectives() -> None:
    # Ranks that share an expert send different numbers of tokens to it, and gloo needs equal sizes.
    from megatron.core.tensor_parallel import mappings

    gather, reduce_scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather_uneven(
        values: torch.Tensor,
        group: dist.ProcessGroup,
        sizes: list[int] | None = None,
        *args: object,
        output_split_sizes: list[int] | None = None,
        **kwargs: object,
    ) -> torch.Tensor:
        sizes = sizes if output_split_sizes is None else output_split_sizes
        if sizes is None or group.size() == 1:
            return gather(values, group, sizes, *args, **kwargs)
        filled = values.new_zeros(max(sizes), *values.shape[1:])
        filled[: len(values)] = values
        parts = [torch.empty_like(filled) for _ in sizes]
        torch.distributed.all_gather(parts, filled, group=group)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def reduce_scatter_uneven(
        values: torch.Tensor,
        group: dist.ProcessGroup,
        sizes: list[int] | None = None,
        *args: object,
        input_split_sizes: list[int] | None = None,
        **kwargs: object,
    ) -> torch.Tensor:
        sizes = sizes if input_split_sizes is None else input_split_sizes
        if sizes is None or group.size() == 1:
            return reduce_scatter(values, group, sizes, *args, **kwargs)
        total = values.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=group)
        return total.split(sizes)[group.rank()].clone()

    mappings._gather_along_first_dim = gather_uneven
    mappings._reduce_scatter_along_first_dim = reduce_scatter_uneven


def _patch_single_ranks() -> None:
    # Gloo copies also if a group has one rank and the result is the memory that is given.
    from megatron.core.distributed import param_and_grad_buffer as buffers

    def unless_same(collective: Callable[..., Any]) -> Callable[..., Any]:
        def called(output: torch.Tensor, given: torch.Tensor, *args: object, **kwargs: object) -> Any:
            if output.data_ptr() == given.data_ptr() and output.numel() == given.numel():
                return None
            return collective(output, given, *args, **kwargs)

        return called

    for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):
        setattr(buffers, name, unless_same(getattr(buffers, name)))


def _patch_weight_gradients() -> None:
    # Megatron can add a weight's gradient to its buffer inside the product, with apex' kernel. Otherwise every product
    # makes a tensor of the weight's size first.
    from megatron.core.tensor_parallel import layers

    def add_product(given: torch.Tensor, gradient: torch.Tensor, total: torch.Tensor) -> None:
        if total.dtype == gradient.dtype:
            total.addmm_(gradient.t(), given)
        else:
            total.add_(gradient.t() @ given)

    layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(wgrad_gemm_accum_fp32=add_product)
    layers._grad_accum_fusion_available = True


def install() -> None:
    """Patch torch once, and only where there is no CUDA. Call it before building a Megatron model."""
    global _installed
    if _installed or torch.cuda.is_available():
        return
    _installed = True
    warnings.filterwarnings("ignore", message=".*Transformer Engine and Apex are not installed.*")
    _patch_queries()
    _patch_rng()
    _patch_tensors()
    _patch_dispatcher()
    _patch_uneven_collectives()
    _patch_single_ranks()
    _patch_weight_gradients()
