"""What processes that run a user's code share: loading a file of theirs, and limiting memory."""

from __future__ import annotations

import importlib.util
import io
import site
import sys
import sysconfig
import traceback
from pathlib import Path
from types import ModuleType

from megatron_srpo.core.errors import UserError


def load_file(path: Path, *, error: type[UserError] = UserError) -> ModuleType:
    """The module of a file, loaded once. Raises `error` if there is no such file, and what the file raises."""
    path = path.expanduser().resolve()
    if not path.is_file():
        raise error(f"file not found: {path}")
    name = f"megatron_srpo_user_{path.stem}_{abs(hash(str(path))):x}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # there is a loader for every .py file
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # it can import files of its folder; at the end, so that they hide nothing
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def print_line_by_line() -> None:
    """Write every printed line at once and whole: a process that is killed would take its buffer with it, and under
    PYTHONUNBUFFERED pieces of lines of several processes would mix. No text fails because of its encoding."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True, write_through=False, errors="backslashreplace")


def limit_memory(mib: int) -> None:
    """Limit the address space above its present size (Linux), and write no core files. 0: no limit."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if mib and sys.platform == "linux":
        with open("/proc/self/statm") as statm:
            present = int(statm.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (present + mib * 2**20,) * 2)


def place(error: BaseException) -> str:
    """Where in the user's code it was raised, as " (file.py, line 5, in name)"; "" if it was raised elsewhere."""
    others = (str(Path(__file__).resolve().parents[1]), *site.getsitepackages(), sysconfig.get_path("stdlib"))
    frames = [one for one in traceback.extract_tb(error.__traceback__) if not one.filename.startswith(others)]
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno}, in {frames[-1].name})" if frames else ""
