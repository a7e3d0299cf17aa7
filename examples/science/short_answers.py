"""Prepared multiple-choice rows with two answered examples before each question, for a model too small to be told.

    python -m examples.science.short_answers runs/data/chemistry runs/data/chemistry_short

SmolLM2-135M does not follow "put the letter between <answer> and </answer>" when it is told to, but does after it has
seen two such answers. Each `prompt` becomes a conversation; the request to reason and the system message are left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

REQUEST = "Please reason step by step."
SHOWN = [
    {"role": "user", "content": "Which gas do plants take in?\n\nA: oxygen\nB: neon\nC: carbon dioxide\nD: helium"},
    {"role": "assistant", "content": "<answer>C</answer>"},
    {"role": "user", "content": "What is the chemical symbol of gold?\n\nA: Au\nB: Ag\nC: Fe\nD: Gd"},
    {"role": "assistant", "content": "<answer>A</answer>"},
]


def shortened(row: dict[str, Any]) -> dict[str, Any]:
    """The row as a conversation that ends with its question."""
    question = row["prompt"].replace(REQUEST, "").strip()
    kept = {name: value for name, value in row.items() if name != "system"}
    return {**kept, "prompt": [*SHOWN, {"role": "user", "content": question}]}


def read_rows(file: Path) -> Iterator[dict[str, Any]]:
    """The prepared rows of a file; SystemExit that names the line which is none."""
    for number, line in enumerate(file.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            row["prompt"].replace  # noqa: B018 - a text
        except (ValueError, TypeError, KeyError, AttributeError):
            sys.exit(f'{file}, line {number}: expected a JSON object with a text "prompt" (prepare-data writes them)')
        yield row


def convert(source: Path, out: Path) -> None:
    """Write train.jsonl and test.jsonl of `source` into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    for name in ("train.jsonl", "test.jsonl"):
        rows = list(read_rows(source / name))
        (out / name).write_text("".join(json.dumps(shortened(row), ensure_ascii=False) + "\n" for row in rows))
        print(f"{out / name}: {len(rows)} questions")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder that python -m megatron_srpo prepare-data wrote")
    parser.add_argument("out", type=Path, help="folder to write")
    options = parser.parse_args(arguments)
    try:
        convert(options.source, options.out)
    except FileNotFoundError as error:
        print(
            f"short_answers: {error.filename} is not there: run python -m megatron_srpo prepare-data first",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
