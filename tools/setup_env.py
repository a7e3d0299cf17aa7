"""Makes `.venv`: the pinned requirements and this project, and nothing outside the checkout.

Run by `make setup` under the Python that the environment will use; standard library only. Repeating it costs
well under a second: a stamp in `.venv` holds a fingerprint of everything that the environment depends on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH = "torch==2.13.0"
BUILD_TOOLS = (
    "setuptools==78.1.1",
    "wheel",
    "pybind11",
    "ninja",
    "cmake",
    "packaging",
)  # to compile transformer-engine
FREE_GIB = {"cpu": 5, "gpu": 20}
STAMP = ".megatron_srpo.json"
WHEELHOUSE_TRAITS = "wheelhouse.json"
QUIET_SECONDS = 30  # a line of life this often, where there is no terminal to redraw


class SetupError(Exception):
    """A set-up that cannot go on; str() is the whole message for the user."""


@dataclass(frozen=True)
class Setup:
    """One set-up: where, for which device, and with which Python."""

    root: Path
    device: str  # "cpu" or "gpu"
    verbose: bool = False
    wheelhouse: Path | None = None  # a folder of `make wheelhouse`: install from it, and ask no index
    environment: dict[str, str] = field(default_factory=lambda: clean_environment(os.environ))

    @property
    def venv(self) -> Path:
        return self.root / ".venv"

    @property
    def python(self) -> Path:
        return self.venv / "bin" / "python"

    @property
    def requirements(self) -> Path:
        return self.root / "requirements" / f"{self.device}.txt"

    @property
    def log(self) -> Path:
        return self.venv / "setup.log"


def clean_environment(environment: dict[str, str] | os._Environ[str]) -> dict[str, str]:
    """The caller's environment, less what would make pip or Python reach outside `.venv`."""
    leaks = {"PYTHONPATH", "PYTHONHOME", "PIP_USER", "PIP_TARGET", "PIP_PREFIX", "PIP_REQUIRE_HASHES", "VIRTUAL_ENV"}
    return {key: value for key, value in environment.items() if key not in leaks}


def fingerprint(root: Path, device: str, version: tuple[int, ...]) -> str:
    """Hash of what the environment is made from: pins, project metadata, place, Python, this script."""
    digest = hashlib.sha256(f"{root}|{device}|{version[:2]}|".encode())
    for name in (f"requirements/{device}.txt", "pyproject.toml", "tools/setup_env.py"):
        digest.update((root / name).read_bytes())
    return digest.hexdigest()


def read_stamp(venv: Path) -> dict[str, str]:
    """What the last complete set-up recorded; empty if there was none."""
    try:
        return json.loads((venv / STAMP).read_text())
    except (OSError, ValueError):
        return {}


def check_compiler(environment: dict[str, str]) -> str:
    """The C++ compiler, after it has compiled and linked something: vLLM and torch call it at run time."""
    compiler = environment.get("CXX") or next((c for c in ("g++", "clang++", "c++") if shutil.which(c)), "")
    cure = "install one (Debian, Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++), or set CXX"
    if not compiler:
        raise SetupError(f"no C++ compiler found (looked for g++, clang++, c++): {cure}")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text("#include <vector>\nint main() { return std::vector<int>{0}[0]; }\n")
        command = [*compiler.split(), str(source), "-o", str(source.with_suffix(""))]
        try:
            probe = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        except OSError as error:
            raise SetupError(f"the C++ compiler {compiler!r} does not start ({error.strerror}): {cure}") from error
    if probe.returncode != 0:
        raise SetupError(f"the C++ compiler {compiler!r} cannot build a program: {cure}\n{tail(probe.stderr, 5)}")
    return compiler


def has_python_headers() -> bool:
    return (Path(sysconfig.get_path("include")) / "Python.h").is_file()


def has_nvidia_gpu() -> bool:
    return shutil.which("nvidia-smi") is not None or Path("/dev/nvidia0").exists()


def check_machine(setup: Setup) -> None:
    """Refuses what would fail minutes later."""
    if sys.version_info < (3, 11):  # noqa: UP036 (this script runs before anything has checked it)
        raise SetupError(f"Python 3.11 or newer is needed, got {sys.version.split()[0]}: make setup PYTHON=python3.11")
    if sys.platform != "linux":
        raise SetupError(f"expected Linux, got {sys.platform}: vLLM and Megatron Core are built for Linux")
    if setup.device == "gpu":
        if sys.version_info < (3, 12):
            raise SetupError(
                f"GPU set-up needs Python 3.12 or newer (megatron-core 0.19 does), got {sys.version.split()[0]}: "
                "make setup DEVICE=gpu PYTHON=python3.12"
            )
        if not has_python_headers():
            version = f"{sys.version_info[0]}.{sys.version_info[1]}"
            raise SetupError(
                f"Python.h is missing, and transformer-engine compiles against it: install Python {version}'s headers "
                f"(Debian, Ubuntu: apt-get install python{version}-dev), or use another Python with PYTHON=..."
            )
        if not has_nvidia_gpu():
            announce(
                "warning: this machine has no NVIDIA driver, as a cluster's login node. The GPU packages are installed "
                "all the same; run make doctor on a machine with GPUs afterwards. For this machine use DEVICE=cpu"
            )
    check_compiler(setup.environment)
    free = shutil.disk_usage(setup.root).free / 2**30
    if free < FREE_GIB[setup.device] and not (setup.venv / "lib").exists():
        raise SetupError(f"{free:.1f} GiB free on this disk, {FREE_GIB[setup.device]} GiB needed for .venv: make room")


def tail(text: str, lines: int) -> str:
    return "\n".join("    " + line for line in text.strip().splitlines()[-lines:])


def announce(text: str) -> None:
    print(f"set-up: {text}", flush=True)


def wait_with_signs_of_life(process: subprocess.Popen[bytes], text: str, start: float) -> int:
    """Waits for `process`; redraws the elapsed seconds on a terminal, prints a line now and then elsewhere."""
    terminal, shown = sys.stdout.isatty(), start
    while True:
        try:
            return process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            now = time.monotonic()
            if terminal:
                print(f"\rset-up: {text} … {now - start:.0f} s ", end="", flush=True)
            elif now - shown > QUIET_SECONDS:
                announce(f"{text}: {now - start:.0f} s so far")
                shown = now


def wheelhouse_traits(root: Path, device: str) -> dict[str, str]:
    """What the wheels of a wheelhouse fit: the device, Python, the machine, and the pins that they were made from."""
    pins = hashlib.sha256((root / "requirements" / f"{device}.txt").read_bytes()).hexdigest()
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    return {"device": device, "python": version, "machine": os.uname().machine, "pins": pins}


def check_wheelhouse(setup: Setup, folder: Path) -> None:
    """Refuses a folder that is no wheelhouse, or one that was made for something else."""
    try:
        found = json.loads((folder / WHEELHOUSE_TRAITS).read_text())
    except (OSError, ValueError) as error:
        raise SetupError(
            f"{folder} is no complete wheelhouse ({WHEELHOUSE_TRAITS}: {error}): make one with "
            f"make wheelhouse DEVICE={setup.device} on a machine that reaches a package index, and copy the folder"
        ) from error
    wanted = wheelhouse_traits(setup.root, setup.device)
    differing = [
        f"{key}: expected {value}, got {found.get(key)}" for key, value in wanted.items() if found.get(key) != value
    ]
    if differing:
        raise SetupError(
            f"the wheelhouse {folder} was made for something else ({'; '.join(differing)}): make it again from this "
            f"revision, with the same Python: make wheelhouse DEVICE={setup.device} PYTHON=..."
        )


def install_wheelhouse(setup: Setup, folder: Path) -> None:
    """Install the wheels of the folder, all of them and nothing else, without an index."""
    check_wheelhouse(setup, folder)
    pinned = pip(setup, "--no-index", "--find-links", folder, "--no-deps", "-r", folder / "requirements.txt")
    cure = f"is the copy of {folder} complete? Copy it again, or make it again with make wheelhouse"
    run_step(setup, f"installing the wheels of {folder}", pinned, cure)


def make_wheelhouse(setup: Setup, folder: Path) -> None:
    """Fills the folder with a wheel of every package in `.venv`, in the same versions, compiled ones included.

    It starts from what is installed, because requirements/gpu.txt leaves the dependencies of vLLM to pip. A later
    set-up from the folder has the same versions.
    """
    frozen = subprocess.run(
        [setup.python, "-m", "pip", "--disable-pip-version-check", "freeze", "--all", "--exclude-editable"],
        env=setup.environment, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    packages = [line for line in frozen if line and not line.startswith(("#", "pip=="))]
    unpinned = [line for line in packages if "==" not in line]
    if unpinned:
        raise SetupError(f"only released versions can be put into a wheelhouse, and .venv has {', '.join(unpinned)}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WHEELHOUSE_TRAITS).unlink(missing_ok=True)  # comes last: without it the folder is not complete
    # These compile against the torch that is installed; all others are wheels already, or build by themselves.
    compiled = [line for line in packages if line.startswith(("transformer_engine", "transformer-engine"))]
    cure = "is a package index reachable? Run it again: what was downloaded is kept"
    for text, lines, options in (
        ("collecting the wheels", [line for line in packages if line not in compiled], ()),
        ("collecting transformer-engine's wheels", compiled, ("--no-build-isolation",)),
    ):
        if lines:
            wanted = folder / "requirements.txt"
            wanted.write_text("\n".join(lines) + "\n")
            command = pip(setup, *options, "--no-deps", "--wheel-dir", folder, "-r", wanted, verb="wheel")
            run_step(with_pip_headers(setup), f"{text} ({len(lines)})", command, cure)
    (folder / "requirements.txt").write_text("\n".join(packages) + "\n")
    (folder / WHEELHOUSE_TRAITS).write_text(json.dumps(wheelhouse_traits(setup.root, setup.device), indent=1) + "\n")


def run_step(setup: Setup, text: str, command: Sequence[str | Path], cure: str) -> None:
    """Runs one command with its output in the log; says what it does and how long it took."""
    announce(f"{text} …")
    start = time.monotonic()
    with setup.log.open("ab") as log:
        log.write(f"\n$ {' '.join(map(str, command))}\n".encode())
        log.flush()
        offset = log.tell()
        output = None if setup.verbose else log
        process = subprocess.Popen(
            [str(part) for part in command],
            cwd=setup.root,
            env=setup.environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output and subprocess.STDOUT,
        )
        try:
            status = wait_with_signs_of_life(process, text, start)
        except KeyboardInterrupt:
            process.wait()
            raise
    if sys.stdout.isatty():
        print("\r\x1b[2K", end="")
    if status != 0:
        said = setup.log.read_bytes()[offset:].decode(errors="replace")
        raise SetupError(f"{text} failed (status {status}): {cure}\n{tail(said, 15)}\n    (all of it: {setup.log})")
    announce(f"{text}: done in {time.monotonic() - start:.0f} s")


def pip(setup: Setup, *arguments: str | Path, verb: str = "install") -> list[str | Path]:
    quiet = [] if setup.verbose else ["--quiet", "--progress-bar", "off"]
    return [setup.python, "-m", "pip", "--disable-pip-version-check", verb, *quiet, *arguments]


def runs_inside(venv: Path) -> bool:
    return Path(sys.prefix).resolve() == venv.resolve()


def create_venv(setup: Setup, stamp: dict[str, str]) -> None:
    """A new `.venv`, or the one that is there when it still fits."""
    if runs_inside(setup.venv):
        return
    works = setup.python.exists() and subprocess.run([setup.python, "-c", ""], capture_output=True).returncode == 0
    wanted = f"{sys.version_info[0]}.{sys.version_info[1]}"
    config = setup.venv / "pyvenv.cfg"
    found = ".".join(_version_of(config).split(".")[:2]) if config.exists() else ""
    if works and found == wanted and stamp.get("device", setup.device) == setup.device:
        return
    if setup.venv.exists() and any(setup.venv.iterdir()):
        if works and not stamp:
            raise SetupError(
                f".venv is an environment of Python {found} that set-up did not make: remove it, or move it away"
            )
        announce(f"replacing .venv (made for Python {found or 'unknown'}, {stamp.get('device', 'broken')})")
        shutil.rmtree(setup.venv)
    announce(f"creating .venv with Python {sys.version.split()[0]}")
    made = subprocess.run(
        [sys.executable, "-m", "venv", setup.venv], env=setup.environment, capture_output=True, text=True
    )
    if made.returncode != 0:
        shutil.rmtree(setup.venv, ignore_errors=True)
        cure = f"install its venv module (Debian, Ubuntu: apt-get install python{wanted}-venv)"
        raise SetupError(f"Python {wanted} cannot create .venv: {cure}\n{tail(made.stdout + made.stderr, 6)}")


def _version_of(config: Path) -> str:
    """The Python version that `pyvenv.cfg` names, e.g. "3.11.7"."""
    entries = (line.partition("=") for line in config.read_text().splitlines())
    return next((value.strip() for key, _, value in entries if key.strip() in ("version", "version_info")), "")


def check_torch_build(setup: Setup) -> None:
    """On x86-64, stops before pip downloads gigabytes of CUDA libraries that the CPU build of vLLM cannot use."""
    installed = installed_torch(setup)
    version = installed if installed.startswith(TORCH.partition("==")[2]) else version_pip_would_install(setup)
    if os.uname().machine == "x86_64" and "+cpu" not in version:
        raise SetupError(
            f"pip {'has installed' if version == installed else 'would install'} torch {version}, the CUDA build; "
            "on a CPU, expected the build +cpu.\n"
            "    Tell pip where PyTorch keeps its CPU wheels, and run the same command again:\n"
            '        export PIP_EXTRA_INDEX_URL=…   (the address: README, section Install, or pytorch.org, "CPU")'
            + ("\n    Or use the GPU that is here: make setup DEVICE=gpu" if has_nvidia_gpu() else "")
        )


def installed_torch(setup: Setup) -> str:
    """The version of torch in `.venv`, e.g. "2.13.0+cpu"; "" without one."""
    query = [setup.python, "-c", "from importlib.metadata import version; print(version('torch'))"]
    return subprocess.run(query, env=setup.environment, capture_output=True, text=True).stdout.strip()


def version_pip_would_install(setup: Setup) -> str:
    """Which build of torch pip's indexes give, e.g. "2.13.0+cpu": pip prefers it to the one without a label.

    Not by `pip install --dry-run`, which downloads the wheel, gigabytes of it where the answer is the CUDA build.
    """
    command = [setup.python, "-m", "pip", "--disable-pip-version-check", "index", "versions", "torch"]
    listed = subprocess.run(command, env=setup.environment, capture_output=True, text=True)
    return choose_build(listed.stdout) or _no_torch(listed.stderr)


def choose_build(listing: str) -> str:
    """The build that pip takes for the pinned release, from the output of `pip index versions`; "" for none."""
    _, _, available = listing.partition("Available versions:")
    release = TORCH.partition("==")[2]
    versions = [version.strip() for version in available.partition("\n")[0].split(",")]
    return max((v for v in versions if v == release or v.startswith(release + "+")), default="", key=len)


def _no_torch(said: str) -> str:
    said = "\n".join(line for line in said.splitlines() if not line.startswith("WARNING: pip index"))
    raise SetupError(
        f"pip finds no {TORCH} for this Python and machine: is a package index reachable?\n{tail(said, 5)}"
    )


def usable_requirements(setup: Setup) -> Path:
    """The CPU pins; without Python's headers, less the one package that has to be compiled against them."""
    if has_python_headers():
        return setup.requirements
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    announce(f"Python.h is missing (Debian: python{version}-dev), so pycosat is left out: no reasoning-gym rewards")
    kept = [line for line in setup.requirements.read_text().splitlines() if not line.startswith("pycosat")]
    filtered = setup.venv / "requirements.txt"
    filtered.write_text("\n".join(kept) + "\n")
    return filtered


def install_cpu(setup: Setup) -> None:
    cure = "is a package index reachable? Run it again: what was downloaded is kept"
    check_torch_build(setup)
    run_step(setup, f"installing {TORCH} (0.2 GB)", pip(setup, "--no-deps", TORCH), cure)
    pinned = pip(setup, "--no-deps", "-r", usable_requirements(setup))
    run_step(setup, "installing the pinned requirements (1.5 GB, one to five minutes)", pinned, cure)


def install_gpu(setup: Setup) -> None:
    cure = "is a package index reachable? Run it again: what was downloaded is kept"
    vllm = next(line for line in setup.requirements.read_text().splitlines() if line.startswith("vllm=="))
    run_step(setup, f"installing {TORCH} and {vllm} (several GB)", pip(setup, TORCH, vllm, *BUILD_TOOLS), cure)
    compiled = pip(setup, "--no-build-isolation", "-r", setup.requirements)
    cure = (
        "transformer-engine's part for PyTorch compiles here, with a C++ compiler, against the CUDA headers that pip "
        "has installed; no CUDA toolkit and no GPU are needed. To compile against a toolkit instead, set CUDA_HOME and "
        "NVTE_BUILD_USE_NVIDIA_WHEELS=0"
    )
    run_step(
        with_pip_headers(setup),
        "installing the pinned requirements; transformer-engine compiles, ten minutes or more",
        compiled,
        cure,
    )


def with_pip_headers(setup: Setup) -> Setup:
    """The same set-up, in which transformer-engine compiles against pip's CUDA headers unless the user says otherwise.

    vLLM brings pip's nvcc, whose folder transformer-engine takes for a CUDA toolkit. That folder has no nccl.h and no
    cudnn.h: they are in the folders of other packages, which only this variable makes it look at.
    """
    return replace(setup, environment={"NVTE_BUILD_USE_NVIDIA_WHEELS": "1", **setup.environment})


def install(setup: Setup) -> None:
    """All steps, from nothing or from whatever an interrupted set-up left."""
    if setup.wheelhouse:
        offline = {name: value for name, value in setup.environment.items() if not name.startswith("PIP_")}
        setup = replace(setup, environment={**offline, "PIP_CONFIG_FILE": os.devnull})
        install_wheelhouse(setup, setup.wheelhouse)
    else:
        {"cpu": install_cpu, "gpu": install_gpu}[setup.device](setup)
    project = pip(setup, "--no-deps", "--no-build-isolation", "--editable", setup.root)
    run_step(setup, "installing this project, editable", project, "see the log")
    if setup.device == "gpu" and not has_nvidia_gpu():  # vLLM and transformer-engine may ask the driver when imported
        modules, names = "torch, transformers", "torch and transformers"
    else:
        modules, names = "torch, transformers, megatron.core, vllm", "torch, Megatron Core and vLLM"
    probe = [setup.python, "-c", f"import {modules}"]
    run_step(setup, f"importing {names} once", probe, "remove .venv and run it again")


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto", help="auto: as last time, else cpu")
    parser.add_argument("--verbose", action="store_true", help="pip's own output, instead of .venv/setup.log")
    parser.add_argument("--wheelhouse", type=Path, help="install from this folder of make wheelhouse")
    parser.add_argument("--make-wheelhouse", type=Path, help="then fill this folder with wheels")
    options = parser.parse_args(arguments)
    stamp = read_stamp(root / ".venv")
    device = stamp.get("device", "cpu") if options.device == "auto" else options.device
    wheelhouse = options.wheelhouse and options.wheelhouse.absolute()
    setup = Setup(root, device, options.verbose, wheelhouse)
    if runs_inside(setup.venv) and stamp.get("device", device) != device:  # it is about to be replaced
        os.execv(sys._base_executable, [sys._base_executable, *sys.argv])
    start, wanted = time.monotonic(), fingerprint(root, device, sys.version_info)
    try:
        if stamp.get("fingerprint") == wanted and setup.python.exists():
            announce("environment ready (.venv)")
            if options.make_wheelhouse:
                make_wheelhouse(setup, options.make_wheelhouse.absolute())
            return 0
        if wheelhouse:
            check_wheelhouse(setup, wheelhouse)
        check_machine(setup)
        create_venv(setup, stamp)
        (setup.venv / STAMP).write_text(json.dumps({"device": device, "fingerprint": "incomplete"}))
        install(setup)
        (setup.venv / STAMP).write_text(json.dumps({"device": device, "fingerprint": wanted}))
        if options.make_wheelhouse:
            make_wheelhouse(setup, options.make_wheelhouse.absolute())
    except SetupError as error:
        print(f"set-up stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nset-up interrupted; run it again to go on from here", file=sys.stderr)
        return 130
    announce(f"environment ready in {time.monotonic() - start:.0f} s (.venv, {device})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
