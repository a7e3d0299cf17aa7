"""Runs a Python program that a model wrote: without network, in namespaces of its own, within limits.

Isolation is by bubblewrap: the program sees the interpreter and an empty folder in memory, no other process, no network
and no environment variable. As root it also becomes another user. Without bubblewrap, util-linux's `unshare` takes the
network and the other processes away, but the program may read files of its user. docs/security.md says what holds.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megatron_srpo.core.errors import UserError

if TYPE_CHECKING:  # not needed in the program of the environments, whose Python may have few packages
    from megatron_srpo.config import EnvironmentConfig

Isolation = Literal["auto", "bubblewrap", "unshare", "none"]
FIRST_USER = 2**20  # as root every program is a user of its own from here on, so that limits of processes are its own
SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/alternatives")
KILL_SECONDS = 5.0

RUNNER = r"""
import json, os, resource, sys
job = json.loads(sys.stdin.buffer.read())
for name, value in job["limits"].items():
    resource.setrlimit(getattr(resource, name), (value, value))
if job["user"] is not None:
    os.setgroups([]); os.setgid(job["user"]); os.setuid(job["user"])
results = os.fdopen(os.dup(1), "w", buffering=1)
null = os.open(os.devnull, os.O_RDWR)
for number in (0, 1, 2):
    os.dup2(null, number)
def tell(**fact):
    results.write(json.dumps(fact) + "\n")
def said(error):
    kind = type(error).__name__
    line = None
    frame = error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code.co_filename == "solution.py":
            line = frame.tb_lineno
        frame = frame.tb_next
    if isinstance(error, SyntaxError):
        line = error.lineno
    return f"{kind}: {error}"[:400] + ("" if line is None else f" (line {line})")
def plain(value):
    text = json.dumps(value)
    if len(text) > job["longest"]:
        raise ValueError(f"the value is too long, more than {job['longest'] // 1024} KiB")
    return json.loads(text)
def new_file():
    if hasattr(os, "memfd_create"):  # not in every build of Python
        return open(os.memfd_create("file"), "w+b")
    import tempfile
    return tempfile.TemporaryFile()
def run_program(given):
    # As Python itself would: with files as standard input and output, and to the end of its threads.
    with new_file() as source, new_file() as sink:
        source.write(given.encode("utf-8", "surrogatepass"))
        source.seek(0)
        os.dup2(source.fileno(), 0); os.dup2(sink.fileno(), 1)
        sys.stdin = sys.__stdin__ = open(0, encoding="utf-8", errors="surrogatepass", closefd=False)
        out = sys.stdout = sys.__stdout__ = open(1, "w", encoding="utf-8", closefd=False)
        module = sys.modules["__main__"] = types.ModuleType("__main__")
        atexit._clear()  # what a program before this one has registered and not reached
        try:
            try:
                exec(code, vars(module))
            except SystemExit:
                pass
            for thread in threading.enumerate():
                # Workers of an executor that was not shut down wait for the end of Python.
                if not (thread is threading.current_thread() or thread.daemon or thread.name.startswith("ThreadPool")):
                    thread.join()
            atexit._run_exitfuncs()
            with contextlib.suppress(Exception):  # it may be something of its own by now
                sys.stdout.flush()
            vars(module).clear()  # files that it has left open are written
            if not out.closed:
                out.flush()
            sink.seek(0)
            return plain(sink.read().decode("utf-8", "replace"))
        finally:
            os.dup2(null, 0); os.dup2(null, 1)  # what is written later belongs to no test
            sys.stdin = sys.__stdin__ = sys.stdout = sys.__stdout__ = None
import atexit, builtins, contextlib, threading, types
builtins.exit = builtins.quit = sys.exit  # as without -S
own = sys.modules["__main__"]  # stays alive
try:
    code = compile(job["code"], "solution.py", "exec")
    if job["calls"] is not None:
        module = sys.modules["solution"] = types.ModuleType("solution")
        names = vars(module)
        exec(code, names)
    tell(loaded=True)
except BaseException as error:
    tell(failed=said(error))
    os._exit(0)
if job["calls"] is not None:
    for number, call in enumerate(job["calls"]):
        tell(begin=number)
        try:
            if call["how"] == "value":
                tell(number=number, value=plain(eval(compile(call["text"], "test", "eval"), names)))
            else:
                exec(compile(call["text"], "test", "exec"), names)
                tell(number=number, value=None)
        except BaseException as error:
            tell(number=number, error=said(error))
else:
    for number, given in enumerate(job["inputs"]):
        tell(begin=number)
        try:
            tell(number=number, value=run_program(given))
        except BaseException as error:
            tell(number=number, error=said(error))
os._exit(0)
"""


@dataclass(frozen=True)
class Limits:
    """Of one program: all its processes end with it."""

    seconds: float = 5.0  # of the wall clock, and of the processor
    memory_mib: int = 512  # address space of a process
    processes: int = 8  # threads included
    file_mib: int = 16  # of a file, and of all files together
    output_kib: int = 256  # of all that it tells, as JSON; more ends it
    value_kib: int = 64  # of one value or output, as JSON; more is an error of that one


@dataclass(frozen=True)
class Outcome:
    """What a program did: the facts that its runner told, in order, and why it ended early, or ""."""

    facts: list[dict[str, Any]]
    ended: str


def choose(isolation: Isolation) -> str:
    """The isolation that this machine has. UserError if it has not the one that was asked for."""
    found = {name: works(name) for name in (("bubblewrap", "unshare") if isolation == "auto" else (isolation,))}
    for name, usable in found.items():
        if usable:
            return name
    raise UserError(
        f"the sandbox for model-written code: {' and '.join(found)} cannot be used here. Install bubblewrap "
        "(apt-get install bubblewrap) and allow user namespaces. Where the whole job runs in a container that may be "
        'lost, isolation = "none" does without'
    )


def weakness(environment: EnvironmentConfig) -> list[str]:
    """A line for the user if model-written code will run in less than bubblewrap though nobody has chosen that."""
    kinds = [
        kind
        for kind, reference in environment.classes.items()
        if reference == "python" and environment.arguments.get(kind, {}).get("isolation", "auto") == "auto"
    ]
    if not kinds or works("bubblewrap") or not works("unshare"):
        return []
    return [
        f"environment.classes.{kinds[0]}: bubblewrap is missing or cannot be used here, so what the model writes runs "
        "under unshare alone: it can read and write what you can (docs/security.md). Install bubblewrap, or accept it "
        'with isolation = "unshare"'
    ]


@cache
def works(name: str) -> bool:
    """Whether a program can be started in this isolation here, which is tried once."""
    if name == "none":
        return True
    command = [*_prefix(name, Limits(), ()), interpreter(), "-I", "-S", "-c", "print(1)"]
    if shutil.which(command[0]) is None:
        return False
    try:
        found = subprocess.run(command, capture_output=True, timeout=20, env={}, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return found.stdout == b"1\n"


def interpreter() -> str:
    """The Python without this environment's packages."""
    return os.path.realpath(Path(sys.base_prefix) / "bin" / f"python{sys.version_info[0]}.{sys.version_info[1]}")


def _prefix(name: str, limits: Limits, folders: Sequence[str]) -> list[str]:
    """The command that gives a program its namespaces."""
    root = os.geteuid() == 0
    if name == "none":
        return []
    if name == "unshare":
        user = [] if root else ["--user", "--map-current-user"]
        return ["unshare", *user, "--net", "--ipc", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
    command = ["bwrap", "--die-with-parent", "--new-session", "--clearenv"]
    command += ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"] if root else ["--unshare-user"]
    for folder in dict.fromkeys((*SYSTEM, sys.base_prefix, os.path.dirname(os.path.dirname(interpreter())), *folders)):
        if os.path.exists(folder):
            for parent in reversed(Path(folder).parents[:-1]):  # bubblewrap would copy their modes, as 0700 of /root
                command += ["--perms", "0755", "--dir", str(parent)]
            command += ["--ro-bind", folder, folder]
    command += ["--proc", "/proc", "--dev", "/dev", "--size", str(limits.file_mib * 2**20), "--perms", "1777"]
    return [*command, "--tmpfs", "/tmp", "--chdir", "/tmp", "--setenv", "HOME", "/tmp"]


async def run(
    code: str, *, calls: Sequence[dict[str, str]] | None = None, inputs: Sequence[str] = (), limits: Limits,
    isolation: str, folders: Sequence[str] = (),
) -> Outcome:  # fmt: skip
    """Load `code` as a module and evaluate `calls`, each {"how": "value" or "statement", "text"}; or without calls, run
    it as a program once for each of the `inputs`, which it reads from its standard input.

    The program can tell what it likes, also facts that are not true: what it must not know is kept from it.
    """
    mib = 2**20
    job = {
        "code": code, "calls": calls if calls is None else list(calls), "inputs": list(inputs),
        "longest": limits.value_kib * 1024,
        "user": FIRST_USER + os.getpid() % 2**20 if os.geteuid() == 0 and isolation == "bubblewrap" else None,
        "limits": {
            "RLIMIT_AS": limits.memory_mib * mib, "RLIMIT_CPU": max(1, round(limits.seconds + 0.5)),
            "RLIMIT_FSIZE": limits.file_mib * mib, "RLIMIT_NOFILE": 64, "RLIMIT_CORE": 0,
            "RLIMIT_NPROC": limits.processes,
        },
    }  # fmt: skip
    process = await asyncio.create_subprocess_exec(
        *_prefix(isolation, limits, folders), interpreter(), "-I", "-S", "-c", RUNNER,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
        env={}, start_new_session=True, cwd="/",
    )  # fmt: skip
    told, ended = bytearray(), ""
    try:
        async with asyncio.timeout(limits.seconds + 1):
            assert process.stdin is not None and process.stdout is not None
            with suppress(BrokenPipeError, ConnectionResetError):
                process.stdin.write(json.dumps(job).encode())
                await process.stdin.drain()
                process.stdin.close()
            while chunk := await process.stdout.read(1 << 16):
                told += chunk
                if len(told) > limits.output_kib * 1024:
                    ended = f"it wrote more than {limits.output_kib} KiB"
                    break
    except TimeoutError:
        ended = f"it did not end within {limits.seconds:g} s"
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        # asyncio's wait() needs the end of the pipe, which it does not see while a full buffer waits to be read.
        with suppress(TimeoutError):
            async with asyncio.timeout(KILL_SECONDS):
                while process.stdout is not None and await process.stdout.read(1 << 16):
                    pass
        code_found = await process.wait()
    facts = _facts(bytes(told[: limits.output_kib * 1024]))
    if not ended and code_found not in (0, -signal.SIGKILL) and not facts:
        ended = f"the program ended with code {code_found}"
    return Outcome(facts, ended)


def _facts(told: bytes) -> list[dict[str, Any]]:
    """The lines that are what the runner writes; a program may write others."""
    found = []
    for line in told.split(b"\n"):
        try:
            fact = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(fact, dict):
            found.append(fact)
    return found
