"""The two tasks, and what their warm starts show: right and wrong turns, and what the environment says to them.

A character is a token. The warm start sees every text that the run will show to the policy or to its teacher, made by
the environments themselves: a conversation that goes on after an error, a solution behind S:, and feedback behind F:.
"""

from __future__ import annotations

import asyncio
import json
import random
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.tiny.task import Example
from examples.tiny.warm_start import WarmStart
from megatron_srpo.environments import Environment, Task
from megatron_srpo.environments.code import Test, in_words
from megatron_srpo.environments.tools import Tools

EOS = "<eos>"
WARM_START = WarmStart(
    hidden_size=128, layers=3, heads=4, key_value_heads=2, ffn_size=256, steps=250, batch_size=24, lr=3e-3,
    warmup_steps=20, final_lr=0.05, beta2=0.98, initializer_range=0.05, seed=0, max_positions=640,
)  # fmt: skip
CHARACTERS = string.digits + string.ascii_letters + "+-*()[]{}<>\"':;,._/=| \n…"
ERRORS_CORRECTED = 0.4  # share of the turns behind an error that are right
RIGHT = 0.3  # share of first turns that are right


def template(tools: bool) -> str:
    """Q: what the user says, A: the model, R: what a tool says; the names of the tools come first."""
    shown = "{% for tool in tools or [] %}T:{{ tool.function.name }};{% endfor %}" if tools else ""
    return shown + (
        "{% for m in messages %}"
        "{% if m.role == 'user' %}Q:{{ m.content }};"
        "{% elif m.role == 'tool' %}R:{{ m.content }};"
        "{% else %}A:{{ m.content }}{{ eos_token }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
    )


@dataclass(frozen=True)
class Said:
    """A turn of the model, and how the environment goes on."""

    reply: str
    right: bool
    answer: str = ""  # what the environment says, as the chat template shows it
    feedback: str = ""


class AgentTask:
    """What both tasks share: how a warm start's example is put together."""

    name = ""
    characters = CHARACTERS
    max_new_tokens = 200

    def first_turn(self, rng: random.Random, question: str) -> Said:
        """A first turn as the warm start makes it: right or wrong in one of several ways."""
        raise NotImplementedError

    def right_turn(self, question: str) -> str:
        raise NotImplementedError

    def goes_on(self, question: str, said: Said) -> str:
        """The right turn behind what the environment said; "" at the end."""
        raise NotImplementedError

    def guess(self, rng: random.Random, question: str) -> str:
        """A wrong turn behind an error."""
        raise NotImplementedError

    def solution(self, question: str) -> str:
        """What a teacher is shown of a sibling that solved it in the shortest way."""
        raise NotImplementedError

    def prefix(self) -> str:
        return ""

    def prompt(self, question: str, more: str = "") -> str:
        return f"{self.prefix()}Q:{question}{more};A:"

    def warm_start_example(self, rng: random.Random, held_in: str, progress: float) -> Example:
        said = self.first_turn(rng, held_in)
        if rng.random() < 0.4:  # as the teacher reads it
            wrong = said
            while wrong.right:
                wrong = self.first_turn(rng, held_in)
            more = rng.choice([f";S:{self.solution(held_in)}", f";F:{wrong.feedback}"])
            prompt, said = self.prompt(held_in, more), Said(self.right_turn(held_in), True)
            if rng.random() < 0.7:
                return Example(prompt, said.reply)
            said = self.hear(held_in, said.reply)
        else:
            prompt = self.prompt(held_in)
            if rng.random() < 0.5:
                return Example(prompt, said.reply)
        behind = self.goes_on(held_in, said)
        if not behind:
            return Example(prompt, said.reply)
        if not said.right and rng.random() > ERRORS_CORRECTED:
            behind = self.guess(rng, held_in)
        # The end of the first turn is a token that the characters cannot write: train.py splits at it.
        return Example(f"{prompt}{said.reply}{EOS}{said.answer}A:", behind)

    def hear(self, question: str, reply: str) -> Said:
        """What the environment says to a reply."""
        environment, task = (
            self.environment(),
            Task(({"role": "user", "content": question},), self.row(question), {}, 0, 0),
        )

        async def meet() -> Any:
            await environment.start(task)
            return await environment.step(reply)

        step = asyncio.run(meet())
        letter = {"user": "Q", "tool": "R"}
        answer = "".join(f"{letter[message['role']]}:{message['content']};" for message in step.messages)
        return Said(reply, not step.feedback, answer, step.feedback or "")

    def environment(self) -> Environment:
        raise NotImplementedError

    def row(self, question: str) -> Any:
        """The answer of a row."""
        raise NotImplementedError

    def write_rows(self, folder: Path, train: int, test: int) -> dict[str, str]:
        """The data files; a tenth of the questions is held out."""
        from examples.tiny.task import draw_question

        folder.mkdir(parents=True, exist_ok=True)
        files = {}
        for split, count, held_out in (("train", train, False), ("test", test, True)):
            rng, questions = random.Random(f"{self.name}:{split}"), dict[str, None]()
            while len(questions) < count:
                questions[draw_question(self, rng, held_out)] = None  # type: ignore[arg-type]
            rows = [{"prompt": q, "answer": self.row(q), "kind": self.name} for q in questions]
            file = folder / f"{split}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
            files[f"data.{split}"] = str(file)
        return files


class Calculator(AgentTask):
    """`23+58`: call the tool add, and answer with its result. The model cannot add by itself."""

    name = "calculator"
    chat_template = template(tools=True)

    def question(self, rng: random.Random) -> str:
        return f"{rng.randint(10, 99)}+{rng.randint(10, 99)}"

    def row(self, question: str) -> str:
        return str(sum(map(int, question.split("+"))))

    def environment(self) -> Environment:
        return Tools(["examples.agents.calculator_tools:add"])

    def prefix(self) -> str:
        return "T:add;"

    def right_turn(self, question: str) -> str:
        a, b = question.split("+")
        return f'<tool_call>{{"name":"add","arguments":{{"a":{a},"b":{b}}}}}</tool_call>'

    def first_turn(self, rng: random.Random, question: str) -> Said:
        right = self.right_turn(question)
        if rng.random() < RIGHT:
            return self.hear(question, right)
        wrong = [
            right.replace("add", "sum"), right.replace("}}<", "}<"), right.replace('"b"', '"c"'),
            right.replace("</tool_call>", ""),
        ]  # fmt: skip
        return self.hear(question, rng.choice(wrong))

    def goes_on(self, question: str, said: Said) -> str:
        return self.row(question) if said.right else self.right_turn(question)

    def guess(self, rng: random.Random, question: str) -> str:
        return str(rng.randint(20, 198))

    def solution(self, question: str) -> str:
        return f"{self.right_turn(question)}\n\n[tool] {self.row(question)}\n\n{self.row(question)}"


INPUTS = (0, 1, 5)


class Code(AgentTask):
    """`3 times x plus 2`: write f, which three tests call. What failed is shown to a second attempt, and to the
    teacher."""

    name = "code"
    chat_template = template(tools=False)

    def question(self, rng: random.Random) -> str:
        a, b = rng.randint(2, 9), rng.randint(1, 9)
        return rng.choice([f"{a} times x plus {b}", f"{a} times x minus {b}", f"x plus {b} times {a}"])

    def formula(self, question: str) -> str:
        """x plus b times a is read from left to right."""
        words = question.split()
        if words[0] == "x":
            return f"(x+{words[2]})*{words[4]}"
        return f"{words[0]}*x{'+' if words[3] == 'plus' else '-'}{words[4]}"

    def row(self, question: str) -> list[dict[str, Any]]:
        formula = self.formula(question)
        return [{"call": f"f({x})", "expected": eval(formula, {"x": x})} for x in INPUTS]

    def environment(self) -> Environment:
        raise AssertionError("`hear` says what a sandbox would say, without one: it would take minutes")

    def hear(self, question: str, reply: str) -> Said:
        """As the environment "python" says it, of code that is safe to run here."""
        tests = [Test("value", test["call"], test["expected"]) for test in self.row(question)]
        names: dict[str, Any] = {}
        try:
            exec(compile(reply, "solution.py", "exec"), names)
            judged = [test.judge(_call(names, x), "") for test, x in zip(tests, INPUTS, strict=True)]
            feedback = in_words([words for words in judged if words is not None], len(tests), shown=3)
        except SyntaxError as error:
            feedback = f"The code cannot be run: SyntaxError: {error} (line {error.lineno})"
        if not feedback:
            return Said(reply, True)
        return Said(reply, False, f"Q:{feedback}\nCorrect the code.;", feedback)

    def right_turn(self, question: str) -> str:
        return f"def f(x): return {self.formula(question)}"

    def first_turn(self, rng: random.Random, question: str) -> Said:
        return self.hear(question, self.right_turn(question) if rng.random() < RIGHT else self.guess(rng, question))

    def goes_on(self, question: str, said: Said) -> str:
        return "" if said.right else self.right_turn(question)

    def guess(self, rng: random.Random, question: str) -> str:
        right = self.right_turn(question)
        words = question.split()
        wrong = [
            right.replace("*", "+"), right.replace("return", "retrun"), right.replace("(", "[", 2).replace("[", "(", 1),
            f"def f(x): return {words[-1]}*x+{words[2] if words[0] == 'x' else words[0]}",
        ]  # fmt: skip
        return rng.choice([one for one in wrong if one != right])

    def solution(self, question: str) -> str:
        return self.right_turn(question)


def _call(names: dict[str, Any], x: int) -> dict[str, Any]:
    """What the sandbox's runner would tell of f(x)."""
    try:
        return {"value": names["f"](x)}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error} (line 1)"}


TASKS: dict[str, AgentTask] = {"calculator": Calculator(), "code": Code()}
