"""The environment "verifiers": v1 environments of the library verifiers (pinned in requirements/verifiers.txt).

A v1 environment wants an OpenAI-compatible endpoint: its program asks for a completion and decides what comes next.
Here the episode is that endpoint, on loopback. A request waits until the policy has replied, and what is new in the
next request is what the environment answers. Tasks, tools, users and rewards of the library run as they are, and tokens
stay ours.

    policy ◄─ messages ─ start, step ◄─ request ── /v1/chat/completions ◄── verifiers: taskset, agents, tools, rewards
           ── reply ──►              ── response ─►

The library's dependencies do not fit beside vLLM's: `environment.interpreter` names the Python that has it.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError, validate_call

from megatron_srpo.core.errors import UserError
from megatron_srpo.core.text import after_thinking, clause
from megatron_srpo.environments.base import Environment, Message, Step, Task
from megatron_srpo.environments.tools import OPEN, read_hermes

HARNESS = "megatron_srpo_turns"  # the name under which verifiers finds our harness
_TASKS: dict[str, list[Any]] = {}  # of finite tasksets, by taskset: loaded once, before the episodes are forked


class Verifiers(Environment):
    """One episode. `taskset`: the name of an installed taskset, or of a module in the working directory. `config`: what
    verifiers' [env] block has besides the taskset's id. `feedback`: the key of the trace's `info` that says in words
    what was wrong. A row's field "task" is the number of the task, from 0."""

    @validate_call
    def __init__(self, taskset: str, config: dict[str, Any] | None = None, feedback: str = "") -> None:
        self._taskset, self._config, self._feedback = taskset, config or {}, feedback
        self._events: asyncio.Queue[_Request | Exception | None] = asyncio.Queue()  # None: verifiers is done
        self._episode: asyncio.Task[object] | None = None
        self._seen: list[tuple[str, str]] = []  # what the program's conversation was at its last request
        self._request: _Request | None = None

    @classmethod
    def prepare(cls, **arguments: Any) -> None:
        """Import the library and the taskset, and load the tasks: it takes seconds."""
        try:
            import verifiers.v1  # noqa: F401
        except ImportError as error:
            raise UserError(
                f"environment verifiers needs a package: {clause(error)}. Make a virtual environment of its own "
                "(python -m venv envs/verifiers && envs/verifiers/bin/pip install -r requirements/verifiers.txt) and "
                "name its Python: environment.interpreter"
            ) from error
        os.environ["PYTHONPATH"] = os.getcwd()  # servers of tools find a taskset there too
        taskset, config = str(arguments.get("taskset", "")), arguments.get("config") or {}
        try:
            environment = _environment(taskset, config)
            if environment.taskset.bounded:
                _TASKS[_key(taskset, config)] = list(environment.taskset)
        except ValidationError as error:
            wrong = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
            raise UserError(f"environment verifiers: config of taskset {taskset!r}: {wrong}") from error
        except Exception as error:  # a taskset may raise anything while it is imported
            raise UserError(f"environment verifiers: taskset {taskset!r}: {type(error).__name__}: {error}") from error

    async def start(self, task: Task) -> Sequence[Message]:
        from aiohttp import web

        number = task.metadata.get("task")
        if not isinstance(number, int) or isinstance(number, bool) or number < 0:
            raise ValueError(f'the row\'s field "task": expected the number of a task, from 0, got {number!r}')
        self._secret = secrets.token_urlsafe(16)
        app = web.Application(client_max_size=2**26)
        app.router.add_post("/v1/chat/completions", self._complete)
        self._site = web.AppRunner(app, access_log=None)
        await self._site.setup()
        await web.TCPSite(self._site, "127.0.0.1", 0).start()
        ((_, port),) = self._site.addresses
        self._episode = asyncio.create_task(self._run(number, port))
        step = await self._next()
        if step.done:
            raise RuntimeError("the environment ended before it asked the model for anything")
        assert self._request is not None
        self.tools = self._request.tools
        return step.messages

    async def step(self, reply: str) -> Step:
        assert self._request is not None, "an episode that goes on waits for a reply"
        found = read_hermes(reply) if self._request.tools else None
        self._request.response.set_result(_response(reply, found.calls if found else []))
        return await self._next(
            tool_calls=len(found.calls) + len(found.problems) if found else 0,
            tool_errors=len(found.problems) if found else 0,
        )

    async def _next(self, *, tool_calls: int = 0, tool_errors: int = 0) -> Step:
        """What verifiers wants of the model next, or the end."""
        event = await self._events.get()
        if isinstance(event, Exception):
            raise event
        if event is not None:
            self._request = event
            return Step(self._new_messages(event), tool_calls=tool_calls, tool_errors=tool_errors)
        assert self._episode is not None
        episode: Any = await self._episode  # raises what went wrong
        traces = [trace for trace in episode.traces if trace.agent.trainable]
        if not episode.ok:
            wrong = [*(error for trace in episode.traces for error in trace.errors), *episode.errors]
            raise RuntimeError(f"{wrong[-1].type}: {wrong[-1].message}" if wrong else "verifiers' episode has failed")
        if len(traces) != 1:
            raise RuntimeError(f"expected one agent that is trained, got {len(traces)}")
        words = traces[0].info.get(self._feedback) if self._feedback else None
        return Step(
            done=True, reward=float(traces[0].reward), feedback=None if words is None else str(words),
            tool_calls=tool_calls, tool_errors=tool_errors,
        )  # fmt: skip

    def _new_messages(self, request: _Request) -> list[Message]:
        """What the program has added since its last request, behind the reply to that."""
        known = len(self._seen)
        roles = [role for role, _ in request.messages]
        if request.messages[:known] != self._seen or (known and roles[known : known + 1] != ["assistant"]):
            raise RuntimeError(
                "the program has changed the conversation, or a second one runs: an episode is one conversation that "
                "only grows. Turn the harness's compaction off, and pin the model and client of the other agents"
            )
        new = request.messages[known + 1 if known else 0 :]
        self._seen = request.messages
        return [{"role": role, "content": content} for role, content in new]

    async def _run(self, number: int, port: int) -> Any:
        """verifiers' own episode."""
        import verifiers.v1 as vf

        try:
            environment = _environment(self._taskset, self._config)
            known = _TASKS.get(_key(self._taskset, self._config))
            tasks = known[number : number + 1] if known else itertools.islice(environment.taskset, number, number + 1)
            client = vf.EvalClientConfig(
                base_url=f"http://127.0.0.1:{port}/v1", headers={"x-episode": self._secret}, api_key_var="NO_KEY"
            )
            for task in tasks:
                async with environment.serving():
                    return await environment.run_episode(task, vf.ModelContext(model="policy", client=client))
            raise RuntimeError(f'the taskset {self._taskset!r} has no task {number} (the row\'s field "task")')
        finally:
            self._events.put_nowait(None)

    async def _complete(self, request: Any) -> Any:
        """The endpoint: it answers when the policy has replied."""
        from aiohttp import web

        if not secrets.compare_digest(request.headers.get("x-episode", ""), self._secret):
            raise web.HTTPUnauthorized
        try:
            asked = _Request(await request.json())
        except Exception as error:
            self._events.put_nowait(error)
            raise
        self._events.put_nowait(asked)
        completion = await asked.response
        if not asked.stream:
            return web.json_response(completion)
        stream = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await stream.prepare(request)
        for event in (json.dumps(_chunk(completion)), "[DONE]"):
            await stream.write(f"data: {event}\n\n".encode())
        return stream

    async def close(self) -> None:
        if self._episode is not None:
            self._episode.cancel()
            await asyncio.gather(self._episode, return_exceptions=True)


class _Request:
    """A request for a completion."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        self.stream = bool(body.get("stream"))
        self.messages = [(str(message["role"]), _text(message.get("content"))) for message in body["messages"]]
        self.tools: list[dict[str, Any]] = list(body.get("tools") or [])
        self.response: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()


def _text(content: object) -> str:
    """The text of a message's content, which may come in parts."""
    if isinstance(content, list):
        if any(part.get("type") != "text" for part in content):
            raise ValueError("messages with images are not supported")
        return "\n".join(part["text"] for part in content)
    return "" if content is None else str(content)


def _response(reply: str, calls: Sequence[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """A turn of the policy as an OpenAI-compatible server would send it: thinking and calls apart."""
    said = after_thinking(reply)
    message: dict[str, Any] = {"role": "assistant", "content": said.strip()}
    if said != reply:
        thought = reply.removesuffix(said).removesuffix("</think>")
        message["reasoning_content"] = thought.removeprefix("<think>").strip()
    if calls:
        message["content"] = said.partition(OPEN)[0].strip()
        message["tool_calls"] = [
            {"id": f"call_{secrets.token_hex(8)}", "type": "function",
             "function": {"name": name, "arguments": json.dumps(arguments)}}
            for name, arguments in calls
        ]  # fmt: skip
    choice = {"index": 0, "message": message, "finish_reason": "tool_calls" if calls else "stop"}
    usage = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    return {
        "id": f"chatcmpl-{secrets.token_hex(8)}", "object": "chat.completion", "created": int(time.time()),
        "model": "policy", "choices": [choice], "usage": usage,
    }  # fmt: skip


def _chunk(completion: Mapping[str, Any]) -> dict[str, Any]:
    """A whole completion as the only chunk of a stream."""
    (choice,) = completion["choices"]
    message = dict(choice["message"])
    if "tool_calls" in message:
        message["tool_calls"] = [{"index": i, **call} for i, call in enumerate(message["tool_calls"])]
    delta = {"index": 0, "delta": message, "finish_reason": choice["finish_reason"]}
    return {**completion, "object": "chat.completion.chunk", "choices": [delta]}


def _key(taskset: str, config: Mapping[str, Any]) -> str:
    return json.dumps([taskset, config], sort_keys=True, default=str)


def _environment(taskset: str, config: Mapping[str, Any]) -> Any:
    """The library's environment. Agents run on this machine, and those without a program of their own in ours."""
    from verifiers.v1.configs.agent import agent_config_fields
    from verifiers.v1.utils import loaders

    from megatron_srpo.environments import verifiers_harness

    sys.modules.setdefault(HARNESS, verifiers_harness)
    given = {**config, "taskset": {**config.get("taskset", {}), "id": taskset}}
    kind = loaders.env_config_type(taskset, given.get("id", ""))
    own_program = loaders.default_harness_id(taskset) != "bash"  # "bash" stands for none
    for name, default in agent_config_fields(kind()).items():
        role = {"runtime": {"type": "subprocess"}, **given.get(name, {})}
        if default.harness is None and not own_program:
            role.setdefault("harness", {"id": HARNESS})
        given[name] = role
    return loaders.load_environment(kind.model_validate(given))
