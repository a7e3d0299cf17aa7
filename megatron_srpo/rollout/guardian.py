"""Runs a server as its parent, and ends it with all its descendants when the trainer is gone, however that ended.

    python guardian.py COMMAND …     with the read end of a pipe as standard input, whose other end the trainer holds
    python guardian.py --alone COMMAND …          in the trainer's stead: until it is asked to stop, or killed

Standard library alone, started by its path: it must be up at once and stay small. Exit code: the command's.
"""

from __future__ import annotations

import ctypes
import os
import re
import select
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

POLL_SECONDS = 1.0
GRACE_SECONDS = 5.0
PR_SET_PDEATHSIG = 1
STOPPED = 130  # megatron_srpo.core.exit_codes.STOPPED, which cannot be imported here
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ALONE = "--alone"
SHARED_MEMORY = re.compile(r"(/dev/shm/\S+)")


def session_members() -> list[int]:
    """Process ids of this session, without this process."""
    members = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with suppress(OSError):
                if os.getsid(int(entry.name)) == os.getsid(0):
                    members.append(int(entry.name))
    return members


def shared_memory(members: list[int]) -> set[str]:
    """Blocks in /dev/shm that the processes have mapped."""
    found: set[str] = set()
    for member in members:
        with suppress(OSError):
            found.update(SHARED_MEMORY.findall(Path(f"/proc/{member}/maps").read_text()))
    return found


def end(blocks: set[str]) -> None:
    """Kill every descendant, and unlink what they shared: nobody else can."""
    members = session_members()
    blocks |= shared_memory(members)
    while members:
        for member in members:
            with suppress(OSError):
                os.kill(member, signal.SIGKILL)
        with suppress(OSError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        members = [member for member in session_members() if not _is_zombie(member)]
    for block in blocks:
        with suppress(OSError):
            os.unlink(block)


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def die_with_me() -> None:
    """In the server, before it is one: the kernel ends it when this process, which has one thread, is killed."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def stand_in(command: list[str]) -> int:
    """Hold the pipe of a guardian of `command` and wait: whatever ends this process closes it."""
    guarded = [sys.executable, "-I", "-S", __file__, *command]
    guardian = subprocess.Popen(guarded, stdin=subprocess.PIPE, start_new_session=True)
    asked = []

    def stop(*_: object) -> None:
        asked.append(True)
        guardian.stdin.close()

    for number in SIGNALS:
        signal.signal(number, stop)
    code = guardian.wait()
    if asked:
        print("stopped by Ctrl-C or SIGTERM", file=sys.stderr, flush=True)
    return STOPPED if asked else code


def main(command: list[str]) -> int:
    if command[0] == ALONE:
        return stand_in(command[1:])
    parent = os.getppid()
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)  # the trainer alone decides, by closing the pipe
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=die_with_me)
    blocks: set[str] = set()
    while server.poll() is None:
        closed = select.select([0], [], [], POLL_SECONDS)[0]
        blocks |= shared_memory(session_members())  # now: what they have mapped is not known when they are gone
        if closed or os.getppid() != parent:
            server.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                server.wait(GRACE_SECONDS if closed and os.getppid() == parent else 0)
            break
    end(blocks)
    return server.returncode if server.returncode is not None else -signal.SIGKILL


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) & 0xFF)
