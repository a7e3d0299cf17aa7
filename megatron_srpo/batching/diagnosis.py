"""What went wrong in a run that goes on: named in warnings, counted, and in the end a reason to stop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_srpo.batching.passes import BatchPasses
from megatron_srpo.core.protocols import Control, Log
from megatron_srpo.core.records import MiniBatchPlan
from megatron_srpo.core.tensors import StepStats


def explain_skip(passes: BatchPasses, mini: MiniBatchPlan, control: Control, log: Log, iteration: int) -> None:
    """Warn which samples made a step's gradient infinite or NaN. All ranks call it."""
    names = sorted({text for part in control.collect(passes.nonfinite(mini)) for text in part})
    cause = f"Not finite: {shortened(names)}" if names else "All scores are finite: it arose in the backward pass"
    log.warn(f"iteration {iteration}: the gradient is not finite, the optimizer step was skipped. {cause}")


FAILED_PROMPTS = 2  # of one kind in a row, with all their rewards failed, end the run: a single one may be a bad row
KIND, ERRORS = "kind/", "/error_fraction"


class SkippedSteps:
    """Counts optimizer steps that were skipped one after the other; `limit` of them end the run (0: never). Counts also
    the prompts of each kind, one after the other, of which every reward failed; a resumed run counts these anew."""

    def __init__(self, limit: int, in_a_row: int = 0) -> None:
        self._limit, self.in_a_row = limit, in_a_row
        self._failed: dict[str, int] = {}  # prompts by kind

    def count(self, steps: Sequence[StepStats | None], metrics: Mapping[str, float]) -> None:
        """One iteration's steps; None stands for no step."""
        self.in_a_row = consecutive_skips(self.in_a_row, steps)
        if metrics["rollout/nonfinite_samples"] == metrics["rollout/responses"]:
            self.in_a_row += 1  # there was no step to take
        for name, share in metrics.items():
            if name.startswith(KIND) and name.endswith(ERRORS):
                kind = name.removeprefix(KIND).removesuffix(ERRORS)
                before = self._failed.get(kind, 0)
                self._failed[kind] = before + int(metrics[f"{KIND}{kind}/prompts"]) if share == 1 else 0

    def reason_to_stop(self, metrics: Mapping[str, float]) -> str:
        """Why going on would be a waste, or ""; the same on all ranks."""
        if 0 < self._limit <= self.in_a_row:
            return (
                f"{self.in_a_row} optimizer steps in a row had nothing finite (train.max_skipped_steps). "
                "The weights of the last good step are saved; the warnings above name what was not finite"
            )
        if metrics.get("reward/error_fraction") == 1:
            return (
                "not one of its rewards could be had, and a warning above says why. Mend the reward function "
                "(reward.functions, reward.timeout_seconds) or the environment (environment.classes); the same command "
                "goes on from here"
            )
        for kind, prompts in self._failed.items():
            if prompts >= FAILED_PROMPTS:
                return (
                    f"not one reward of kind {kind!r} could be had for {prompts} prompts in a row, and a warning above "
                    f"says why. Mend its function (reward.functions.{kind}, reward.timeout_seconds) or its environment "
                    f"(environment.classes.{kind}); the same command goes on from here"
                )
        return ""


def consecutive_skips(before: int, steps: Sequence[StepStats | None]) -> int:
    """How many of the newest optimizer steps were skipped one after the other; None stands for no step."""
    for step in steps:
        if step is not None:
            before = before + 1 if step.skipped else 0
    return before


def shortened(names: list[str], shown: int = 5) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
