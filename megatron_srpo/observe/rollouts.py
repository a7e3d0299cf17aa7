"""rollouts.jsonl: one line for each iteration; what every response earned, which branch it took and who taught it."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import JsonValue

from megatron_srpo.algorithms.report import branch
from megatron_srpo.core.records import Group


def groups_record(groups: Sequence[Group], texts: int) -> list[dict[str, JsonValue]]:
    """One object for each prompt; its lists are by attempt. The first `texts` prompts keep their question and their
    responses whole."""
    return [_record(group, whole=number < texts) for number, group in enumerate(groups)]


def _record(group: Group, *, whole: bool) -> dict[str, JsonValue]:
    record: dict[str, JsonValue] = {
        "uid": group.prompt.uid,
        "scores": list(group.scores),
        "branches": [branch(sample) for sample in group.samples],
        "teachers": [sample.teacher_sample for sample in group.samples],
        "lengths": [attempt.rollout.response_length for attempt in group.attempts],
    }
    if whole:
        record["prompt"] = group.prompt.messages[-1]["content"] if group.prompt.messages else ""
        record["responses"] = [attempt.rollout.text for attempt in group.attempts]
    return record
