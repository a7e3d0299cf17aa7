"""Groups and samples made by hand."""

from __future__ import annotations

from array import array

import numpy as np

from megatron_srpo.core.records import Attempt, Group, Prompt, Reward, Rollout, Sample, Stream


def make_groups(prompts, rollouts, rewards, *, threshold=0.5):
    """`rewards[i]` belongs to `rollouts[i]`, whose `prompt` is an index into `prompts`."""
    groups = [Group(prompt, []) for prompt in prompts]
    for rollout, reward in zip(rollouts, rewards, strict=True):
        groups[rollout.prompt].attempts.append(Attempt(rollout, reward, reward.score >= threshold))
    return groups


def stream(prompt_ids, response_ids, trained=None):
    """A sequence; `trained`: a mask of the response, all of it by default."""
    mask = [True] * len(response_ids) if trained is None else list(trained)
    return Stream(array("i", prompt_ids), array("i", response_ids), np.array(mask, dtype=bool))


def make_sample(
    uid, number, prompt_ids, response_ids, logprobs, *, advantage=0.5, weights=None, teacher_ids=None, trained=None
):
    """A sample; its teacher reads `teacher_ids` in front of the same response."""
    return Sample(
        uid=uid, sample=number, student=stream(prompt_ids, response_ids, trained),
        rollout_logprobs=np.array(logprobs, dtype=np.float32), advantage=advantage,
        weights={"policy": 1.0} if weights is None else weights,
        teacher=None if teacher_ids is None else stream(teacher_ids, response_ids, trained),
    )  # fmt: skip


__all__ = ["Attempt", "Group", "Prompt", "Reward", "Rollout", "make_groups", "make_sample", "stream"]
