"""The environment "python": the model writes Python, given tests run it in a sandbox, and what failed is the feedback.

A row's `answer` has the tests, one of

    [{"call": "add(1, 2)", "expected": 3}, …]            the value of an expression; JSON values
    [{"input": "1 2\\n", "output": "3\\n"}, …]             what a program prints; ends of lines may differ
    ["assert add(1, 2) == 3", …]                         statements that must not raise

The expected values and outputs never enter the sandbox. Statements do, so a program that looks for them can pass them
without solving the task: prefer the other forms.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import DirectoryPath, PositiveFloat, PositiveInt, validate_call

from megatron_srpo.core.errors import UserError
from megatron_srpo.core.text import after_thinking
from megatron_srpo.environments import sandbox
from megatron_srpo.environments.base import Environment, Message, Step, Task
from megatron_srpo.environments.sandbox import Isolation, Limits

_FENCE = re.compile(r"^(`{3,})([^`\n]*)(?:\n|\Z)", re.MULTILINE)  # a line
LANGUAGES = ("py", "python", "python3")  # in any case
SHOWN = 200  # characters of a value in a feedback


@dataclass(frozen=True)
class Test:
    """One test. `how`: "value", "output" or "statement"."""

    how: str
    text: str  # the expression, the input or the statement
    expected: Any = None

    def judge(self, fact: dict[str, Any] | None, ended: str) -> str | None:
        """What is wrong, in words; None if it passes. `fact`: what the runner told of it, None if it told nothing."""
        name = (
            f"with the input {_short(self.text)} the program"
            if self.how == "output"
            else _short(self.text, quote=False)
        )
        if fact is None:
            return f"{name} had no result: {ended or 'the program ended before'}"
        if "error" in fact:
            return f"{name} raised {str(fact['error'])[:500]}"
        value = fact.get("value")
        if self.how == "statement":
            return None
        if self.how == "output":
            if isinstance(value, str) and _lines(value) == _lines(self.expected):
                return None
            return f"{name} printed {_short(value)}, expected {_short(self.expected)}"
        return (
            None
            if _same(value, self.expected)
            else f"{name} returned {_short(value)}, expected {_short(self.expected)}"
        )


def read_tests(answer: object) -> list[Test]:
    """The tests of a row's answer. ValueError for anything else."""
    if isinstance(answer, str):
        try:
            answer = json.loads(answer)
        except ValueError:
            answer = [answer]
    tests = []
    for one in answer if isinstance(answer, list) else []:
        if isinstance(one, str):
            tests.append(Test("statement", one))
        elif isinstance(one, dict) and isinstance(one.get("call"), str) and "expected" in one:
            tests.append(Test("value", one["call"], one["expected"]))
        elif isinstance(one, dict) and isinstance(one.get("input"), str) and isinstance(one.get("output"), str):
            tests.append(Test("output", one["input"], one["output"]))
        else:
            raise ValueError(f"expected a test, got {str(one)[:80]!r}")
    if not tests or (len({test.how == "output" for test in tests}) > 1):
        raise ValueError("expected a list of tests as answer: calls and statements, or inputs with outputs")
    for test in tests:
        if test.how != "output":
            try:
                compile(test.text, "test", "eval" if test.how == "value" else "exec")
            except (SyntaxError, ValueError) as error:
                raise ValueError(f"the test {test.text[:80]!r} is no Python: {error}") from None
    return tests


def limits_of(tests: Sequence[Test], limits: Limits) -> Limits:
    """`limits`, with room for twice what the tests expect. The code can look at `value_kib`, so that grows in large
    steps: the length of a short output would tell "yes" from "no"."""
    sizes = [2 * len(json.dumps(test.expected)) for test in tests]
    facts = 128 * len(sizes)  # bytes; what the runner writes around a value
    return replace(
        limits,
        output_kib=limits.output_kib + (sum(sizes) + facts) // 1024,
        value_kib=limits.value_kib * (1 + max(sizes) // (limits.value_kib * 1024)),
    )


def read_code(reply: str, *, fence: bool) -> str | None:
    """The code of a reply: its last block of Python in a fence, or without `fence` all of it, thinking left out. Blocks
    without a language are read only if none is said to be Python: such a block often shows what the code prints."""
    text = after_thinking(reply)
    if not fence:
        return text
    python, nameless, begun = None, None, None  # begun: the fence that has opened a block
    for fence_line in _FENCE.finditer(text):
        if begun is not None and len(fence_line[1]) < len(begun[1]):
            continue  # a part of the block
        if begun is None or fence_line[2].rstrip().isalnum():  # a block that was not closed ends where another begins
            begun = fence_line
            continue
        language, content = begun[2].strip().partition(" ")[0].lower(), text[begun.end() : fence_line.start()]
        if language in LANGUAGES:
            python = content
        elif not language:
            nameless = content
        begun = None
    return nameless if python is None else python


class PythonCode(Environment):
    """An episode of one or several attempts. `attempts`: turns in which the model may mend its code. `partial`: the
    reward is the share of tests that pass, not 1 for all and 0 else. `fence`: code must be in a ``` block. `seconds`,
    `memory_mib`, `processes`, `file_mib`: limits of one run. `isolation`: see sandbox.py. `folders`: that the code may
    read, besides Python's."""

    @validate_call
    def __init__(
        self, attempts: PositiveInt = 1, partial: bool = False, fence: bool = True, seconds: PositiveFloat = 5.0,
        memory_mib: PositiveInt = 512, processes: PositiveInt = 8, file_mib: PositiveInt = 16,
        isolation: Isolation = "auto", folders: list[DirectoryPath] = [], shown_failures: PositiveInt = 3,  # noqa: B006
    ) -> None:  # fmt: skip
        self._attempts, self._partial, self._fence, self._folders = attempts, partial, fence, tuple(map(str, folders))
        self._limits = Limits(seconds, memory_mib, processes, file_mib)
        self._isolation = sandbox.choose(isolation)
        self._shown = shown_failures
        self._turn = 0

    async def start(self, task: Task) -> Sequence[Message]:
        self._tests = read_tests(task.answer)
        for test in self._tests if self._tests[0].how == "output" else ():
            for name, text in (("input", test.text), ("output", test.expected)):
                size = len(text.encode("utf-8", "surrogatepass"))
                if size > self._limits.file_mib * 2**20:
                    raise UserError(
                        f"{size} bytes in the {name} of a test, expected at most file_mib = {self._limits.file_mib}; "
                        "raise that, in MiB, or leave the row out"
                    )
        return task.messages

    async def step(self, reply: str) -> Step:
        self._turn += 1
        code = read_code(reply, fence=self._fence)
        if code is None:
            passed, feedback = 0, "The reply has no ``` block with Python code."
        else:
            passed, feedback = await self._run(code)
        if not feedback:
            return Step(done=True, reward=1.0)
        reward = passed / len(self._tests) if self._partial else 0.0
        again: list[Message] = [{"role": "user", "content": f"{feedback}\nCorrect the code."}]
        return Step(again, self._turn >= self._attempts, reward, feedback)

    async def _run(self, code: str) -> tuple[int, str]:
        """The number of tests that pass, and what is wrong with the others, in words, or ""."""
        programs = self._tests[0].how == "output"
        calls = None if programs else [
            {"how": "value" if test.how == "value" else "statement", "text": test.text} for test in self._tests
        ]  # fmt: skip
        outcome = await sandbox.run(
            code, calls=calls, inputs=[test.text for test in self._tests] if programs else (),
            limits=limits_of(self._tests, self._limits), isolation=self._isolation, folders=self._folders,
        )  # fmt: skip
        failed = next((fact["failed"] for fact in outcome.facts if "failed" in fact), None)
        if failed is not None:
            return 0, f"The code cannot be run: {str(failed)[:500]}"
        told = {number: fact for fact in outcome.facts if isinstance(number := fact.get("number"), int)}
        judged = [test.judge(told.get(number), outcome.ended) for number, test in enumerate(self._tests)]
        wrong = [words for words in judged if words is not None]
        return len(judged) - len(wrong), in_words(wrong, len(judged), self._shown)


def in_words(wrong: Sequence[str], tests: int, shown: int) -> str:
    """The feedback on tests that fail; "" if none does. `wrong`: a line for each, of which `shown` are shown."""
    if not wrong:
        return ""
    lines = "\n".join(f"- {words}" for words in wrong[:shown])
    more = f"\n- and {len(wrong) - shown} more" if len(wrong) > shown else ""
    return f"{len(wrong)} of {tests} tests fail:\n{lines}{more}"


def _short(value: object, *, quote: bool = True) -> str:
    text = repr(value) if quote else str(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} …"


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _same(one: object, other: object) -> bool:
    """Equality of JSON values: true is not 1."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    return bool(one == other)
