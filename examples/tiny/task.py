"""What a tiny task has to say of itself, and its rows as training data."""

from __future__ import annotations

import json
import random
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Example:
    """One supervised example of the warm start, in characters."""

    prompt: str
    target: str  # without the end-of-sequence token
    ignored: int | None = None  # index in `target` of a character that is context and never a training target


class Task(Protocol):
    """Questions with one right answer, and how a model that is half right would answer them.

    `chat_template` must render a user's question as `plain(question)`; the run's [teacher] templates must turn it
    into `shown(question, demonstration)`: the warm start trains on exactly these two.
    """

    name: str
    characters: str  # the alphabet of prompts and answers
    chat_template: str
    max_new_tokens: int

    def question(self, rng: random.Random) -> str: ...

    def answer(self, question: str) -> str: ...

    def plain(self, question: str) -> str: ...

    def shown(self, question: str, demonstration: str) -> str: ...

    def warm_start_example(self, rng: random.Random, held_in: str, progress: float) -> Example:
        """An example on the question `held_in`, when `progress` (0 … 1) of the warm start is over."""
        ...


def is_held_out(question: str) -> bool:
    """Whether a question belongs to the test split: a tenth of all, by hash, so that no run can mix them up."""
    return zlib.crc32(question.encode()) % 10 == 0


def draw_question(task: Task, rng: random.Random, held_out: bool) -> str:
    while True:
        question = task.question(rng)
        if is_held_out(question) == held_out:
            return question


def make_rows(task: Task, count: int, held_out: bool, seed: int) -> list[dict[str, str]]:
    """Distinct rows in the trainer's format: prompt, answer and the reward function that compares them."""
    rng, questions = random.Random(f"{task.name}:{held_out}:{seed}"), dict[str, None]()
    for _ in range(100 * count):
        if len(questions) == count:
            break
        questions[draw_question(task, rng, held_out)] = None
    else:
        raise ValueError(f"task {task.name!r} has fewer than {count} distinct questions: ask for fewer rows")
    return [{"prompt": question, "answer": task.answer(question), "kind": "exact"} for question in questions]


def write_rows(rows: list[dict[str, str]], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_splits(task: Task, folder: Path, train: int, test: int) -> tuple[Path, Path]:
    """`train.jsonl` and `test.jsonl` in `folder`; the same rows every time."""
    return (
        write_rows(make_rows(task, train, held_out=False, seed=0), folder / "train.jsonl"),
        write_rows(make_rows(task, test, held_out=True, seed=0), folder / "test.jsonl"),
    )
