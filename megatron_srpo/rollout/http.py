"""What is said to one vLLM server, and what counts as an answer."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable
from typing import Any

import aiohttp

from megatron_srpo.core.records import Rollout
from megatron_srpo.rollout.engine import GenerateRequest, SamplingSettings
from megatron_srpo.rollout.server_process import MODEL_NAME

NOT_FINITE = -9999.0  # what vLLM's server puts in place of a log-prob that JSON cannot carry
UNPUBLISHED = "default"  # vLLM's version of weights that came from a folder


class ServerError(Exception):
    """No usable answer: the server is dead, hanging, broken or too slow. Another may answer the same request."""


class BadAnswer(ServerError):
    """It answered with something else than what was asked for."""


class UnacceptableRequest(Exception):
    """It refuses the request itself (a 4xx): no other server will take it either."""


class ServerClient:
    """HTTP to one server. Used in one event loop."""

    def __init__(self, url: str, token: str, *, request_timeout_s: float, control_timeout_s: float) -> None:
        self.url = url
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._request_timeout, self._control_timeout = request_timeout_s, control_timeout_s
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def call(
        self, method: str, path: str, *, body: Any = None, timeout: float | None = None, **query: Any
    ) -> Any:
        """The JSON of the answer. Raises ServerError, UnacceptableRequest for a 4xx."""
        if self._session is None:
            # trust_env off: a proxy of the environment is not for our own servers.
            self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), headers=self._headers)
        limit = aiohttp.ClientTimeout(total=timeout or self._control_timeout)
        try:
            async with self._session.request(
                method, f"{self.url}{path}", json=body, params=query or None, timeout=limit
            ) as response:
                text = await response.text()
        except TimeoutError as error:
            raise ServerError(f"no answer to {path} within {limit.total:g} s") from error
        except (aiohttp.ClientError, OSError, UnicodeDecodeError) as error:
            raise ServerError(f"{path}: {type(error).__name__} {error}".strip()) from error
        if 400 <= response.status < 500:
            raise UnacceptableRequest(f"{path}: status {response.status}, {text[:300]}")
        if response.status != 200:
            raise ServerError(f"{path}: status {response.status}, {text[:300]}")
        try:
            return json.loads(text) if text else None
        except ValueError as error:
            raise BadAnswer(f"{path}: expected JSON, got {text[:80]!r}") from error

    async def health(self, timeout: float) -> None:
        await self.call("GET", "/health", timeout=timeout)

    async def world_size(self, timeout: float) -> int:
        """Workers of the engine. The first question to a server: it also shows that it is one."""
        found = await self.call("GET", "/get_world_size", timeout=timeout)
        if not isinstance(found, dict) or not isinstance(found.get("world_size"), int):
            raise BadAnswer(f"/get_world_size: expected a number, got {str(found)[:80]}")
        return found["world_size"]

    async def weight_version(self) -> int | None:
        """0: the folder's weights. None: of an earlier publish, whose weights are anybody's guess."""
        found = await self.call("GET", "/weight_info")
        return 0 if isinstance(found, dict) and found.get("weight_version") == UNPUBLISHED else None

    async def generate(
        self, request: GenerateRequest, sampling: SamplingSettings, salt: str, decode: Callable[[list[int]], str]
    ) -> Rollout | None:
        """One response; None when the server aborted it."""
        body = {
            "model": MODEL_NAME,
            "token_ids": request.token_ids,
            "cache_salt": salt,
            "sampling_params": {
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k,
                "max_tokens": sampling.max_tokens,
                "ignore_eos": sampling.ignore_eos,
                "seed": request.seed,
                "logprobs": 0,
                "detokenize": False,
            },
        }
        answer = await self.call("POST", "/inference/v1/generate", body=body, timeout=self._request_timeout)
        return read_answer(answer, request, sampling, decode)


def read_answer(
    answer: Any, request: GenerateRequest, sampling: SamplingSettings, decode: Callable[[list[int]], str]
) -> Rollout | None:
    """The rollout in a server's JSON, None for an aborted one. Raises BadAnswer for anything that is not one."""
    try:
        (choice,) = answer["choices"]
        ids, reason = choice["token_ids"], choice["finish_reason"]
        if reason == "abort":
            return None
        content = choice["logprobs"]["content"]
        if [entry["token_id"] for entry in content] != ids:
            raise ValueError("the log-probs are of other tokens")
        logprobs = [math.nan if entry["logprob"] <= NOT_FINITE else float(entry["logprob"]) for entry in content]
        versions = _versions(choice["weight_versions"], len(ids))
        if reason not in ("stop", "length") or not 0 < len(ids) <= sampling.max_tokens:
            raise ValueError(f"{len(ids)} tokens, finish_reason {reason!r}")
        text = decode(ids)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, IndexError) as error:
        raise BadAnswer(f"not an answer to what was asked ({error}): {str(answer)[:200]}") from error
    return Rollout(
        request.prompt, request.sample, ids, logprobs, text, reason, min(versions), token_versions=versions
    )  # fmt: skip


def _versions(spans: Any, tokens: int) -> list[int]:
    """The weights' version of each token."""
    versions: list[int] = []
    for span in spans:
        label = span["version"]
        if span["start"] != len(versions):
            raise ValueError("weight versions with a gap")
        versions += [0 if label == UNPUBLISHED else int(label)] * (span["end"] - span["start"])
    if len(versions) != tokens:
        raise ValueError(f"weight versions of {len(versions)} of {tokens} tokens")
    return versions


async def everywhere(calls: list[Any]) -> list[Exception | Any]:
    """The results of calls to several servers, failures among them in place of a result."""
    return await asyncio.gather(*calls, return_exceptions=True)
