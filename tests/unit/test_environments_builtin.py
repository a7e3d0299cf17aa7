"""The built-in environments, without an engine: tools, and code in a sandbox."""

from __future__ import annotations

import asyncio
import json
import os

import pytest

from megatron_srpo.config import EnvironmentConfig
from megatron_srpo.core.errors import UserError
from megatron_srpo.environments import Task, sandbox
from megatron_srpo.environments.code import PythonCode, limits_of, read_code, read_tests
from megatron_srpo.environments.registry import check_arguments, resolve
from megatron_srpo.environments.sandbox import Limits
from megatron_srpo.environments.tools import Tools, read_hermes

TOOLS = '''
from collections.abc import Callable
from typing import Literal


def add(a: int, b: int = 1) -> int:
    """Adds two numbers."""
    return a + b


async def lookup(word: str, how: Literal["short", "long"]) -> dict:
    return {"word": word, "how": how}


def broken(x: float) -> float:
    return 1 / 0


def endless(x: int) -> str:
    return "x" * 100000


def untyped(x):
    return x


class Point:
    pass


def draw(points: list[Point]) -> str:
    return ""


def later(how: Callable[[int], int]) -> str:
    return ""


def hidden(_x: int) -> str:
    return ""


def undefined(x: "Circle") -> str:
    return ""


not_a_function = 3
'''


@pytest.fixture
def functions(tmp_path):
    file = tmp_path / "my_tools.py"
    file.write_text(TOOLS)
    return lambda *names: [f"{file}:{name}" for name in names]


def step(environment, reply):
    return asyncio.run(environment.step(reply))


def call(text):
    return f"<tool_call>\n{text}\n</tool_call>"


# ---- tools -----------------------------------------------------------------------------------------------------------


def test_typed_functions_become_the_schemas_that_chat_templates_show(functions):
    add, lookup = Tools(functions("add", "lookup")).tools
    assert add == {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds two numbers.",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer"}, "b": {"type": "integer", "default": 1}},
                "required": ["a"],
            },
        },
    }
    assert lookup["function"]["parameters"]["properties"]["how"] == {"type": "string", "enum": ["short", "long"]}


def test_calls_are_carried_out_and_a_turn_without_calls_ends_the_episode(functions):
    tools = Tools(functions("add", "lookup"))
    both = call('{"name": "add", "arguments": {"a": 2, "b": 3}}') + call(
        '{"name": "lookup", "arguments": {"word": "é", "how": "long"}}'
    )
    found = step(tools, f"<think>{call('{}')}</think>Let me see. {both}")
    assert [message["content"] for message in found.messages] == ["5", '{"word": "é", "how": "long"}']
    assert {message["role"] for message in found.messages} == {"tool"}
    assert (found.done, found.tool_calls, found.tool_errors, found.feedback) == (False, 2, 0, None)
    assert step(tools, "It is 5.").done


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (call('{"name": "ad", "arguments": {}}'), "there is no tool 'ad'"),
        (
            call('{"name": "add", "arguments": {"a": "two"}}'),
            "wrong arguments of add: a: Input should be a valid integer",
        ),
        (call('{"name": "add", "arguments": {"a": 1, "c": 2}}'), "c: Extra inputs are not permitted"),
        (call('{"name": "add", "arguments": {}}'), "a: Field required"),
        (call('{"name": "broken", "arguments": {"x": 1}}'), "ZeroDivisionError: division by zero"),
        (call('{"name": "add", "arguments": '), "not valid JSON"),
        (call("[" * 100000), "not valid JSON"),
        (call('{"name": "add", "arguments": [1]}'), "arguments of 'add' must be an object"),
        (call('["add"]'), "a call must be an object"),
        ('<tool_call>{"name": "add"}', "has no </tool_call>"),
    ],
)
def test_whatever_is_wrong_with_a_call_is_told_to_the_model(functions, text, told):
    tools = Tools(functions("add", "broken"))
    found = step(tools, text)
    assert not found.done and found.tool_errors == 1
    assert told in found.messages[-1]["content"] and found.messages[-1]["content"].startswith("Error: ")
    assert told in found.feedback, "it may teach"


@pytest.mark.parametrize("parser", ["hermes", "another"])
def test_calls_that_were_only_thought_of_are_not_carried_out(functions, parser, monkeypatch):
    def parse(text):
        return read_hermes(text).calls, ""

    monkeypatch.setattr("megatron_srpo.rollout.engine_tool_parser", lambda name, tokenizer, tools: parse)
    add = call('{"name": "add", "arguments": {"a": 2}}')
    for reply in (f"<think>{add}</think>3", f"<think>I could {add}", f"no </think><think>{add}"):
        assert step(Tools(functions("add"), parser, "unused"), reply).done, reply
    assert step(Tools(functions("add"), parser, "unused"), f"<think>hm</think>{add}").messages[0]["content"] == "3"


def test_answers_come_in_the_order_of_the_calls(functions):
    good, bad = call('{"name": "add", "arguments": {"a": 2}}'), call("{")
    found = step(Tools(functions("add")), bad + good + bad + good)
    assert [message["content"][:5] for message in found.messages] == ["Error", "3", "Error", "3"]
    assert (found.tool_calls, found.tool_errors) == (4, 2)


def test_results_and_calls_of_a_turn_are_limited(functions):
    tools = Tools(functions("endless"), max_calls=2, max_output=100)
    found = step(tools, call('{"name": "endless", "arguments": {"x": 1}}') * 5)
    assert len(found.messages) == 3 and len(found.messages[0]["content"]) < 200
    assert "first 2 calls" in found.messages[-1]["content"]
    assert len(read_hermes("<tool_call>" * 100_000).problems) == 1


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("untyped", "has no type"),
        ("absent", "has no 'absent'"),
        ("not_a_function", "expected a function"),
        ("draw", "tool 'draw': parameter 'points' has the type list.Point., which JSON cannot express; expected str, "),
        ("later", "'how' has the type collections.abc.Callable.*expected str, int, float, .* or a dataclass"),
        ("hidden", "parameter '_x' has a name that pydantic does not take; rename it"),
        ("undefined", "its parameters cannot be read: NameError: name 'Circle' is not defined. Expected a Python"),
    ],
)
def test_what_is_no_tool_is_refused_before_any_episode(functions, name, told):
    with pytest.raises(UserError, match=told):
        check_arguments(Tools, {"functions": functions(name)}, "tools", "sums")


def test_a_reference_without_a_function_is_told_in_our_words():
    with pytest.raises(
        UserError, match=r"\.functions\.0 = 'add': expected \"module:function\" or \"path/file"
    ) as caught:
        check_arguments(Tools, {"functions": ["add"]}, "tools", "sums")
    assert "environment.arguments.sums.functions" in str(caught.value) and "pattern" not in str(caught.value)


def test_unknown_environments_are_refused():
    with pytest.raises(UserError, match="expected a subclass"):
        resolve("megatron_srpo.environments.base:Task")
    with pytest.raises(UserError, match=r"there is no module 'no_such_package'\. Expected one of an installed package"):
        resolve("no_such_package.at_all:Thing")


# ---- python ----------------------------------------------------------------------------------------------------------

try:
    ISOLATION = sandbox.choose("auto")
except UserError:  # a container without namespaces
    ISOLATION = "none"
CALLS = [{"call": "add(1, 2)", "expected": 3}, {"call": "add(-1, 1)", "expected": 0}]


def attempt(reply, answer=CALLS, **arguments):
    environment = PythonCode(**{"seconds": 3.0, "isolation": ISOLATION, **arguments})

    async def run():
        await environment.start(Task(({"role": "user", "content": "x"},), answer, {}, 0, 0))
        return await environment.step(reply)

    return asyncio.run(run())


def block(code):
    return f"Here it is.\n```python\n{code}\n```\n"


def test_code_that_passes_its_tests_is_rewarded():
    found = attempt("<think>```\nno\n```</think>" + block("def add(a, b):\n    return a + b"))
    assert (found.done, found.reward, found.feedback) == (True, 1.0, None)
    assert attempt(block("print(sum(map(int, input().split())))"), [{"input": "1 2\n", "output": "3"}]).reward == 1.0
    assert attempt(block("def f(): return 1"), ["assert f() == 1"]).reward == 1.0
    assert attempt("def add(a, b): return a + b", fence=False).reward == 1.0


READS = "import os, sys\n"
RIGHT = {
    "bytes": READS + "a, b = map(int, sys.stdin.buffer.read().split())\nsys.stdout.buffer.write(b'%d\\n' % (a + b))",
    "descriptors": READS + "a, b = map(int, os.read(0, os.fstat(0).st_size).split())\nos.write(1, b'%d' % (a + b))",
    "open": "a, b = map(int, open(0).read().split())\nout = open(1, 'w')\nout.write(str(a + b))",
    "lines": READS + "input = sys.stdin.readline\na, b = map(int, input().split())\nsys.stdout.write(str(a + b))",
    "exit": "a, b = map(int, input().split())\nprint(a + b)\nexit()",
    "quit": "a, b = map(int, input().split())\nprint(a + b)\nquit(0)",
    "thread": (
        "import threading\ndef main():\n    for _ in range(10**6): pass\n    print(sum(map(int, input().split())))\n"
        "threading.Thread(target=main).start()"
    ),
    "executor": (
        "from concurrent.futures import ThreadPoolExecutor\n"
        "print(sum(ThreadPoolExecutor(2).map(int, input().split())))"
    ),
    "late": (
        READS + "import atexit, io\nsys.stdout = io.StringIO()\n"
        "atexit.register(lambda: sys.__stdout__.write(sys.stdout.getvalue()))\nprint(sum(map(int, input().split())))"
    ),
    "own writer": (
        READS + "class Fast:\n    parts = []\n    def write(self, text): self.parts.append(text)\n"
        "    def flush(self): os.write(1, ''.join(self.parts).encode()); self.parts.clear()\n"
        "sys.stdout = Fast()\nprint(sum(map(int, input().split())))"
    ),
    "records": (
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom typing import get_type_hints\n"
        "@dataclass\nclass Pair:\n    a: int\n    b: Other\nOther = int\n"
        "pair = Pair(*map(get_type_hints(Pair)['b'], input().split()))\nprint(pair.a + pair.b)"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_a_program_reads_writes_and_ends_as_it_likes(name):
    tests = [{"input": "1 2\n", "output": "3"}, {"input": "4 5\n", "output": "9\n"}]
    found = attempt(block(RIGHT[name]), tests, seconds=20.0)
    assert found.reward == 1.0, found.feedback


def test_a_test_sees_nothing_of_the_one_before():
    """Neither its unread input nor what it has left unwritten when it failed."""
    code = READS + "import atexit\natexit.register(print, 'end')\nline = input()\nsys.stdout.write(line)\n"
    tests = [{"input": "1\nmore\n", "output": ""}, {"input": "2\n", "output": "2end"}]
    found = attempt(block(code + "if line == '1': raise ValueError('odd')"), tests, partial=True)
    assert found.reward == 0.5 and "raised ValueError: odd (line 6)" in found.feedback, found.feedback


def test_a_row_with_large_outputs_can_be_solved():
    lines = 60_000
    tests = [{"input": f"{lines + n}", "output": "x\n" * (lines + n)} for n in range(4)]
    assert attempt(block("print('x\\n' * int(input()))"), tests, seconds=20.0).reward == 1.0
    calls = [{"call": "f(50000)", "expected": ["x"] * 50_000}]
    assert attempt(block("def f(n): return ['x'] * n"), calls, seconds=20.0).reward == 1.0
    many = [{"call": f"f({n})", "expected": n} for n in range(8000)]
    assert attempt(block("def f(n): return n"), many, seconds=20.0).reward == 1.0


def test_an_output_that_is_too_long_fails_its_own_test_alone():
    code = "n = int(input())\nprint('x' * (n or 70000))"
    tests = [{"input": "0", "output": "x"}, {"input": "2", "output": "xx"}]
    found = attempt(block(code), tests, partial=True)
    assert found.reward == 0.5 and "ValueError: the value is too long, more than 64 KiB" in found.feedback


def test_the_limit_of_an_output_tells_nothing_of_a_short_one():
    """The code may look at it."""
    short = [limits_of(read_tests([{"input": "", "output": text}]), Limits()) for text in ("no", "yes", "x" * 1000)]
    assert {limits.value_kib for limits in short} == {64}


def test_outputs_and_inputs_that_no_file_can_hold_are_refused():
    for field in ("input", "output"):
        with pytest.raises(UserError, match=rf"1048577 bytes in the {field} of a test.*file_mib = 1; raise that"):
            attempt(block("1"), [{"input": "", "output": "", field: "x" * (2**20 + 1)}], file_mib=1)


def test_text_beyond_ascii_is_read_and_printed():
    assert attempt(block("print(input().upper())"), [{"input": "é😀\n", "output": "É😀"}]).reward == 1.0


@pytest.mark.parametrize(
    "code",
    [
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass Pair:\n    a: int\n"
        "def add(a, b): return Pair(a).a + b",
        "import sys\nassert quit is exit\nONE = 1\ndef add(a, b): return sys.modules[__name__].ONE * a + b",
    ],
)  # fmt: skip
def test_code_whose_functions_are_called_is_a_module(code):
    found = attempt(block(code))
    assert found.reward == 1.0, found.feedback


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("def add(a, b): return a - b", "add(1, 2) returned -1, expected 3"),
        ("def add(a, b): return 'x' * 10**6", "add(1, 2) raised ValueError"),
        ("def add(a, b):\n    return c", "add(1, 2) raised NameError: name 'c' is not defined (line 2)"),
        ("def add(a, b) return", "The code cannot be run: SyntaxError"),
        ("def add(a, b):\n    while True: pass", "add(1, 2) had no result: it did not end within 1 s"),
        ("import os\ndef add(a, b): os._exit(0)", "add(1, 2) had no result"),
        ("def add(a, b): return True", "add(1, 2) returned True, expected 3"),
        ("raise SystemExit", "The code cannot be run: SystemExit"),
        ("def add(a, b): return bytearray(2**40)", "MemoryError"),
    ],
)
def test_what_failed_is_told_in_words(code, told):
    found = attempt(block(code), seconds=1.0)
    assert found.reward == 0.0 and told in found.feedback and found.done


def test_further_attempts_are_shown_what_failed():
    found = attempt(block("def add(a, b): return 3"), attempts=2, partial=True)
    assert not found.done and found.reward == 0.5
    assert "add(-1, 1) returned 3, expected 0" in found.messages[0]["content"]
    assert attempt("no code", attempts=2).feedback.endswith("no ``` block with Python code.")


def test_a_program_that_forges_results_does_not_know_what_is_expected():
    forged = (
        "import os, json\n"
        "for n in range(2):\n"
        "    for fd in range(3, 20):\n"
        "        try: os.write(fd, (json.dumps({'number': n, 'value': 99}) + '\\n').encode())\n"
        "        except OSError: pass\n"
        "os._exit(0)\n"
    )
    assert attempt(block(forged)).reward == 0.0
    nonsense = forged.replace("'number': n, 'value': 99", "'number': [n], 'value': {}")
    assert attempt(block(nonsense)).reward == 0.0, "what is no result is no failure of the environment"


def evaluate(expression, code="import os, socket, sys", **limits):
    calls = [{"how": "value", "text": expression}]
    return asyncio.run(sandbox.run(code, calls=calls, limits=Limits(**{"seconds": 3.0, **limits}), isolation=ISOLATION))


@pytest.mark.skipif(ISOLATION != "bubblewrap", reason="the other ways hold less; docs/security.md says what")
@pytest.mark.parametrize(
    "expression",
    [
        f"os.listdir({os.getcwd()!r})",
        "open('/etc/passwd').read()",
        "open('/usr/forbidden', 'w')",
        "socket.create_connection(('127.0.0.1', 22), 1)",
        "socket.create_connection(('8.8.8.8', 53), 1)",
        "os.kill(1, 9) or os.setuid(0)",
        "os.chroot('/')",
        "open('/proc/1/environ').read() and os.environ['PATH']",
    ],
)
def test_the_sandbox_keeps_a_program_from(expression):
    fact = evaluate(expression).facts[-1] if evaluate(expression).facts else {}
    assert "error" in fact or not fact.get("value"), fact


@pytest.mark.skipif(ISOLATION != "bubblewrap", reason="the other ways hold less; docs/security.md says what")
def test_the_sandbox_limits_files_processes_and_the_environment(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    assert set(evaluate("dict(os.environ)").facts[-1]["value"]) <= {"HOME", "PWD", "LC_CTYPE"}
    assert evaluate("len([name for name in os.listdir('/proc') if name.isdigit()])").facts[-1]["value"] <= 2
    many = "import os\ndef f():\n    n = 0\n    try:\n        while True:\n            if os.fork() == 0:\n"
    many += "                import time; time.sleep(60)\n            n += 1\n    except OSError:\n        return n\n"
    assert evaluate("f()", many, processes=5).facts[-1]["value"] <= 5
    full = "import os\ndef f():\n    for n in range(8):\n        open(f'/tmp/{n}', 'wb').write(b'0' * 2**20)\n"
    assert "No space left" in evaluate("f()", full, file_mib=4).facts[-1]["error"]
    flood = evaluate("1", "import os\nfor _ in range(10**5): os.write(3, b'x' * 10**4)", output_kib=64)
    assert "more than 64 KiB" in flood.ended


def test_tests_and_code_are_read_from_what_rows_and_models_write():
    assert [test.how for test in read_tests('[{"call": "f()", "expected": null}, "assert f()"]')] == [
        "value",
        "statement",
    ]
    for wrong in ([], 3, [{"call": "f()"}], [{"input": "", "output": ""}, "assert 1"]):
        with pytest.raises(ValueError, match="expected"):
            read_tests(wrong)
    for many in ("```", "```\n", "```text\n", "````python\n", "```python\n```text\n"):
        assert not read_code(many * 50_000, fence=True), "and that does not take long"


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        ("```py\na\n```\n```py\nb\n```", "b\n"),
        ("```\na\n```\n```\nb\n```", "b\n"),
        ("```py\na\n```\nIt prints\n```\n3\n```", "a\n"),
        ("```python\na\n```\nIt prints\n```text\n3\n```\nas it should.", "a\n"),
        ("```text\n3\n```\nis what this prints:\n```python\na\n```", "a\n"),
        ("```python3\na\n```", "a\n"),
        ("```Python\na\n```", "a\n"),
        ("``` PY title=x\r\na\r\n```\r\n", "a\r\n"),
        ("```python\na\n\n```", "a\n\n"),
        ("```python\na\n``` That is it.", "a\n"),
        ("```python\nstopped, and begun again\n```python\na\n```", "a\n"),
        ("````markdown\n```python\na\n```\n````", None),
        ("````python\ns = '''\n```\n'''\n````", "s = '''\n```\n'''\n"),
        ("```bash\nls\n```", None),
        ("```python\na\n```\n```python\nhalf of", "a\n"),
        ("Use ```a``` here.\n```python```\n```python\na\n```", "a\n"),
        ("```python\n```", ""),
        ("<think>```python\na\n```</think>```python\nb\n```", "b\n"),
        ("<think>\n```python\na draft\n```\nor", None),
    ],
)
def test_the_last_block_of_python_in_a_reply_is_read(reply, code):
    assert read_code(reply, fence=True) == code


def test_a_weaker_sandbox_than_bubblewrap_is_told_unless_it_was_chosen(monkeypatch):
    monkeypatch.setattr(sandbox, "works", lambda name: name == "unshare")

    def told(reference, **arguments):
        return sandbox.weakness(EnvironmentConfig(classes={"code": reference}, arguments={"code": arguments}))

    assert "bubblewrap is missing" in told("python")[0] and "environment.classes.code" in told("python")[0]
    assert told("python", isolation="unshare") == told("tools") == []
    monkeypatch.setattr(sandbox, "works", lambda name: True)
    assert told("python") == []


@pytest.mark.parametrize(
    ("code", "expression", "told"),
    [
        ("x = 2", "[x, None, 'é']", '[2, null, "\\u00e9"]'),
        ("", "1 / 0", "Error: RuntimeError: ZeroDivisionError: division by zero"),
        ("def f(", "1", "Error: RuntimeError: SyntaxError: '(' was never closed"),
        ("import os", "os._exit(3)", "Error: RuntimeError: the program has ended before"),
    ],
)
def test_the_python_tool_of_the_example_tells_values_and_what_went_wrong(code, expression, told):
    tools = Tools(["examples.agents.math_tools:run_python"])
    found = step(tools, call(json.dumps({"name": "run_python", "arguments": {"code": code, "expression": expression}})))
    assert found.messages[0]["content"].startswith(told)
    assert found.tool_errors == told.startswith("Error") and bool(found.feedback) == bool(found.tool_errors)
