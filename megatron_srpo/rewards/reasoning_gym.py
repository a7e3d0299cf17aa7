"""The kind reasoning_gym: tasks of the reasoning-gym library, scored by the library's own scorers.

A row is {"kind": "reasoning_gym", "prompt": …, "answer": …, "dataset": "chain_sum", "entry": {…}}, where `entry` is
what the library generated ({"question", "answer", "metadata"}), or its JSON as text. A row without "entry" must have
"question" and "metadata"; in a row without "dataset", the entry's own "source_dataset" names it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from typing import Any

import reasoning_gym
from reasoning_gym.factory import DATASETS

from megatron_srpo.core.text import after_thinking
from megatron_srpo.rewards.reasoning_gym_repairs import is_wrong, readable
from megatron_srpo.rewards.reasoning_gym_safety import is_safe, replace_eval
from megatron_srpo.rewards.registry import RewardError, Verdict, register
from megatron_srpo.rewards.tags import last_tagged

ANSWER_LIMIT = 20_000  # characters
FORM_CREDIT = 0.1  # at most this score is for the form of the answer alone

Entry = dict[str, Any]  # as the library generates it: "question", "answer", "metadata"


@register("reasoning_gym")
def score(response: str, answer: object, metadata: Mapping[str, object]) -> Verdict:
    """The library's score (0 … 1) of the text between the last `<answer>` and `</answer>`, with the repairs of
    reasoning_gym_repairs.py."""
    entry = _entry(answer, metadata)
    dataset = _dataset(entry, metadata)
    entry = readable(dataset, entry)
    scorer = _scorer(dataset)
    given = last_tagged(after_thinking(response), "answer")
    if given is None:
        return Verdict(0.0, "The response has no <answer>…</answer>.", False)
    well_formed = response.rstrip().endswith("</answer>")
    if len(given) > ANSWER_LIMIT:
        return Verdict(0.0, "The answer is far too long.", well_formed)
    if not is_safe(dataset, given):
        return Verdict(0.0, "The answer is not an arithmetic expression.", well_formed)
    value = _value(scorer, dataset, given, entry)
    feedback = None if value >= 1 else f"The answer {given[:200]!r} is not fully correct."
    return Verdict(value, feedback, well_formed, given)


def _value(scorer: Callable[[str, Entry], float], dataset: str, given: str, entry: Entry) -> float:
    """The library's score, or 0 if its scorer rewards a wrong answer. Some scorers raise for what they cannot read: a
    wrong answer too, unless they raise for the reference answer as well, because then the row is broken."""
    try:
        value = float(scorer(given, entry))
        return 0.0 if value > FORM_CREDIT and is_wrong(dataset, given, entry) else value
    except MemoryError:
        raise
    except Exception:
        scorer(entry["answer"], entry)
        return 0.0


def _entry(answer: object, metadata: Mapping[str, object]) -> Entry:
    entry = metadata.get("entry")
    if entry is None:
        entry = {
            "question": metadata.get("question", ""), "answer": answer, "metadata": metadata.get("metadata") or {}
        }  # fmt: skip
    if isinstance(entry, str):
        with suppress(ValueError, RecursionError):
            entry = json.loads(entry)
    if not isinstance(entry, dict) or not isinstance(entry.get("metadata"), dict):
        raise RewardError(
            'kind \'reasoning_gym\' expects the row\'s "entry" to be the generated {"question", "answer", "metadata"}'
        )
    # Where many answers are right the library's own is null, which the rows of parquet files do not keep.
    return {"answer": answer, **entry}


def _dataset(entry: Entry, metadata: Mapping[str, object]) -> str:
    for name in (metadata.get("dataset"), entry["metadata"].get("source_dataset")):
        if isinstance(name, str) and name in DATASETS:
            return name
    got = metadata.get("dataset")
    raise RewardError(f"kind 'reasoning_gym' expects the row's \"dataset\" to name one of the library's, got {got!r}")


@cache
def _scorer(dataset: str) -> Callable[[str, Entry], float]:
    replace_eval(dataset)
    return reasoning_gym.get_score_answer_fn(dataset)
