"""What became of every response: rollouts.jsonl, with one line for each iteration, and the file that `eval` writes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import numpy as np
from pydantic import JsonValue

from megatron_srpo.algorithms.report import BRANCHES as BRANCHES  # for readers of the file
from megatron_srpo.algorithms.report import branch
from megatron_srpo.core.records import Attempt, Group, Rollout, Sample, Stream

FEEDBACK = 200  # characters of feedback of a prompt that is not kept whole
Decode = Callable[[Sequence[int]], str]


def groups_record(groups: Sequence[Group], texts: int, decode: Decode) -> list[dict[str, JsonValue]]:
    """One object for each prompt of an iteration; its lists are by attempt. The first `texts` prompts keep their
    question, their responses and the prompts of their teachers whole."""
    return [_trained(group, whole=number < texts, decode=decode) for number, group in enumerate(groups)]


def evaluated_record(group: Group) -> dict[str, JsonValue]:
    """One prompt of an evaluation, whole."""
    return _scored(group, whole=True) | _texts(group)


def _trained(group: Group, *, whole: bool, decode: Decode) -> dict[str, JsonValue]:
    record = _scored(group, whole=whole) | {
        "advantages": [_advantage(sample) for sample in group.first_samples],
        "branches": [branch(sample) for sample in group.first_samples],
        "why": [attempt.why for attempt in group.attempts],
        "teachers": [sample.teacher_sample for sample in group.first_samples],
        "versions": [_versions(attempt.rollout) for attempt in group.attempts],
    }
    if whole:
        record |= _texts(group)
        record["teacher_prompts"] = [
            None if sample.teacher is None else decode(_enriched(sample.teacher, sample.student))
            for sample in group.first_samples
        ]
    return record


def _versions(rollout: Rollout) -> list[JsonValue]:
    """The publishes whose weights sampled its tokens, the oldest first."""
    return [*sorted({rollout.weight_version, *(rollout.token_versions or ())})]


def _scored(group: Group, *, whole: bool) -> dict[str, JsonValue]:
    rewards = [attempt.reward for attempt in group.attempts]
    limit = None if whole else FEEDBACK
    return {
        "uid": group.prompt.uid,
        "kind": group.prompt.kind,
        "answer": json.loads(json.dumps(group.prompt.answer, default=str)),  # parquet has values that JSON has not
        "scores": list(group.scores),
        "correct": [attempt.correct for attempt in group.attempts],
        "predictions": [reward.prediction for reward in rewards],
        "feedback": [reward.feedback and reward.feedback[:limit] for reward in rewards],
        "errors": [reward.error for reward in rewards],
        "lengths": [attempt.rollout.response_length for attempt in group.attempts],
        "finish_reasons": [attempt.rollout.finish_reason for attempt in group.attempts],
    }


def _texts(group: Group) -> dict[str, JsonValue]:
    rollouts = [attempt.rollout for attempt in group.attempts]
    episodes: dict[str, JsonValue] = {}
    if any(rollout.episode is not None for rollout in rollouts):
        episodes = {"episodes": [_episode(attempt) for attempt in group.attempts]}
    return episodes | {
        "prompt": group.prompt.messages[-1]["content"] if group.prompt.messages else "",
        "responses": [rollout.text for rollout in rollouts],
    }


def _episode(attempt: Attempt) -> JsonValue:
    """A whole conversation behind its prompt: messages, and by turn the tokens that were sampled and what was wrong."""
    rollout, episode = attempt.rollout, attempt.rollout.episode
    if episode is None:
        return None
    begun = rollout.contexts[:1] if rollout.contexts and rollout.contexts[0].start == 0 else ()
    first: list[JsonValue] = [dict(message) for context in begun for message in context.messages]
    # The environment's own first messages, where they are not those of the row.
    begin: dict[str, JsonValue] = {"first_messages": first} if first else {}
    return begin | {
        "messages": [dict(message) for message in episode.messages],
        "turn_tokens": list(episode.turns),
        "turn_feedback": list(attempt.turn_feedback),
        "sequences": len(rollout.sequences),
        "tool_calls": episode.tool_calls,
        "tool_errors": episode.tool_errors,
        "cut": episode.cut,
    }


def _enriched(teacher: Stream, student: Stream) -> Sequence[int]:
    """The teacher's prompt; and what follows it, if that has feedback in it too (teacher.feedback_at = "turn")."""
    more = teacher.response_ids is not student.response_ids
    return [*teacher.prompt_ids, *teacher.response_ids] if more else teacher.prompt_ids


def _advantage(sample: Sample) -> float:
    """Its mean over the trained tokens, if it differs between them."""
    given = np.asarray(sample.advantage, dtype=np.float64)
    return float(given.mean()) if given.size else 0.0
