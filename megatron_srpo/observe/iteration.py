"""The metrics of one training iteration, put together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from megatron_srpo.core.metrics import over_steps
from megatron_srpo.core.tensors import StepStats

COMPUTE = ("score", "teacher", "train")  # the phases in which the model computes
Meter = Callable[[float, float, float, float], dict[str, float]]  # see plan.Meter


def step_metrics(steps: Sequence[StepStats | None], optimizer_steps: int) -> dict[str, float]:
    """Metrics of an iteration's optimizer steps; `optimizer_steps` is the run's count so far."""
    taken = [step for step in steps if step is not None]
    return over_steps([step.metrics for step in taken]) | {
        "actor/grad_norm": sum(step.grad_norm for step in taken) / max(1, len(taken)),
        "actor/optimizer_steps": optimizer_steps,
        "actor/skipped_steps": sum(step.skipped for step in taken),
    }


def speed_metrics(
    batch: Mapping[str, float], forwarded: Mapping[str, int], seconds: Mapping[str, float], meter: Meter
) -> dict[str, float]:
    """What was forwarded and how long each phase took. `seconds` has the whole iteration as "step"."""
    scored = sum(n for name, n in forwarded.items() if name.endswith("_tokens") and name != "forward/train_tokens")
    length = batch["perf/total_tokens"] / batch["perf/sequences"]
    computing = sum(seconds.get(name, 0.0) for name in COMPUTE)
    return {
        **forwarded,
        **{f"timing_s/{name}": value for name, value in seconds.items()},
        "perf/tokens_per_second": batch["perf/total_tokens"] / seconds["step"],
        **meter(forwarded.get("forward/train_tokens", 0), scored, length, computing),
    }
