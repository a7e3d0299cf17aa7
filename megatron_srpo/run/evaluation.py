"""Held-out evaluation: avg@k, pass@k and maj@k of k sampled answers to each prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from megatron_srpo.core.records import Attempt, Group


def accuracy_metrics(groups: Sequence[Group], *, k: int) -> dict[str, float]:
    """Means over prompts. avg@k: share of correct answers; pass@k: any answer is correct; maj@k: the answer that occurs
    most often is correct. Answers are compared by the reward's prediction, or by the whole response where it has none;
    ties go to the first."""
    n = max(1, len(groups))
    attempts = [attempt for group in groups for attempt in group.attempts]
    average = sum(sum(a.correct for a in group.attempts) / len(group.attempts) for group in groups)
    return {
        "eval/accuracy": average / n,
        f"eval/avg@{k}": average / n,
        f"eval/pass@{k}": sum(any(a.correct for a in group.attempts) for group in groups) / n,
        f"eval/maj@{k}": sum(_majority_is_correct(group.attempts) for group in groups) / n,
        "eval/prompts": len(groups),
        "eval/response_length": sum(a.rollout.response_length for a in attempts) / max(1, len(attempts)),
        "eval/truncated": sum(a.rollout.finish_reason == "length" for a in attempts) / max(1, len(attempts)),
    }


def _majority_is_correct(attempts: Sequence[Attempt]) -> bool:
    answers = [a.rollout.text.strip() if a.reward.prediction is None else a.reward.prediction for a in attempts]
    winner = Counter(answers).most_common(1)[0][0]
    return attempts[answers.index(winner)].correct
