"""rollouts.jsonl: an iteration a line, what every response earned, which branch it took and who taught it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_srpo.core.records import Prompt, Reward, Rollout, RoutedSample


def groups_record(
    prompts: Sequence[Prompt], rollouts: Sequence[Rollout], rewards: Sequence[Reward],
    samples: Sequence[RoutedSample], texts: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """One object a prompt; its lists are by sample. `samples[i]` is what became of `rollouts[i]`. The first `texts`
    prompts keep their question and their responses whole."""
    groups: list[dict[str, Any]] = [
        {"uid": prompt.uid, "scores": [], "branches": [], "teachers": [], "lengths": []} for prompt in prompts
    ]
    for group, prompt in zip(groups[:texts], prompts, strict=False):
        group |= {"prompt": prompt.messages[-1]["content"] if prompt.messages else "", "responses": []}
    for rollout, reward, sample in zip(rollouts, rewards, samples, strict=True):
        group = groups[rollout.prompt]
        group["scores"].append(reward.score)
        group["branches"].append(branch(sample))
        group["teachers"].append(sample.teacher_sample)
        group["lengths"].append(len(rollout.token_ids))
        if "responses" in group:
            group["responses"].append(rollout.text)
    return groups


def branch(sample: RoutedSample) -> str:
    """In words: "grpo", "sdpo", "mix" of both, or "out" of the loss."""
    if sample.distill_weight > 0:
        return "mix" if sample.policy_weight > 0 else "sdpo"
    return "grpo" if sample.policy_weight > 0 else "out"
