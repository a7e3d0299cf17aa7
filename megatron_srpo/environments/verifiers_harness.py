"""The program that talks to the policy in an environment of verifiers: a chat loop inside the episode's process.

verifiers finds it as a plug-in by the name of its module (`verifiers.py` registers it). It does what the library's own
harness "null" does, which would need uv and install its packages at every start: it asks for a completion, carries out
the calls of the task's tools, and ends with a reply without calls. It imports the library, so nothing else imports it.
"""

from __future__ import annotations

import json
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
import verifiers.v1 as vf
from verifiers.v1.dialects.chat import message_to_wire
from verifiers.v1.harnesses.utils.mcp import call_mcp, connect_mcp

__all__ = ["TurnsHarness"]


class TurnsHarness(vf.Harness[vf.HarnessConfig]):
    """Runs no code of the model's, so it needs no container."""

    APPENDS_SYSTEM_PROMPT = SUPPORTS_MCP = SUPPORTS_RESUME = True
    EXECUTES_CODE = NEEDS_CONTAINER = False

    async def launch(
        self, ctx: vf.ModelContext, trace: vf.Trace, runtime: vf.Runtime, endpoint: str, secret: str,
        mcp_urls: dict[str, str], data: vf.TaskData,
    ) -> vf.ProgramResult:  # fmt: skip
        system, prompt = self.resolve_prompt(data)
        messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        messages += [{"role": "user", "content": prompt}] if isinstance(prompt, str) else []
        messages += map(message_to_wire, prompt if isinstance(prompt, list) else [])
        servers = {name: {"url": url, "timeout": self.config.tool_timeout} for name, url in mcp_urls.items()}
        async with AsyncExitStack() as stack:
            client = await stack.enter_async_context(
                aiohttp.ClientSession(
                    headers={"Authorization": f"Bearer {secret}"}, timeout=aiohttp.ClientTimeout(total=None),
                    raise_for_status=True,
                )
            )  # fmt: skip
            tools, places, connections = await connect_mcp({"mcpServers": servers}, stack)
            body = {"model": ctx.model, "messages": messages, **({"tools": tools} if tools else {})}
            while True:
                async with client.post(f"{endpoint.rstrip('/')}/chat/completions", json=body) as response:
                    reply = (await response.json())["choices"][0]["message"]
                messages.append(reply)
                if not reply.get("tool_calls"):
                    return vf.ProgramResult(exit_code=0, stdout="", stderr="")
                for call in reply["tool_calls"]:
                    content = await self._call(call["function"], places, connections)
                    messages.append({"role": "tool", "tool_call_id": call["id"], "content": content})

    async def _call(
        self, call: dict[str, str], places: dict[str, tuple[str, str]], connections: dict[str, Any]
    ) -> Any:  # fmt: skip
        """What a tool returns, or what is wrong with the call."""
        name = call["name"]
        if name not in places:
            return f"Error: there is no tool {name[:80]!r}. The tools are {', '.join(places)}."
        return await call_mcp(connections, places, name, json.loads(call["arguments"]))
