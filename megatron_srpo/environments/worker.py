"""The program in which environments run. It imports their classes once, then forks a process for each episode.

An episode that hangs, crashes or fills its memory therefore costs itself alone. None sees what an earlier one left
behind, and hundreds of them need little memory. The trainer talks to the program over one socket (start an episode, end
one), and to each episode over a socket of its own: it sends 8 bytes with a length and then a pickle, and gets lines of
JSON, so that nothing that an environment does can make the trainer execute anything. This module imports no torch.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import inspect
import json
import os
import pickle
import random
import selectors
import signal
import socket
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from megatron_srpo.core.errors import UserError
from megatron_srpo.core.exit_codes import exit_words
from megatron_srpo.core.user_code import limit_memory, place, print_line_by_line
from megatron_srpo.environments.base import Environment, Step, Task
from megatron_srpo.environments.registry import check_arguments, resolve
from megatron_srpo.environments.server import die_with_parent, forget_much, server_of, uses_server

HEADER_BYTES = 8
LARGEST_PACKET = 2**17  # bytes of a message to the program, or of its; a socket of packets keeps them apart
ERROR_LIMIT = 500  # characters

_to_json = json.dumps  # kept here, because an environment may replace it in the module


@dataclass(frozen=True)
class Setup:
    """The first message to the program."""

    classes: Mapping[str, str]  # by kind: the reference of its class
    arguments: Mapping[str, Mapping[str, object]]  # by kind: those of its constructor
    memory_mib: int  # limit of an episode's address space above what the program has; 0 means no limit


def encode(message: object) -> bytes:
    """A message to an episode, with its header."""
    body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return len(body).to_bytes(HEADER_BYTES, "big") + body


def main(descriptor: int) -> None:
    """Serve the trainer at the other end of the socket until it closes it. Never returns."""
    control = socket.socket(fileno=descriptor)
    print_line_by_line()
    setup = pickle.loads(control.recv(LARGEST_PACKET))
    classes: dict[str, type[Environment]] = {}
    for kind, reference in setup.classes.items():
        try:
            arguments = setup.arguments.get(kind, {})
            classes[kind] = resolve(reference)
            check_arguments(classes[kind], arguments, reference, kind)
            classes[kind].prepare(**arguments)
        except Exception as error:
            text = str(error)
            if not isinstance(error, UserError):
                traceback.print_exc()
                text = f"it cannot be prepared: {type(error).__name__}: {error}{place(error)}"
            _tell(control, {"failed": f"kind {kind!r}: {text}"})
            os._exit(0)
    gc.collect()
    gc.freeze()  # the collector of a fork would touch, and so copy, every object of the program
    _tell(control, {"ready": True})
    _Zygote(control, setup, classes).serve()
    os._exit(0)


class _Zygote:
    """Forks, and tells how the forks ended."""

    def __init__(self, control: socket.socket, setup: Setup, classes: Mapping[str, type[Environment]]) -> None:
        self._control, self._setup, self._classes = control, setup, classes
        self._children: dict[int, int] = {}  # pid → number of its episode
        self._own = _children_of_this_process()  # what importing the classes has started
        _adopt_orphans()

    def serve(self) -> None:
        wake, woken = socket.socketpair()
        woken.setblocking(False)
        wake.setblocking(False)
        signal.set_wakeup_fd(woken.fileno())
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        selector = selectors.DefaultSelector()
        selector.register(self._control, selectors.EVENT_READ)
        selector.register(wake, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is wake:
                    with suppress(BlockingIOError):
                        wake.recv(4096)
                elif not self._order():
                    self._end_all()
                    return
            self._reap()

    def _order(self) -> bool:
        """One order of the trainer; False if it has ended."""
        try:
            data, descriptors, _, _ = socket.recv_fds(self._control, 64, 1)
        except OSError:
            return False
        if not data:
            return False
        name, number = data.decode().split()
        if name == "fork":
            forget_much()
            self._fork(int(number), descriptors[0])
        else:
            for pid, episode in self._children.items():
                if episode == int(number):  # not reaped yet, so the number still means this process
                    _kill(pid)
        return True

    def _fork(self, number: int, descriptor: int) -> None:
        try:
            pid = os.fork()
        except OSError as error:
            os.close(descriptor)
            _tell(self._control, {"ended": number, "how": f"no process for it: {error}"})
            return
        if pid == 0:
            try:
                self._control.close()
                die_with_parent()
                _adopt_orphans()
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                os.setsid()  # so that its children can be ended with it
                limit_memory(self._setup.memory_mib)
                _Episode(socket.socket(fileno=descriptor), self._setup, self._classes).serve()
            finally:
                os._exit(1)
        os.close(descriptor)
        self._children[pid] = number

    def _reap(self) -> None:
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None:
                return
            if ended.si_pid in self._children:
                _kill(ended.si_pid)  # what it has started; before its number can mean something else
            how = exit_words(os.waitstatus_to_exitcode(os.waitpid(ended.si_pid, 0)[1]))
            if (server := server_of(ended.si_pid)) is not None:
                why = f"the server {server.line!r} has ended ({how})"
                _tell(self._control, {"lost": why, "said": server.last_words()})
                self._end_all()
                os._exit(0)
            number = self._children.pop(ended.si_pid, None)
            self._kill_orphans()
            if number is not None:
                _tell(self._control, {"ended": number, "how": how})

    def _kill_orphans(self) -> None:
        """End what ended episodes have started in sessions of their own."""
        for pid in _children_of_this_process() - self._children.keys() - self._own:
            _kill(pid)

    def _end_all(self) -> None:
        for pid in self._children:
            _kill(pid)
        for pid in self._children:
            with suppress(ChildProcessError):
                os.waitpid(pid, 0)
        self._children.clear()
        self._kill_orphans()


class _Episode:
    """One episode in its own process."""

    def __init__(self, channel: socket.socket, setup: Setup, classes: Mapping[str, type[Environment]]) -> None:
        self._channel, self._setup, self._classes = channel, setup, classes
        self._name = ""  # for the log

    def serve(self) -> None:
        """Answer the trainer until it closes the socket."""
        owner = os.getpid()
        asyncio.run(self._serve(owner))
        with suppress(Exception):  # an environment may have put something else in its place
            sys.stdout.flush()
        os._exit(0)

    async def _serve(self, owner: int) -> None:
        reader, writer = await asyncio.open_unix_connection(sock=self._channel)
        environment: Environment | None = None
        while (message := await _receive(reader)) is not None:
            try:
                if isinstance(message, str):
                    assert environment is not None
                    answer = asdict(_checked(await _awaited(environment.step(message))))
                else:
                    kind, fields = message
                    self._name = f"kind {kind!r}, sample {fields['sample']} of {fields['messages'][-1:]!r:.200}"
                    task = Task(**fields)
                    _seed(task.seed)
                    environment = self._classes[kind](**self._setup.arguments.get(kind, {}))
                    answer = await _started(environment, task)
                line = _to_json(answer)
            except MemoryError:
                line = _to_json({"error": "out of memory (environment.memory_mib limits it)"})
            except Exception as error:
                text = f"exception: {type(error).__name__}: {error}"[:ERROR_LIMIT] + place(error)
                if isinstance(error, UserError):  # it says all that is needed
                    text = str(error)[:ERROR_LIMIT]
                self._print_traceback(error)
                line = _to_json({"error": text, "served": uses_server()})
            if os.getpid() != owner:  # a process that the environment has forked returns here too
                os._exit(0)
            writer.write(line.encode() + b"\n")
            await writer.drain()
        if environment is not None:
            try:
                await _awaited(environment.close())
            except Exception as error:  # the episode has its reward: the log alone tells
                self._print_traceback(error)

    def _print_traceback(self, error: Exception) -> None:
        """Into the log. What the environment has done to its standard error must not hide the error itself."""
        with suppress(Exception):
            trace = "".join(traceback.format_exception(error))
            print(f"---- {self._name}\n{trace}", end="", file=sys.stderr, flush=True)


async def _started(environment: Environment, task: Task) -> dict[str, Any]:
    environment.task = task
    own = [dict(message) for message in task.messages]
    messages = _message_list("start() must return", await _awaited(environment.start(task)))
    # The row's own messages may be longer than what an environment may say, and the trainer has them.
    return {"messages": None if messages == own else messages, "tools": list(environment.tools)}


def _seed(seed: int) -> None:
    """Begin what random, NumPy and torch draw for this episode. The generators of the last two are otherwise the same
    in all forks, and that of random another one in every run."""
    random.seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed % 2**32)
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(seed)


async def _awaited(result: Any) -> Any:
    """What a method returns, whether it is asynchronous or not."""
    return await result if inspect.isawaitable(result) else result


def _checked(step: object) -> Step:
    """The answer of step(). TypeError names the field that is not what it should be; numbers may be NumPy's."""
    if not isinstance(step, Step):
        raise TypeError(f"step() must return a Step, got {type(step).__name__}")
    done, calls, errors = (_plain(value) for value in (step.done, step.tool_calls, step.tool_errors))
    if not isinstance(done, bool):
        raise TypeError(f"Step.done must be True or False, got {done!r}")
    for name, count in (("tool_calls", calls), ("tool_errors", errors)):
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            raise TypeError(f"Step.{name} must be a whole number from 0, got {count!r}")
    for name in ("feedback", "turn_feedback"):
        if not isinstance(getattr(step, name), str | None):
            raise TypeError(f"Step.{name} must be a text or None, got {type(getattr(step, name)).__name__}")
    try:
        reward = None if step.reward is None else float(step.reward)
    except (TypeError, ValueError):
        raise TypeError(f"Step.reward must be a number or None, got {step.reward!r:.80}") from None
    messages = _message_list("Step.messages must be", step.messages)
    return Step(messages, done, reward, step.feedback, calls, errors, step.turn_feedback)


def _message_list(must: str, messages: object) -> list[dict[str, Any]]:
    if not isinstance(messages, Sequence) or not all(isinstance(message, Mapping) for message in messages):
        raise TypeError(f'{must} a list of messages {{"role": …, "content": …}}, got {messages!r:.80}')
    return [dict(message) for message in messages]


def _plain(value: Any) -> Any:
    """A number of NumPy's as Python's."""
    return value.item() if hasattr(value, "item") else value


async def _receive(reader: asyncio.StreamReader) -> Any:
    """The next message; None if the trainer has closed the socket."""
    try:
        header = await reader.readexactly(HEADER_BYTES)
        return pickle.loads(await reader.readexactly(int.from_bytes(header, "big")))
    except (asyncio.IncompleteReadError, OSError):
        return None


def _tell(control: socket.socket, message: dict[str, Any]) -> None:
    try:
        control.send(_to_json(message).encode()[:LARGEST_PACKET])
    except OSError:
        os._exit(0)  # the trainer has ended


def _kill(pid: int) -> None:
    """End a process and its group."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    with suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)


def _adopt_orphans() -> None:
    """Linux: what a descendant leaves running when it ends becomes a child of this process, and not of the system's
    first one. So this program can end it when its episode has ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER


def _children_of_this_process() -> set[int]:
    """Their numbers; none where there is no /proc."""
    own = os.getpid()
    try:
        with open(f"/proc/self/task/{own}/children") as file:
            return set(map(int, file.read().split()))
    except OSError:  # some kernels have no such file
        pass
    try:
        return {int(name) for name in os.listdir("/proc") if name.isdigit() and _parent(name) == own}
    except OSError:
        return set()


def _parent(pid: str) -> int | None:
    with suppress(OSError, ValueError, IndexError), open(f"/proc/{pid}/stat", errors="replace") as file:
        return int(file.read().rpartition(")")[2].split()[1])
    return None
