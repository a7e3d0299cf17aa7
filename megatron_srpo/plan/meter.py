"""Computes what a run really reaches, from the planner's own count of FLOPs."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_srpo.plan.architecture import Architecture
from megatron_srpo.plan.duration import forward_flops
from megatron_srpo.plan.hardware import MACHINES

# A backward pass takes twice the FLOPs of a forward pass, and as many if the weights are frozen, whose gradients nobody
# computes. Recomputation does not count.
BACKWARD, BACKWARD_FROZEN = 2, 1


@dataclass(frozen=True)
class Meter:
    """Calling it gives the metrics of an iteration. `device` is torch's name of the GPU, e.g. "NVIDIA H100 80GB HBM3";
    it is "" for a CPU, which has no known peak."""

    architecture: Architecture
    ranks: int
    device: str = ""
    frozen: bool = False  # only LoRA adapters are trained

    @property
    def peak(self) -> float:
        """Dense FLOP/s of one GPU according to its data sheet; 0 if the planner does not know the GPU."""
        words = self.device.lower().replace("-", " ").split()
        return next((machine.flops for name, machine in MACHINES.items() if name in words), 0.0)

    def __call__(self, trained: float, scored: float, length: float, seconds: float) -> dict[str, float]:
        """Metrics of one iteration. `trained` and `scored` are tokens on all ranks (forward and backward, or forward
        only), `length` is the mean sequence length, `seconds` the duration."""
        backward = BACKWARD_FROZEN if self.frozen else BACKWARD
        work = (trained * (1 + backward) + scored) * forward_flops(self.architecture, length)
        rate = work / seconds / self.ranks
        return {"perf/tflops_per_gpu": rate / 1e12} | ({"perf/mfu": rate / self.peak} if self.peak else {})
