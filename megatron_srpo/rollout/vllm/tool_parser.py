"""vLLM's tool parsers: reads the calls of a model's turn in the format of its family."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_srpo.core.errors import UserError, nearest

ParsedCalls = tuple[list[tuple[str, dict[str, Any]]], str]  # (name, arguments) of each call, and what is wrong, or ""


def engine_tool_parser(
    name: str, tokenizer: str, tools: Sequence[Mapping[str, object]] = ()
) -> Callable[[str], ParsedCalls]:
    """The parser that vLLM knows as `name`. `tools`: the JSON schemas of functions, which say what type an argument has
    where the format does not. Importing vLLM takes seconds. UserError for an unknown name, and for a folder `tokenizer`
    without one."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.tool_parsers import ToolParserManager

    known = ToolParserManager.list_registered()
    if name not in known:
        raise UserError(f"vLLM has no tool parser {name!r}.{nearest(name, known)} Known: {', '.join(sorted(known))}")
    if not tokenizer:
        raise UserError(f'tool parser {name!r} needs the model\'s tokenizer: set "tokenizer" to its folder')
    cls = ToolParserManager.get_tool_parser(name)
    loaded = _load_tokenizer(tokenizer)
    request = ChatCompletionRequest.model_validate({"messages": [], "model": "policy", "tools": list(tools) or None})
    marks = [mark for mark in (_mark(cls, loaded, key) for key in MARKS) if mark]

    def parse(reply: str) -> ParsedCalls:
        try:
            found = cls(loaded, request.tools).extract_tool_calls(reply, request)
            calls = [(call.function.name, json.loads(call.function.arguments)) for call in found.tool_calls]
        except Exception as error:  # parsers raise what they like for broken calls
            return [], f"the call cannot be read: {type(error).__name__}: {str(error)[:200]}"
        if not all(isinstance(arguments, dict) for _, arguments in calls):
            return [], "the arguments of a call must be an object"
        if not calls and any(mark in reply for mark in marks):
            return [], "the call cannot be read; it must be valid JSON with a name and arguments"
        return calls, ""

    return parse


MARKS = ("tool_call_start_token", "bot_token", "tool_calls_start_token")  # where parsers keep how a call begins


def _load_tokenizer(folder: str) -> Any:
    from transformers import AutoTokenizer

    if not Path(folder).expanduser().is_dir():
        raise UserError(
            f"tokenizer = {folder!r}: no such folder (looked from {Path.cwd()}); expected the model's Hugging Face "
            "folder on this machine"
        )
    try:
        return AutoTokenizer.from_pretrained(
            str(Path(folder).expanduser()), local_files_only=True, trust_remote_code=False
        )  # fmt: skip
    except Exception as error:  # the library raises almost any exception for a broken folder
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"the tokenizer in {folder} cannot be loaded: {reason[:300]}") from error


def _mark(cls: type, tokenizer: Any, key: str) -> str:
    value = getattr(cls, key, None) or getattr(cls(tokenizer), key, None)
    return value if isinstance(value, str) else ""
