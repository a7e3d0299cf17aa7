"""Held-out evaluation: avg@k, pass@k and maj@k of k sampled answers a prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from megatron_srpo.core.records import Reward, Rollout


def accuracy_metrics(
    rollouts: Sequence[Rollout], rewards: Sequence[Reward], *, threshold: float, k: int
) -> dict[str, float]:
    """Means over prompts. avg@k: share of correct answers; pass@k: any answer correct; maj@k: the answer that occurs
    most often is correct (answers are compared by the reward's prediction, which the whole response stands in for where
    there is none; ties go to the first)."""
    groups: dict[int, list[tuple[str, bool]]] = {}
    for rollout, reward in zip(rollouts, rewards, strict=True):
        answer = rollout.text.strip() if reward.prediction is None else reward.prediction
        groups.setdefault(rollout.prompt, []).append((answer, reward.score >= threshold))
    average = sum(sum(ok for _, ok in group) / len(group) for group in groups.values())
    passed = sum(any(ok for _, ok in group) for group in groups.values())
    majority = 0
    for group in groups.values():
        winner = Counter(answer for answer, _ in group).most_common(1)[0][0]
        majority += next(ok for answer, ok in group if answer == winner)
    n = max(1, len(groups))
    return {
        "eval/accuracy": average / n,
        f"eval/avg@{k}": average / n,
        f"eval/pass@{k}": passed / n,
        f"eval/maj@{k}": majority / n,
        "eval/prompts": len(groups),
        "eval/response_length": sum(len(r.token_ids) for r in rollouts) / max(1, len(rollouts)),
        "eval/truncated": sum(r.finish_reason == "length" for r in rollouts) / max(1, len(rollouts)),
    }
