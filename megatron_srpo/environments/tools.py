"""The environment "tools": the model calls Python functions, and gives its answer in a turn without calls.

    [environment.classes]
    sums = "tools"
    [environment.arguments.sums]
    functions = ["my_tools.py:add", "my_tools.py:search"]

The functions' types and docstrings become the schemas that the chat template shows. Calls are read in the format of
hermes and Qwen, <tool_call>{"name": …, "arguments": {…}}</tool_call>, or by one of vLLM's tool parsers. Whatever is
wrong with a call is told to the model. Functions run in the episode's process, so a module's globals are its own.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, get_type_hints

from annotated_types import MinLen
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    PositiveInt,
    TypeAdapter,
    ValidationError,
    create_model,
    validate_call,
)

from megatron_srpo.core.errors import UserError, nearest
from megatron_srpo.core.text import after_thinking, clause
from megatron_srpo.environments.base import Environment, Message, Step
from megatron_srpo.environments.registry import load_object


def _reference(text: str) -> str:
    where, _, name = text.rpartition(":")
    if not where or not name:
        raise ValueError('expected "module:function" or "path/file.py:function"')
    return text


Reference = Annotated[str, AfterValidator(_reference)]
OWN_PARSER = "hermes"
OPEN, CLOSE = "<tool_call>", "</tool_call>"


@dataclass
class Calls:
    """What a turn of the model asks for."""

    found: list[tuple[str, dict[str, Any]] | str] = field(default_factory=list)
    """In the turn's order: (name, arguments), or a sentence on a call that cannot be read."""

    @property
    def calls(self) -> list[tuple[str, dict[str, Any]]]:
        """Those that can be read."""
        return [call for call in self.found if not isinstance(call, str)]

    @property
    def problems(self) -> list[str]:
        """What is wrong with the others."""
        return [call for call in self.found if isinstance(call, str)]


ReadCalls = Callable[[str], Calls]


def read_hermes(reply: str) -> Calls:
    """The calls of a reply, without those that it only thought of. It takes time linear in the reply's length."""
    calls, text, position = Calls(), after_thinking(reply), 0
    while (begin := text.find(OPEN, position)) >= 0:
        end = text.find(CLOSE, begin)
        if end < 0:
            calls.found.append(f"the call has no {CLOSE}")
            break
        position = end + len(CLOSE)
        calls.found.append(_read_call(text[begin + len(OPEN) : end]))
    return calls


def _read_call(text: str) -> tuple[str, dict[str, Any]] | str:
    """Name and arguments, or what is wrong."""
    try:
        call = json.loads(text)
    except (ValueError, RecursionError) as error:
        return f"the call is not valid JSON: {str(error)[:200]}"
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return 'a call must be an object {"name": …, "arguments": {…}}'
    arguments = call.get("arguments", {})
    if not isinstance(arguments, dict):
        return f"the arguments of {call['name']!r} must be an object"
    return call["name"], arguments


class Tool:
    """A Python function that the model may call."""

    def __init__(self, function: Callable[..., object]) -> None:
        self.name, self._function = function.__name__, function
        fields = _fields(function)
        self._model: type[BaseModel] = create_model(self.name, __config__=ConfigDict(extra="forbid"), **fields)

    @property
    def schema(self) -> dict[str, Any]:
        """The JSON schema that chat templates expect."""
        parameters = _without_titles(self._model.model_json_schema())
        parameters.pop("additionalProperties", None)
        description = inspect.getdoc(self._function) or ""
        function = {"name": self.name, "description": description, "parameters": parameters}
        return {"type": "function", "function": function}

    async def call(self, arguments: Mapping[str, Any]) -> str:
        """What the function returns, as text. ValidationError for arguments that do not fit its types."""
        checked = self._model.model_validate(dict(arguments))
        result = self._function(**{name: getattr(checked, name) for name in type(checked).model_fields})
        if inspect.isawaitable(result):
            result = await result
        return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)


def _fields(function: Callable[..., object]) -> dict[str, Any]:
    """By parameter: its type and default. UserError names one that a call, which is JSON, cannot give."""
    try:
        parameters, hints = inspect.signature(function).parameters, get_type_hints(function)
    except Exception as error:  # a builtin has no signature; an annotation may name what does not exist
        raise UserError(
            f"tool {function.__name__!r}: its parameters cannot be read: {type(error).__name__}: {clause(error)}. "
            "Expected a Python function whose types are defined or imported in its file"
        ) from error
    for parameter in parameters.values():
        if problem := _problem(parameter, hints, function.__module__):
            raise UserError(f"tool {function.__name__!r}: parameter {parameter.name!r} {problem}")
    return {
        name: (hints[name], ... if parameter.default is parameter.empty else parameter.default)
        for name, parameter in parameters.items()
    }


def _problem(parameter: inspect.Parameter, hints: Mapping[str, Any], module: str) -> str:
    """Why a call cannot give a parameter, and the cure; "" if it can."""
    name = parameter.name
    if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
        return "has no name that a call could give"
    if name not in hints:
        return "has no type; annotate it"
    if name.startswith("_") or (name.startswith("model_") and hasattr(BaseModel, name)):
        return "has a name that pydantic does not take; rename it"
    try:
        TypeAdapter(hints[name]).json_schema()
    except Exception:  # pydantic's, or of a class that describes itself to pydantic
        hint = hints[name]
        shown = hint.__qualname__ if isinstance(hint, type) else str(hint).replace(f"{module}.", "")
        return (
            f"has the type {shown}, which JSON cannot express; expected str, int, float, bool, list, dict, Literal, or "
            "a dataclass, TypedDict or pydantic model of these"
        )
    return ""


def _without_titles(schema: Any) -> Any:
    """pydantic's schema without the titles that it makes of names."""
    if isinstance(schema, list):
        return [_without_titles(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        name: _without_titles(part) for name, part in schema.items() if name != "title" or not isinstance(part, str)
    }  # fmt: skip


class Tools(Environment):
    """An episode with functions. `functions`: references "module:name" or "path/file.py:name". `parser`: "hermes", or a
    name of vLLM's (--tool-call-parser), which needs the `tokenizer`'s folder. `max_calls`: of one turn. `max_output`:
    characters of a result, of which the rest is left out."""

    @validate_call
    def __init__(
        self, functions: Annotated[list[Reference], MinLen(1)], parser: str = OWN_PARSER, tokenizer: str = "",
        max_calls: PositiveInt = 8, max_output: PositiveInt = 8192,
    ) -> None:  # fmt: skip
        self._tools = {tool.name: tool for tool in map(load_tool, functions)}
        self.tools = [tool.schema for tool in self._tools.values()]
        self._read = reader(parser, tokenizer, self.tools)
        self._max_calls, self._max_output = max_calls, max_output
        self._wrong: list[str] = []  # what was wrong with the calls so far: it may teach

    async def step(self, reply: str) -> Step:
        found = self._read(reply).found
        if not found:
            return Step(done=True)
        messages: list[Message] = []  # in the order of the calls, by which the model knows them
        errors = 0
        for call in found[: self._max_calls]:
            content, failed = (_error(call), True) if isinstance(call, str) else await self._call(*call)
            messages.append({"role": "tool", "content": content})
            errors += failed
        if len(found) > self._max_calls:
            content = _error(f"only the first {self._max_calls} calls of a turn are carried out")
            messages.append({"role": "tool", "content": content})
        wrong = [message["content"] for message in messages if message["content"].startswith("Error: ")]
        self._wrong += wrong
        return Step(
            messages, feedback="\n".join(self._wrong[:8]) or None, turn_feedback="\n".join(wrong[:8]),
            tool_calls=len(found), tool_errors=errors,
        )  # fmt: skip

    async def _call(self, name: str, arguments: Mapping[str, Any]) -> tuple[str, bool]:
        """A call's result as text, and whether it failed."""
        tool = self._tools.get(name)
        if tool is None:
            known = ", ".join(self._tools)
            return f"Error: there is no tool {name[:80]!r}. The tools are {known}.{nearest(name, self._tools)}", True
        try:
            result = await tool.call(arguments)
        except ValidationError as error:
            wrong = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()[:8])
            return f"Error: wrong arguments of {name}: {wrong}.", True
        except Exception as error:
            return f"Error: {type(error).__name__}: {str(error)[:500]}", True
        if len(result) > self._max_output:
            result = f"{result[: self._max_output]}\n[… {len(result) - self._max_output} characters …]"
        return result, False


def _error(problem: str) -> str:
    return f"Error: {clause(problem)}."


_LOADED: dict[str, Tool] = {}  # by reference: made once, before the episodes are forked
_READERS: dict[tuple[str, str, str], ReadCalls] = {}  # vLLM's, by name, tokenizer and tools


def load_tool(reference: str) -> Tool:
    """The tool of a reference. UserError if there is none."""
    if reference not in _LOADED:
        function = load_object(reference, "tool")
        if not inspect.isroutine(function):
            raise UserError(f"tool {reference!r}: expected a function, got {type(function).__name__}")
        _LOADED[reference] = Tool(function)
    return _LOADED[reference]


def reader(parser: str, tokenizer: str, tools: Sequence[Mapping[str, object]]) -> ReadCalls:
    """What reads calls: our own for "hermes", else vLLM's."""
    if parser == OWN_PARSER:
        return read_hermes
    key = parser, tokenizer, json.dumps(tools)
    if key not in _READERS:
        from megatron_srpo.rollout import engine_tool_parser

        parse = engine_tool_parser(parser, tokenizer, tools)

        def read(reply: str) -> Calls:
            calls, problem = parse(after_thinking(reply))  # vLLM's server takes the thinking out before, too
            return Calls([*calls, *([problem] if problem else [])])

        _READERS[key] = read
    return _READERS[key]
