"""Runs a server as a child process, and ends it with all its descendants when the trainer is gone, for any reason.

    python parent_watcher.py COMMAND …           standard input is a pipe, whose write end the trainer holds open
    python parent_watcher.py --alone COMMAND …   there is no trainer: the server runs until this process is stopped

It uses the standard library only and is started by its path, because it must be up at once and stay small. Its exit
code is that of the command; if a signal ended the command, it is the signal's number + 128, as in a shell.
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
STOPPED, SIGNALLED = 130, 128  # as in megatron_srpo.core.exit_codes, which cannot be imported here
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ALONE = "--alone"
SHARED_MEMORY = re.compile(r"(/dev/shm/\S+)")


def session_members() -> list[int]:
    """The ids of all processes of this session except this one."""
    members = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with suppress(OSError):
                if os.getsid(int(entry.name)) == os.getsid(0):
                    members.append(int(entry.name))
    return members


def shared_memory(members: list[int]) -> set[str]:
    """The blocks in /dev/shm that the processes have mapped."""
    found: set[str] = set()
    for member in members:
        with suppress(OSError):
            found.update(SHARED_MEMORY.findall(Path(f"/proc/{member}/maps").read_text(errors="replace")))
    return found


def end_session(blocks: set[str]) -> None:
    """Kill every descendant and unlink their shared memory, which no other process will do."""
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
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def die_with_parent() -> None:
    """Runs in the child before it becomes the server: the kernel kills it when this process is killed."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def run_alone(command: list[str]) -> int:
    """Start a watcher of `command` and hold the write end of its pipe, which closes whatever ends this process."""
    watched = [sys.executable, "-I", "-S", __file__, *command]
    watcher = subprocess.Popen(watched, stdin=subprocess.PIPE, start_new_session=True)
    assert watcher.stdin is not None
    pipe, stopped = watcher.stdin, False

    def stop(*_: object) -> None:
        nonlocal stopped
        stopped = True
        pipe.close()

    for number in SIGNALS:
        signal.signal(number, stop)
    code = watcher.wait()
    if stopped:
        print("stopped by Ctrl-C or SIGTERM", file=sys.stderr, flush=True)
    return STOPPED if stopped else code


def main(command: list[str]) -> int:
    if command[0] == ALONE:
        return run_alone(command[1:])
    parent = os.getppid()
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)  # only the trainer decides, by closing the pipe
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=die_with_parent)
    blocks: set[str] = set()
    while server.poll() is None:
        closed = select.select([0], [], [], POLL_SECONDS)[0]
        blocks |= shared_memory(session_members())  # their maps cannot be read any more when they are gone
        if closed or os.getppid() != parent:
            server.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                server.wait(GRACE_SECONDS if closed and os.getppid() == parent else 0)
            break
    end_session(blocks)
    return server.returncode if server.returncode is not None else -signal.SIGKILL


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.exit(code if code >= 0 else SIGNALLED - code)
