"""What a run really reached, in the planner's own FLOPs."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_srpo.plan.architecture import Architecture
from megatron_srpo.plan.duration import forward_flops
from megatron_srpo.plan.hardware import MACHINES

BACKWARD = 2  # backward products for each forward one; recomputation is not work of the model's


@dataclass(frozen=True)
class Meter:
    """`device` is torch's name of a GPU ("NVIDIA H100 80GB HBM3"), "" for a CPU: then there is no share of a peak."""

    architecture: Architecture
    ranks: int
    device: str = ""

    @property
    def peak(self) -> float:
        """Dense FLOP/s of one GPU by its data sheet; 0 if it is not in the planner's table."""
        words = self.device.lower().replace("-", " ").split()
        return next((machine.flops for name, machine in MACHINES.items() if name in words), 0.0)

    def __call__(self, trained: float, scored: float, length: float, seconds: float) -> dict[str, float]:
        """Metrics of one iteration: tokens trained (forward and backward) and scored (forward) by all ranks, the mean
        sequence length, and the seconds that it took."""
        work = (trained * (1 + BACKWARD) + scored) * forward_flops(self.architecture, length)
        rate = work / seconds / self.ranks
        return {"perf/tflops_per_gpu": rate / 1e12} | ({"perf/mfu": rate / self.peak} if self.peak else {})
