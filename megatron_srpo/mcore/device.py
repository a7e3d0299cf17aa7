"""Decides once on which hardware path the trainer runs. No other module asks `is_available()`."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import resource
from dataclasses import dataclass

import torch

from megatron_srpo.core.errors import UserError
from megatron_srpo.core.text import clause

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # glibc's malloc.h


@dataclass(frozen=True)
class DevicePath:
    """The chosen path and the reason. `str()` is the line for the log."""

    device: torch.device
    backend: str  # of torch.distributed's default group and of Megatron's: one alone, each costs every group sockets
    transformer_engine: bool
    reason: str

    def __str__(self) -> str:
        return f"{self.device.type} ({self.reason})"


def device_name(device: torch.device) -> str:
    """torch's name of a GPU, or "" for a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process in GiB: of its tensors on a GPU, of its resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB


def choose_device(requested: str, local_rank: int) -> DevicePath:
    """`requested` is run.device: auto, cpu or cuda. Raises UserError when cuda is asked for and absent."""
    cuda = torch.cuda.is_available()
    if requested == "cuda" and not cuda:
        raise UserError(
            "run.device = 'cuda', but torch sees no GPU here "
            f"(torch {torch.__version__}). Use run.device = 'auto' or 'cpu', or run "
            "'python -m megatron_srpo doctor' to see what is missing."
        )
    if requested == "cpu" and cuda:
        raise UserError(
            "run.device = 'cpu', but this machine has CUDA and Megatron Core would use it. "
            "Hide the GPUs for a CPU run: CUDA_VISIBLE_DEVICES= ."
        )
    if not cuda:
        from megatron_srpo.mcore import cpu_shim

        cpu_shim.install()
        _keep_freed_memory()
        return DevicePath(torch.device("cpu"), "gloo", False, "no CUDA: Megatron Core's local layers, torch SDPA, gloo")
    torch.cuda.set_device(local_rank)
    device = torch.device("cuda", local_rank)
    if _transformer_engine():
        return DevicePath(device, "nccl", True, "CUDA with Transformer Engine")
    return DevicePath(device, "nccl", False, "CUDA without Transformer Engine: local layers, torch SDPA")


def _keep_freed_memory() -> None:
    """Let glibc reuse the memory of large tensors as it does that of small ones. It would give it back and ask the
    kernel for new pages for every activation, which costs up to a fifth of the product that fills them. Other C
    libraries stay as they are."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 64 * 2**20)):
            mallopt(option, value)


def _transformer_engine() -> bool:
    """Whether Transformer Engine can be used. Raises UserError if it is installed in part: to go on without it would
    make every step slower, without a word."""
    if importlib.util.find_spec("transformer_engine") is None:
        return False
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # a missing library, another CUDA, an undefined symbol …
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"transformer_engine is installed, but cannot be imported: {clause(reason)}. Install it again (make setup "
            "DEVICE=gpu), or remove it to run with Megatron's local layers (pip uninstall transformer_engine)"
        ) from error
    return True
