"""The study's task whose answers can shrink: a chain of sums, and a letter that alone is rewarded.

`4+3-7-2+9` → `+3=7-7=0-2=8+9=7#d`: each step is written with its result modulo 10, and the letter is the last result
modulo the number of letters. The model may stop after any step and take the result that it has. That is a guess, right
as often as chance has it.

Whoever is shown a solution knows the letter and may leave steps out, as language models do. So the teacher prefers
shorter answers than the student, and the student that follows it loses what made its answers right
(docs/algorithms.md, "When responses collapse").
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property

from examples.tiny.task import Example
from examples.worksheet.task import Misconception

LETTERS = "abcd"


@dataclass(frozen=True)
class Tally:
    """A table gives each fact its own wrong result and its own probability of it, as in the worksheet.

    The warm start answers plain prompts by that table, `whole_share` of them with all steps, the others with fewer. It
    takes the letter of a demonstration, right or wrong, and leaves out steps of `skip_share` of them. Where the
    demonstration has ended, it ends as well.
    """

    steps: int = 4
    letters: int = 4
    least_error: float = 0.05
    most_error: float = 0.3
    whole_share: float = 0.8
    skip_share: float = 0.4
    shown_share: float = 0.5  # of the prompts, once `shown_from` of the warm start is over
    shown_from: float = 0.35
    own_share: float = 0.4  # of the shown demonstrations that are followed after some steps of the model's own
    seed: int = 0  # of the table

    name = "tally"
    characters = "0123456789+-=#abcdQSA"
    chat_template = (
        "{% for message in messages %}"
        "{% if message.role == 'user' %}Q{{ message.content }}"
        "{% elif message.role == 'assistant' %}A{{ message.content }}{{ eos_token }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}A{% endif %}"
    )

    @property
    def max_new_tokens(self) -> int:
        return 4 * self.steps + 4

    @cached_property
    def misconceptions(self) -> dict[str, Misconception]:
        """By fact, e.g. "3-7"."""
        rng, table = random.Random(4000 + self.seed), {}
        for fact in (f"{a}{operator}{b}" for operator in "+-" for a in range(10) for b in range(10)):
            wrong = rng.choice([digit for digit in "0123456789" if digit != str(result(fact))])
            table[fact] = Misconception(wrong, rng.uniform(self.least_error, self.most_error))
        return table

    def question(self, rng: random.Random) -> str:
        chain = "".join(f"{rng.choice('+-')}{rng.randrange(10)}" for _ in range(self.steps))
        return f"{rng.randrange(10)}{chain}"

    def answer(self, question: str) -> str:
        """The right letter."""
        return self.solution(question)[-1]

    def solution(self, question: str) -> str:
        """The right steps and the right letter."""
        written, last = self._written(question, self.steps, None)
        return f"{written}#{LETTERS[last % self.letters]}"

    def attempt(self, question: str, rng: random.Random) -> str:
        """An answer by the table of misconceptions, whole or ended early."""
        steps = self.steps if rng.random() < self.whole_share else rng.randrange(self.steps)
        written, last = self._written(question, steps, rng)
        return f"{written}#{LETTERS[last % self.letters]}"

    def _written(self, question: str, steps: int, rng: random.Random | None) -> tuple[str, int]:
        """The first `steps` steps and the last result: right ones, or with `rng` those of the misconceptions."""
        last, written = int(question[0]), ""
        for step in range(steps):
            part = question[1 + 2 * step : 3 + 2 * step]
            fact = f"{last}{part}"
            slip = self.misconceptions[fact]
            last = int(slip.wrong) if rng is not None and rng.random() < slip.probability else result(fact)
            written += f"{part}={last}"
        return written, last

    def plain(self, question: str) -> str:
        return f"Q{question}A"

    def shown(self, question: str, demonstration: str) -> str:
        return f"Q{question}S{demonstration}A"

    def warm_start_example(self, rng: random.Random, held_in: str, progress: float) -> Example:
        shows = progress > self.shown_from and rng.random() < self.shown_share
        written = self.attempt(held_in, rng)
        if not shows:
            return Example(self.plain(held_in), written)
        prompt = self.shown(held_in, written)
        steps = (len(written) - 2) // 4
        if steps and rng.random() < self.skip_share:
            return Example(prompt, written[: 4 * rng.randrange(steps)] + written[-2:])
        if rng.random() >= self.own_share:
            return Example(prompt, written)
        own, _ = self._written(held_in, rng.randrange(1, self.steps + 1), rng)
        rest = written[len(own) :] if len(own) < len(written) - 1 else written[-2:]
        return Example(prompt + own, rest)  # the model's own steps are context, and what follows is the target


def result(fact: str) -> int:
    """A sum or difference of two digits, modulo 10: "3-7" → 6."""
    left, operator, right = int(fact[0]), fact[1], int(fact[2])
    return (left + right if operator == "+" else left - right) % 10
