"""The trainer's side of the processes in which environments run. All of it belongs to one event loop."""

from __future__ import annotations

import asyncio
import fcntl
import itertools
import json
import math
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_srpo.config import EnvironmentConfig
from megatron_srpo.core.environment import inherited
from megatron_srpo.core.errors import UserError
from megatron_srpo.core.exit_codes import exit_words
from megatron_srpo.core.output_log import OutputLog
from megatron_srpo.core.text import clause
from megatron_srpo.environments.base import Message, Step, Task
from megatron_srpo.environments.worker import LARGEST_PACKET, Setup, encode

START_SECONDS = 300.0  # limit for importing the classes, and maybe vLLM for its tool parsers
LONGEST_ANSWER = 2**20  # bytes of an environment's answer
LONGEST_TEXT = 2**16  # characters of one message or feedback
LARGEST_REWARD = 1e12  # as for reward functions: larger ones overflow in fp32
END_SECONDS = 3.0  # limit for ending all episodes
QUEUE_SECONDS = 0.005  # until an order is tried again
CLOSE_SECONDS = 10.0  # limit for an environment's close()
SERVER_SECONDS = 1.0  # until the end of a server is told after an episode has failed by it
OUTPUT_BYTES = 2**20  # that are read at a time of what is printed
LAST_READS = 16  # of it when the program has ended: other processes may print for ever
FAILED_STARTS = 3  # of the program, in a row, end the run
AGAIN_SECONDS = 1.0  # until it is started again after a start that failed in the middle of a run

# Another Python may lack packages of ours, or be too old: it says so instead of taking the setup.
_PROGRAM = """
import json, socket, sys
given = json.loads(sys.argv[1])
sys.path[:] = given if sys.argv[3] else sys.path + given
try:
    from megatron_srpo.environments.worker import main
except Exception as error:
    control = socket.socket(fileno=int(sys.argv[2]))
    control.recv(1)
    control.send(json.dumps({"unfit": "{}: {}".format(type(error).__name__, error)}).encode())
    sys.exit()
main(int(sys.argv[2]))
"""


class EpisodeError(Exception):
    """An environment has failed; its episode ends. str() says how."""


class ProgramLost(Exception):
    """The program in which environments run has ended: its episodes begin again."""


@dataclass(frozen=True)
class Started:
    """What an environment begins with."""

    messages: list[Message]
    tools: list[dict[str, Any]]


class EnvironmentPool:
    """The program with its episodes, at most `environment.processes` at a time; more wait for their turn.

    `say` gets a line when the program was lost and started again. `log` gets what it and the episodes print, and the
    tracebacks of environments; by default only the last output is kept, for messages.
    """

    def __init__(self, config: EnvironmentConfig, say: Callable[[str], None], log: OutputLog | None = None) -> None:
        self._config, self._say, self.log = config, say, log or OutputLog()
        self._setup = Setup(dict(config.classes), dict(config.arguments), config.memory_mib)
        self._numbers = itertools.count()
        self._episodes: dict[int, EpisodeProcess] = {}
        self._room = asyncio.Semaphore(config.processes)
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._output: int | None = None  # where its output can be read
        self._ready: asyncio.Future[None] | None = None
        self._start_limit: asyncio.TimerHandle | None = None
        self._failed_starts = 0  # in a row
        self._was_up = False  # whether it has started once
        self.last_loss = ""  # why the program was lost last

    async def open(self) -> EpisodeProcess:
        """A process for one episode, when there is room for it. Close it afterwards."""
        await self._room.acquire()
        try:
            await self.begin()
            ours, theirs = socket.socketpair()
            with theirs:
                reader, writer = await asyncio.open_unix_connection(sock=ours, limit=LONGEST_ANSWER)
                episode = EpisodeProcess(
                    self, next(self._numbers), reader, writer, self._config.step_timeout_seconds
                )  # fmt: skip
                self._episodes[episode.number] = episode  # before the order: what comes of that is told to it
                try:
                    await self._fork(episode, theirs)
                except BaseException:
                    del self._episodes[episode.number]
                    writer.close()
                    raise
        except BaseException:
            self._room.release()
            raise
        return episode

    async def _fork(self, episode: EpisodeProcess, channel: socket.socket) -> None:
        """Order a process. The program takes one order at a time, and its queue holds some hundred."""
        while self._control is not None and not episode.lost:
            try:
                socket.send_fds(self._control, [f"fork {episode.number}".encode()], [channel.fileno()])
                return
            except BlockingIOError:
                await asyncio.sleep(QUEUE_SECONDS)
            except OSError:
                self._lost()
        raise ProgramLost

    def _kill(self, number: int) -> None:
        """Order the end of a process, at once or when the queue has room."""
        if self._control is None:
            return
        try:
            self._control.send(f"kill {number}".encode())
        except BlockingIOError:
            asyncio.get_running_loop().call_later(QUEUE_SECONDS, self._kill, number)
        except OSError:
            pass  # the program is gone, and its episodes with it

    async def begin(self) -> None:
        """Start the program, unless it runs. UserError if it cannot run, or cannot import the classes."""
        for _ in range(FAILED_STARTS):
            ready = self._ready
            if ready is None:
                ready = self._ready = asyncio.get_running_loop().create_future()
                try:
                    self._start()
                except OSError as error:
                    self._unusable(f"{self._program_name()} cannot run the environments: {error}")
            try:
                await asyncio.shield(ready)
                return
            except ProgramLost:
                if self._was_up and self._failed_starts:
                    await asyncio.sleep(AGAIN_SECONDS)
        raise UserError(
            f"{self._program_name()} ended {FAILED_STARTS} times before the environments were ready{self._printed()}"
        )

    def _printed(self) -> str:
        """The last lines of its output, as a part of a message; "" if there are none."""
        words = self.log.last_words()
        return f". Its output ends with: {words}" if words else ""

    def _program_name(self) -> str:
        other = self._config.interpreter
        return f'environment.interpreter = "{other}"' if other else "the program of the environments"

    def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._output, printing = os.pipe()
        os.set_blocking(self._output, False)
        with suppress(OSError, AttributeError):  # Linux: an environment that prints much waits less for the trainer
            fcntl.fcntl(self._output, fcntl.F_SETPIPE_SZ, OUTPUT_BYTES)
        self.log.tail = b""  # what an earlier program has printed is not this one's last word
        with theirs, open(printing, "wb") as printed:
            self._process = subprocess.Popen(
                self._command(theirs.fileno()),
                stdin=subprocess.DEVNULL, stdout=printed, stderr=printed,
                pass_fds=(theirs.fileno(),), start_new_session=True,
                env=inherited(self._config.variables) | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
            )  # fmt: skip
        self._control = ours
        self._start_limit = asyncio.get_running_loop().call_later(START_SECONDS, self._too_slow)
        with suppress(BrokenPipeError, ConnectionResetError):  # it has ended already, which `_hear` finds out
            ours.send(encode_setup(self._setup))
        ours.setblocking(False)
        asyncio.get_running_loop().add_reader(ours, self._hear)
        asyncio.get_running_loop().add_reader(self._output, self._read_output)

    def _read_output(self) -> bool:
        """Log what was printed; whether there may be more of it."""
        assert self._output is not None
        try:
            data = os.read(self._output, OUTPUT_BYTES)
        except BlockingIOError:
            return False
        if data:
            self.log.write(data)
        else:
            with suppress(RuntimeError):  # it is read for the last time, outside of the loop
                asyncio.get_running_loop().remove_reader(self._output)
        return bool(data)

    def _command(self, descriptor: int) -> list[str]:
        """A Python of another virtual environment has packages of its own: our package and the working directory come
        behind these."""
        other = self._config.interpreter
        own = str(Path(__file__).resolve().parents[2])
        path = [own, os.getcwd()] if other else _search_path()
        return [other or sys.executable, "-c", _PROGRAM, json.dumps(path), str(descriptor), "" if other else "own"]

    def _hear(self) -> None:
        """What the program tells."""
        assert self._control is not None and self._ready is not None
        try:
            data = self._control.recv(LARGEST_PACKET)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        try:
            message = json.loads(data) if data else None
        except ValueError:
            message = None
        if not isinstance(message, dict):
            self._lost()
        elif "failed" in message:
            self._unusable(f"environment.classes: {message['failed']}")
        elif "unfit" in message:
            self._unusable(
                f"{self._program_name()} cannot import megatron_srpo.environments: {clause(message['unfit'])}. Install "
                "what is missing there, or name the Python of another virtual environment"
            )
        elif "lost" in message:
            self._lost(str(message["lost"]), str(message.get("said", "")))
        elif "ready" in message:
            self._failed_starts, self._was_up = 0, True
            self._end_start_limit()
            if not self._ready.done():
                self._ready.set_result(None)
        elif (episode := self._episodes.get(message.get("ended", -1))) is not None:
            episode.ended(str(message.get("how", "")))

    def _too_slow(self) -> None:
        """The program has had START_SECONDS to start."""
        self._unusable(
            f"the environments did not start in {START_SECONDS:g} s: importing their classes, or the server that one "
            f"starts, takes too long{self._printed()}"
        )

    def _end_start_limit(self) -> None:
        if self._start_limit is not None:
            self._start_limit.cancel()
            self._start_limit = None

    def _unusable(self, why: str) -> None:
        """The program says that it cannot run the environments, and ends, or takes too long to start. If it has run
        before, the machine may be busy for a while, which is no reason to end a run."""
        ready = self._ready
        self._close_program()
        self._failed_starts += 1
        goes_on = self._was_up and self._failed_starts < FAILED_STARTS
        if goes_on:
            self._say(f"{why}. As they have run before, they are started again")
        if ready is not None and not ready.done():
            ready.set_exception(ProgramLost() if goes_on else UserError(why))

    def _lost(self, why: str = "", printed: str = "") -> None:
        """The program has ended, or talks nonsense. Its episodes are told, and the next one starts it again. `why`,
        `printed`: what it said itself, of a server that it has started."""
        ready = self._ready
        how = self._close_program()
        if not why:
            why, printed = f"the program in which environments run was lost ({how})", self._printed()
        self.last_loss = why + printed
        for episode in list(self._episodes.values()):
            episode.lost = True
            episode.ended("the program of the environments was lost")
        if ready is not None and not ready.done():
            self._failed_starts += 1
            wrong: Exception = ProgramLost()
            if self._failed_starts >= FAILED_STARTS:
                wrong = UserError(
                    f"{self._program_name()} ended at once, or while it imported environment.classes"
                    + (
                        "; is it a Python, and of a version that has these packages?"
                        if self._config.interpreter
                        else ""
                    )
                    + self._printed()
                )
            ready.set_exception(wrong)
        else:
            self._say(f"{why}; it is started again, and its episodes with it{printed}")

    def end(self, episode: EpisodeProcess, *, at_once: bool) -> None:
        """End an episode's process, and forget it. Unless `at_once`, it ends by itself after its environment's `close`,
        which has CLOSE_SECONDS; its place is free afterwards."""
        if episode.gone or at_once:
            if not episode.gone:
                self._kill(episode.number)
            self._forget(episode)
            return
        limit = asyncio.get_running_loop().call_later(CLOSE_SECONDS, self._kill, episode.number)

        def ended(how: asyncio.Future[str]) -> None:
            limit.cancel()
            self._forget(episode)

        episode.how.add_done_callback(ended)

    def _forget(self, episode: EpisodeProcess) -> None:
        if self._episodes.pop(episode.number, None) is not None:
            self._room.release()

    def _close_program(self) -> str:
        """End the program, if there is one. Returns how it has ended."""
        how = "it did not start"
        self._end_start_limit()
        if self._control is not None:
            with suppress(RuntimeError, ValueError):
                asyncio.get_running_loop().remove_reader(self._control)
            self._control.close()
        if self._process is not None:
            how = "it does not answer"
            with suppress(subprocess.TimeoutExpired):  # it ends by itself, and its episodes with all that they started
                how = exit_words(self._process.wait(END_SECONDS))
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        if self._output is not None:
            for _ in range(LAST_READS):
                if not self._read_output():
                    break
            with suppress(RuntimeError, ValueError):
                asyncio.get_running_loop().remove_reader(self._output)
            os.close(self._output)
        self._control = self._process = self._ready = self._output = None
        return how

    def close(self) -> None:
        """End the program and all episodes."""
        self._close_program()
        self.log.close()


class EpisodeProcess:
    """The process of one episode. Every failure of it is an EpisodeError."""

    def __init__(
        self, pool: EnvironmentPool, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter,
        timeout_s: float,
    ) -> None:  # fmt: skip
        self.number, self.lost, self.gone = number, False, False
        self._pool, self._reader, self._writer, self._timeout = pool, reader, writer, timeout_s
        self._waits, self._closed = True, False  # _waits: for an order, as it has answered the last one
        self.how: asyncio.Future[str] = asyncio.get_running_loop().create_future()  # in words, when it has ended

    async def start(self, kind: str, task: Task) -> Started:
        """Make the environment, and get its first messages."""
        answer = await self._ask((kind, vars(task)))
        messages = list(task.messages) if answer.get("messages") is None else _messages(answer)
        if not any(message["role"] == "user" for message in messages) or messages[-1]["role"] == "assistant":
            raise EpisodeError("garbage: its first messages have none of the user's, or end with the assistant's")
        tools = answer.get("tools")
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise EpisodeError("garbage: expected a list of JSON schemas as tools")
        return Started(messages, tools)

    async def step(self, reply: str) -> Step:
        """What the environment answers to a turn."""
        answer = await self._ask(reply)
        step = Step(
            _messages(answer), answer.get("done") is True, _reward(answer.get("reward")),
            _text(answer.get("feedback")), _count(answer.get("tool_calls")), _count(answer.get("tool_errors")),
            _text(answer.get("turn_feedback")),
        )  # fmt: skip
        if not step.done and not step.messages:
            raise EpisodeError("garbage: neither a message nor the end of the episode")
        return step

    async def _ask(self, message: object) -> dict[str, Any]:
        self._waits = False
        try:
            async with asyncio.timeout(self._timeout):
                self._writer.write(encode(message))
                await self._writer.drain()
                line = await self._reader.readline()
        except TimeoutError:
            raise EpisodeError(f"time-out after {self._timeout:g} s (environment.step_timeout_seconds)") from None
        except ValueError:
            raise EpisodeError(f"garbage: an answer of more than {LONGEST_ANSWER} bytes") from None
        except OSError:
            line = b""
        if not line.endswith(b"\n"):
            raise await self._crash()
        self._waits = True
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise EpisodeError(f"garbage: {line[:80]!r}")
        if "error" in answer:
            if answer.get("served"):  # the failure may be that a server has ended, which is about to be told
                with suppress(TimeoutError):
                    await asyncio.wait_for(asyncio.shield(self.how), SERVER_SECONDS)
                if self.lost:
                    raise ProgramLost
            raise EpisodeError(str(answer["error"])[:1000].encode("utf-8", "backslashreplace").decode())
        return answer

    async def _crash(self) -> Exception:
        try:
            how = await asyncio.wait_for(asyncio.shield(self.how), 5)
        except TimeoutError:
            how = "it has closed its channel"
        return ProgramLost() if self.lost else EpisodeError(f"crash: {how}")

    def ended(self, how: str) -> None:
        """Its process has ended."""
        self.gone = True
        if not self.how.done():
            self.how.set_result(how)

    async def close(self) -> None:
        """End the process, after its environment's `close` if it waits for an order. It may be called again."""
        if not self._closed:
            self._closed = True
            self._writer.close()
            self._pool.end(self, at_once=not self._waits)


def encode_setup(setup: Setup) -> bytes:
    """The first message to the program. UserError if it is too long."""
    body = encode(setup)[8:]
    if len(body) > LARGEST_PACKET:
        raise UserError(
            f"environment.arguments: {len(body)} bytes, expected at most {LARGEST_PACKET}; name a file instead"
        )
    return body


def _messages(answer: Mapping[str, Any]) -> list[Message]:
    found = answer.get("messages")
    if not isinstance(found, list):
        raise EpisodeError(f"garbage: expected a list of messages, got {type(found).__name__}")
    messages = []
    for message in found:
        if not isinstance(message, dict) or message.get("role") not in ("system", "user", "assistant", "tool"):
            raise EpisodeError(
                'garbage: expected a message {"role": "user", "tool", "system" or "assistant", "content": text}, got '
                f"{str(message)[:80]!r}"
            )
        content = _text(message.get("content"))
        if content is None:
            raise EpisodeError("garbage: a message without content")
        messages.append({"role": message["role"], "content": content})
    return messages


def _text(value: object) -> str | None:
    """A text that tokenizers and files can express."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise EpisodeError(f"garbage: expected text, got {type(value).__name__}")
    if len(value) > LONGEST_TEXT:
        value = f"{value[:LONGEST_TEXT]}\n[… {len(value) - LONGEST_TEXT} characters …]"
    return value.replace("\x00", "\\x00").encode("utf-8", "backslashreplace").decode()


def _reward(value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or (
        abs(value) > LARGEST_REWARD
    ):  # fmt: skip
        raise EpisodeError(f"garbage: expected a finite number as reward, got {str(value)[:40]}")
    return float(value)


def _count(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31 else 0


def _search_path() -> list[str]:
    """The trainer's module search path, and the working directory, where users keep their environments."""
    here = os.getcwd()
    path = list(dict.fromkeys(os.path.abspath(entry or here) for entry in sys.path))
    return path if here in path else [*path, here]
