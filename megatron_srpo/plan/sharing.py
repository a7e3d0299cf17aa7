"""How often packed rows compute a shared prompt, and what sharing keeps besides."""

from __future__ import annotations

import math

from megatron_srpo.plan.layout import Layout
from megatron_srpo.plan.workload import Workload


def prompt_copies(
    workload: Workload, layout: Layout, *, path: str = "te", share: float = 1.0, own: float | None = None
) -> float:
    """How often a pass over this share of the samples computes each prompt. Samples share it within a row, and a group
    is cut up if it is longer than a row, or if there are more data-parallel ranks than prompts. `own`: the tokens of a
    sample that are not its prompt's; None: its response and the prompt's last token."""
    samples = share * workload.samples
    if not workload.shares_prompts or (path == "te" and layout.context > 1):
        return samples
    room = max(1.0, layout.max_tokens * layout.context * workload.packing - workload.prompt_mean)
    own = 1 + workload.student_tokens / workload.rollouts - workload.prompt_mean if own is None else own
    rows, ranks = samples * own / room, layout.data * workload.steps / workload.prompts
    return min(samples, max(1.0, math.ceil(rows), ranks))


def question_copies(workload: Workload, layout: Layout, *, path: str = "te") -> float:
    """`prompt_copies` of the teacher's pass, in which some samples are behind the same demonstration."""
    response = workload.student_tokens / workload.rollouts - workload.prompt_mean
    own = 1 + response + workload.demonstrations(1.0) / workload.taught * workload.demonstration
    return prompt_copies(workload, layout, path=path, share=workload.distilled, own=own)


def kept_keys(workload: Workload, layout: Layout, *, path: str = "te") -> tuple[float, float]:
    """How many keys attention keeps for each token, in the (train pass, fullest scoring pass)."""
    student = workload.shared_keys(prompt_copies(workload, layout, path=path))
    if not workload.taught:
        return student, student
    return student, max(student, workload.teacher_keys(question_copies(workload, layout, path=path)))
