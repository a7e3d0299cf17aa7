"""The comparison's task: a worksheet of four one-digit sums and products, right only if every item is right."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property

from examples.tiny.task import Example
from examples.tiny.warm_start import WarmStart

WARM_START = WarmStart(
    hidden_size=64,
    layers=3,
    heads=4,
    key_value_heads=2,
    ffn_size=192,
    steps=1000,
    batch_size=64,
    lr=3e-3,
    warmup_steps=50,
    final_lr=0.05,
    beta2=0.98,
    initializer_range=0.08,
    seed=0,
)


@dataclass(frozen=True)
class Misconception:
    """What a pupil writes instead of the right digit, and how often."""

    wrong: str
    probability: float


@dataclass(frozen=True)
class Worksheet:
    """`3+57*24+48+1` → `3+5=87*2=44+4=88+1=9`: every item written out, results modulo 10.

    A table gives each fact its own wrong value and its own probability of it. The warm start answers plain prompts by
    that table, and follows a demonstration, right or wrong. It never sees a worksheet known to be right.
    """

    items: int = 4
    least_error: float = 0.1
    most_error: float = 0.7
    shown_share: float = 0.5  # of the prompts, once `shown_from` of the warm start is over
    shown_from: float = 0.35
    slip_share: float = 0.3  # of the shown demonstrations whose copy has one planted slip (context, not a target)
    seed: int = 0  # of the table

    name = "worksheet"
    characters = "0123456789+*=QSA"
    chat_template = (
        "{% for message in messages %}"
        "{% if message.role == 'user' %}Q{{ message.content }}"
        "{% elif message.role == 'assistant' %}A{{ message.content }}{{ eos_token }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}A{% endif %}"
    )

    @property
    def max_new_tokens(self) -> int:
        return 5 * self.items + 2

    @cached_property
    def misconceptions(self) -> dict[str, Misconception]:
        """By fact, e.g. "7*2"."""
        rng, table = random.Random(2000 + self.seed), {}
        for fact in (f"{a}{operator}{b}" for operator in "+*" for a in range(10) for b in range(10)):
            wrong = rng.choice([digit for digit in "0123456789" if digit != result(fact)])
            table[fact] = Misconception(wrong, rng.uniform(self.least_error, self.most_error))
        return table

    def question(self, rng: random.Random) -> str:
        return "".join(f"{rng.randrange(10)}{rng.choice('+*')}{rng.randrange(10)}" for _ in range(self.items))

    def answer(self, question: str) -> str:
        return "".join(f"{fact}={result(fact)}" for fact in facts(question))

    def attempt(self, question: str, rng: random.Random) -> str:
        """An answer by the table of misconceptions: each item wrong with its own probability."""
        written = ""
        for fact in facts(question):
            error = self.misconceptions[fact]
            written += f"{fact}={error.wrong if rng.random() < error.probability else result(fact)}"
        return written

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
        if rng.random() >= self.slip_share:
            return Example(prompt, written)
        item = rng.randrange(self.items)
        place = 5 * item + 4
        fact = facts(held_in)[item]
        slip = self.misconceptions[fact].wrong if written[place] == result(fact) else result(fact)
        return Example(prompt, written[:place] + slip + written[place + 1 :], ignored=place)


def facts(question: str) -> list[str]:
    """`3+57*2` → ["3+5", "7*2"]."""
    return [question[start : start + 3] for start in range(0, len(question), 3)]


def result(fact: str) -> str:
    """The last digit of a one-digit sum or product: "7*2" → "4"."""
    left, operator, right = int(fact[0]), fact[1], int(fact[2])
    return str((left + right if operator == "+" else left * right) % 10)
