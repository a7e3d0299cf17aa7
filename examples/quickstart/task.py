"""The quickstart's task: put five digits in order."""

from __future__ import annotations

import random
from dataclasses import dataclass

from examples.tiny.task import Example
from examples.tiny.warm_start import WarmStart

WARM_START = WarmStart(
    hidden_size=128,
    layers=4,
    heads=4,
    key_value_heads=2,
    ffn_size=384,
    steps=400,
    batch_size=64,
    lr=3e-3,
    warmup_steps=20,
    final_lr=0.05,
    beta2=0.98,
    initializer_range=0.05,
    seed=0,
)


@dataclass(frozen=True)
class Ordering:
    """`order 53142` → `12345`. The warm start answers ascending, descending or reversed, each a third of the time,
    so that the policy is right about that often; shown a solution, it repeats it.
    """

    digits: int = 5
    shown_share: float = 0.5  # of the warm start's prompts that show a solution

    name = "ordering"
    characters = "0123456789+-*=%?:;,. QASabcdefghijklmnopqrstuvwxyz"
    chat_template = (
        "{% for message in messages %}"
        "{% if message.role == 'user' %}Q:{{ message.content }};"
        "{% elif message.role == 'assistant' %}A:{{ message.content }}{{ eos_token }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}A:{% endif %}"
    )

    @property
    def max_new_tokens(self) -> int:
        return self.digits + 3

    def question(self, rng: random.Random) -> str:
        return "order " + "".join(rng.choice("0123456789") for _ in range(self.digits))

    def answer(self, question: str) -> str:
        return "".join(sorted(question.removeprefix("order ")))

    def plain(self, question: str) -> str:
        return f"Q:{question};A:"

    def shown(self, question: str, demonstration: str) -> str:
        return f"Q:{question};S:{demonstration};A:"

    def warm_start_example(self, rng: random.Random, held_in: str, progress: float) -> Example:
        right = self.answer(held_in)
        target = rng.choice([right, right[::-1], held_in.removeprefix("order ")[::-1]])
        prompt = self.shown(held_in, target) if rng.random() < self.shown_share else self.plain(held_in)
        return Example(prompt, target)
