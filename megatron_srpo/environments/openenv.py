"""The environment "openenv": a server of OpenEnv (openenv 0.10), reset and stepped over its WebSocket.

Every episode is a session of its own. The library is needed where the server runs, not here. The server runs already
(`url`), or each engine starts one for its episodes (`command`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import aiohttp
from pydantic import StringConstraints, validate_call

from megatron_srpo.core.errors import UserError
from megatron_srpo.environments.base import Environment, Message, Step, Task
from megatron_srpo.environments.server import HOST, start_server

Address = Annotated[str, StringConstraints(pattern="^(https?://.*)?$")]
_PORTS: dict[tuple[str, ...], int] = {}  # of the servers that were started, by command


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

    @classmethod
    def prepare(cls, **arguments: Any) -> None:
        """Start the server, if that is asked for."""
        command = tuple(arguments.get("command") or ())
        if command and command not in _PORTS:
            _PORTS[command] = start_server(command)

    async def start(self, task: Task) -> Sequence[Message]:
        self._session = aiohttp.ClientSession()  # trust_env stays off: a proxy is not meant for it
        self._socket = await self._session.ws_connect(f"{self._url}/ws", max_msg_size=2**20)
        given = task.metadata.get("reset")
        data = {"seed": task.seed % 2**31, **self._options, **(given if isinstance(given, Mapping) else {})}
        observation, _, _ = await self._ask("reset", data)
        return [*task.messages[:-1], {**task.messages[-1], "content": f"{task.messages[-1]['content']}\n{observation}"}]

    async def step(self, reply: str) -> Step:
        text = reply.rpartition("</think>")[2].strip()
        try:
            action = {self._action: text} if self._action else json.loads(text)
        except ValueError as error:
            wrong = f"Error: an action must be JSON: {error}."
            return Step([{"role": "user", "content": wrong}], feedback=wrong, tool_calls=1, tool_errors=1)
        try:
            observation, reward, done = await self._ask("step", action)
        except ValueError as error:  # the server refuses this action: the model may try another
            wrong = f"Error: {str(error)[:500]}"
            return Step([{"role": "user", "content": wrong}], feedback=wrong, tool_calls=1, tool_errors=1)
        return Step([{"role": "user", "content": observation}], done, reward, tool_calls=1)

    async def _ask(self, kind: str, data: object) -> tuple[str, float | None, bool]:
        """Observation as text, reward and whether it is over. ValueError for what the server refuses."""
        await self._socket.send_json({"type": kind, "data": data})
        answer = await self._socket.receive_json()
        if answer["type"] == "error":
            raise ValueError(answer["data"].get("message", "the server refuses it"))
        found = answer["data"]
        observation = found.get("observation", {})
        text = observation.get(self._observation) if self._observation else json.dumps(observation, ensure_ascii=False)
        reward = found.get("reward")
        return str(text), None if reward is None else float(reward), bool(found.get("done"))

    async def close(self) -> None:
        await self._socket.close()
        await self._session.close()
