"""A row's next-token distributions as the objective sees them, whether its logits exist or not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_srpo.losses.linear import iterate_logits, linear_gather_logprobs
from megatron_srpo.losses.vocab_parallel import gather_logprobs, local_candidates, merge_candidates, topk


class Head(Protocol):
    """Distributions softmax(logits ÷ temperature) of T positions over a vocabulary that is split over `group`."""

    @property
    def group(self) -> ProcessGroup | None: ...

    @property
    def temperature(self) -> float: ...

    def gather_logprobs(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probs at global ids [T, M] and entropies [T], fp32, over the whole vocabulary; differentiable."""

    def topk(self, k: int) -> Tensor:
        """Global ids of the k most probable tokens [T, k], the same on every rank; no gradient."""

    def logits(self) -> Tensor:
        """This rank's logits [T, v], not yet divided by the temperature; differentiable."""


@dataclass(frozen=True)
class LogitsHead:
    """Logits [T, v] that exist already."""

    values: Tensor
    vocab_start: int = 0
    group: ProcessGroup | None = None
    temperature: float = 1.0

    def gather_logprobs(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        return gather_logprobs(
            self.values, ids, vocab_start=self.vocab_start, group=self.group, temperature=self.temperature
        )

    def topk(self, k: int) -> Tensor:
        return topk(self.values, k, vocab_start=self.vocab_start, group=self.group)

    def logits(self) -> Tensor:
        return self.values


@dataclass(frozen=True)
class LinearHead:
    """Hidden states [T, H] and the head's weight, whose first `width` rows are this rank's real vocabulary."""

    hidden: Tensor
    weight: Tensor
    width: int
    vocab_start: int = 0
    group: ProcessGroup | None = None
    temperature: float = 1.0
    budget_bytes: int = 2**30  # limit of the logits that are in memory at once

    def gather_logprobs(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        return linear_gather_logprobs(
            self.hidden, self.weight, ids, width=self.width, vocab_start=self.vocab_start, group=self.group,
            temperature=self.temperature, budget_bytes=self.budget_bytes,
        )  # fmt: skip

    def topk(self, k: int) -> Tensor:
        found = [
            local_candidates(logits, k, self.vocab_start)
            for logits in iterate_logits(self.hidden, self.weight, width=self.width, budget_bytes=self.budget_bytes)
        ]
        return merge_candidates(torch.cat(found), k, self.group)

    def logits(self) -> Tensor:
        return self.hidden @ self.weight[: self.width].T
