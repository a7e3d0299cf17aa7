"""The environment "openenv": a server of OpenEnv (openenv 0.10), reset and stepped over its WebSocket.

Every episode is a session of its own. The library is needed where the server runs, not here. The server runs already
(`url`), or each engine starts one for its episodes (`command`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Annotated, Any
from urllib.parse import urlsplit

import aiohttp
from pydantic import AfterValidator, validate_call

from megatron_srpo.core.errors import UserError
from megatron_srpo.core.text import after_thinking, clause
from megatron_srpo.environments.base import Environment, Message, Step, Task
from megatron_srpo.environments.server import HOST, start_server

_PORTS: dict[tuple[str, ...], int] = {}  # of the servers that were started, by command


def _address(url: str) -> str:
    try:
        parts = urlsplit(url)
        fine = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # the port is no number
        fine = False
    if url and not fine:
        raise ValueError("expected an address as http://HOST:PORT")
    return url


Address = Annotated[str, AfterValidator(_address)]


class _Refused(Exception):
    """The server does not accept an action or a reset; str() is its reason."""


class OpenEnv(Environment):
    """One session. `url`: of the server, http://HOST:PORT. `command`: starts one instead; "{port}" in it stands for the
    port of loopback that it should use. `action`: the field of its action that gets the reply's
    text; "" if the reply is the whole action as JSON. `observation`: the field of its observation that the model reads;
    "" for all of it as JSON. `options`: what a reset is given beside the seed and the row's field "reset"."""

    @validate_call
    def __init__(
        self, url: Address = "", action: str = "", observation: str = "", options: dict[str, Any] | None = None,
        command: list[str] = [],  # noqa: B006
    ) -> None:  # fmt: skip
        if bool(url) == bool(command):
            raise UserError(
                'environment openenv: expected either url = "http://HOST:PORT" or command = ["…", "{port}"]'
            )
        if command and not any("{port}" in word for word in command):
            raise UserError(
                f'environment openenv: command = {command}: expected "{{port}}" in it, for the server\'s port'
            )
        self._url = f"http://{HOST}:{_PORTS.get(tuple(command), 0)}" if command else url.rstrip("/")
        self._action, self._observation, self._options = action, observation, options or {}
        self._closing = AsyncExitStack()
        self._return: float | None = None  # the sum of the rewards so far: the server gives that of each step

    @classmethod
    def prepare(cls, **arguments: Any) -> None:
        """Start the server, if that is asked for."""
        command = tuple(arguments.get("command") or ())
        if command and command not in _PORTS:
            _PORTS[command] = start_server(command)

    async def start(self, task: Task) -> Sequence[Message]:
        # trust_env stays off: a proxy is not meant for it
        session = await self._closing.enter_async_context(aiohttp.ClientSession())
        self._socket = await self._connect(session)
        self._closing.push_async_callback(self._socket.close)
        given = task.metadata.get("reset")
        data = {"seed": task.seed % 2**31, **self._options, **(given if isinstance(given, Mapping) else {})}
        try:
            observation, _, _ = await self._ask("reset", data)
        except _Refused as error:
            raise UserError(
                f"the OpenEnv server at {self._url} refuses the reset: {clause(error)}. Correct options, or the row's "
                "reset"
            ) from None
        return [*task.messages[:-1], {**task.messages[-1], "content": f"{task.messages[-1]['content']}\n{observation}"}]

    async def _connect(self, session: aiohttp.ClientSession) -> aiohttp.ClientWebSocketResponse:
        """A session of the server. UserError if there is none at the address."""
        place = f"expected an OpenEnv server at {self._url}"
        try:
            return await session.ws_connect(f"{self._url}/ws", max_msg_size=2**20)
        except aiohttp.WSServerHandshakeError as error:
            raise UserError(
                f"{place}, but {self._url}/ws answers with status {error.status} and opens no WebSocket; url must be "
                "the address before /ws"
            ) from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise UserError(f"{place}, but it cannot be reached ({_why(error)}); start it, or correct url") from error

    async def step(self, reply: str) -> Step:
        text = after_thinking(reply).strip()
        try:
            action = {self._action: text} if self._action else json.loads(text)
        except ValueError as error:
            wrong = f"Error: an action must be JSON: {clause(error)}."
            return Step([{"role": "user", "content": wrong}], feedback=wrong, tool_calls=1, tool_errors=1)
        try:
            observation, reward, done = await self._ask("step", action)
        except _Refused as error:  # the model may try another
            wrong = f"Error: {str(error)[:500]}"
            return Step([{"role": "user", "content": wrong}], feedback=wrong, tool_calls=1, tool_errors=1)
        if reward is not None:
            self._return = (self._return or 0.0) + reward
        return Step([{"role": "user", "content": observation}], done, self._return, tool_calls=1)

    async def _ask(self, kind: str, data: object) -> tuple[str, float | None, bool]:
        """Observation as text, reward and whether it is over. _Refused for what the server refuses, UserError if it
        does not answer as an OpenEnv server does."""
        answer = await self._answer({"type": kind, "data": data})
        try:
            found = answer["data"]
            if answer["type"] == "error":
                raise _Refused(found.get("message", "the server refuses it"))
            reward, done = found.get("reward"), bool(found.get("done"))
            reward = None if reward is None else float(reward)
            last = done and kind == "step"  # nobody reads its observation, which may be missing
            observation = found.get("observation")
            if observation is None:
                if not last:
                    raise KeyError("observation")
                observation = {}
            fields = ", ".join(observation) if self._observation else ""
            text = (
                observation.get(self._observation) if self._observation else json.dumps(observation, ensure_ascii=False)
            )
        except (AttributeError, KeyError, TypeError, ValueError):
            raise UserError(
                f"expected observation, reward and done from the OpenEnv server at {self._url} after a {kind}, got "
                f"{str(answer)[:200]}"
            ) from None
        if text is None and not last:
            raise UserError(
                f"expected {self._observation!r} in the observation of the OpenEnv server at {self._url} after a "
                f"{kind}, got {fields[:200] or 'no field'}. Correct observation, or leave it out: the model "
                "then reads all of it as JSON"
            )
        return "" if text is None else str(text), reward, done

    async def _answer(self, message: dict[str, object]) -> Any:
        """The server's answer to a message, from JSON."""
        try:
            await self._socket.send_json(message)
            answer = await self._socket.receive()
        except (aiohttp.ClientError, OSError) as error:
            raise UserError(f"the OpenEnv server at {self._url} is lost: {_why(error)}") from error
        if answer.type is not aiohttp.WSMsgType.TEXT:
            raise UserError(f"the OpenEnv server at {self._url} has ended the session ({answer.type.name})")
        try:
            return json.loads(answer.data)
        except (ValueError, RecursionError):
            raise UserError(
                f"expected JSON from the OpenEnv server at {self._url}, got {answer.data[:200]!r}"
            ) from None

    async def close(self) -> None:
        await self._closing.aclose()


def _why(error: Exception) -> str:
    """The system's words for a failed connection, without aiohttp's."""
    if isinstance(error, OSError) and (error.errno or 0) > 0:
        return os.strerror(error.errno or 0)
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
