"""HTTP to one rollout server, whatever engine it runs, and the three ways in which a call can fail."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any

import aiohttp

# Idle connections are closed here before the server closes them, which vLLM's does after 5 s: a request on a connection
# that is just being closed fails, and its server would count as lost.
IDLE_SECONDS = 2.0


class ServerError(Exception):
    """No usable answer: the server is dead, hangs, is broken or too slow. Another may answer the same request."""


class BadAnswer(ServerError):
    """The server answered with something else than what was asked for."""


class UnacceptableRequest(Exception):
    """The server refuses the request itself (status 4xx). No other server will take it either."""


class HttpClient:
    """JSON over HTTP to one server. All calls belong to one event loop. Time-outs are in seconds."""

    def __init__(self, url: str, token: str, *, request_timeout_s: float, control_timeout_s: float) -> None:
        self.url = url
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._request_timeout, self._control_timeout = request_timeout_s, control_timeout_s
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def call(
        self, method: str, path: str, *, body: Mapping[str, object] | None = None, timeout: float | None = None,
        **query: str,
    ) -> Any:  # fmt: skip
        """The JSON of the answer. Raises ServerError, and UnacceptableRequest for a status 4xx."""
        data = await self.fetch(method, path, body=body, timeout=timeout, **query)
        try:
            return json.loads(data) if data else None
        except ValueError as error:
            raise BadAnswer(f"{path}: expected JSON, got {data[:80]!r}") from error

    async def fetch(
        self, method: str, path: str, *, body: Mapping[str, object] | None = None, timeout: float | None = None,
        **query: str,
    ) -> bytes:  # fmt: skip
        """The bytes of the answer. Raises ServerError, and UnacceptableRequest for a status 4xx."""
        if self._session is None:
            # trust_env stays off: a proxy of the environment is not meant for our own servers.
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_SECONDS)
            self._session = aiohttp.ClientSession(connector=connector, headers=self._headers)
        limit = aiohttp.ClientTimeout(total=timeout or self._control_timeout)
        try:
            async with self._session.request(
                method, f"{self.url}{path}", json=body, params=query or None, timeout=limit
            ) as response:
                data = await response.read()
        except TimeoutError as error:
            raise ServerError(f"no answer to {path} within {limit.total:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise ServerError(f"{path}: {type(error).__name__} {error}".strip()) from error
        said = data[:300].decode(errors="replace")
        if 400 <= response.status < 500:
            raise UnacceptableRequest(f"{path}: status {response.status}, {said}")
        if response.status != 200:
            raise ServerError(f"{path}: status {response.status}, {said}")
        return data


async def results_or_errors(calls: Sequence[Awaitable[object]]) -> list[object]:
    """The results of simultaneous calls to several servers, in order; a call that fails gives its exception."""
    return await asyncio.gather(*calls, return_exceptions=True)
