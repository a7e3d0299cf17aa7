"""Every route of an engine's server asks for a token of this run, and one route more is there: see answers.py.

vLLM's own key covers some paths only. The development routes, which can replace the weights, are not among them.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

TOKEN_VARIABLE = "MEGATRON_SRPO_ENGINE_TOKEN"
REFUSED = b'{"error": "this server belongs to a training run: its token is missing or wrong"}'

# The three types of the ASGI specification.
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class TokenMiddleware:
    """ASGI middleware that answers 401 to a request without the right bearer token.

    The token comes in an environment variable, which the machine's other users cannot read as they can read command
    lines. Without a token the server does not start.
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._app = app
        token = os.environ.get(TOKEN_VARIABLE, "")
        if not token:
            raise RuntimeError(f"{TOKEN_VARIABLE} is not set: the server would obey anybody")
        self._expected = f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" and "app" in scope:  # the server starts
            from megatron_srpo.rollout.vllm.answer_route import install

            install(scope["app"])
        if scope["type"] == "lifespan" or self._is_allowed(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(REFUSED)).encode())]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": REFUSED})
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _is_allowed(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        return len(given) == 1 and hmac.compare_digest(given[0], self._expected)
