"""A row's next-token distributions as the objective sees them, whether its logits exist or not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_srpo.losses.linear import iterate_logits, linear_gather_statistics, logprobs_at
from megatron_srpo.losses.vocab_parallel import gather_statistics, local_candidates, merge_candidates, topk


class Head(Protocol):
    """Distributions softmax(logits ÷ temperature) of T positions over a vocabulary that is split over `group`."""

    @property
    def group(self) -> ProcessGroup | None: ...

    @property
    def temperature(self) -> float: ...

    def gather_logprobs(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probs at global ids [T, M] and entropies [T], fp32, over the whole vocabulary; differentiable."""

    def gather_statistics(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same, and log Σ exp(logit ÷ temperature) [T] without gradient."""

    def gather_topk(self, ids: Tensor, k: int, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probs [T, 1 + k] at `ids` [T, 1] and at the k most probable tokens of the ascending positions `at` [n],
        entropies [T], both differentiable, and the ids of these tokens [T, k]. At other positions `ids` fills both."""

    def logprobs_at(self, ids: Tensor, normaliser: Tensor) -> Tensor:
        """Log-probs [T, M] at global ids, given what `gather_statistics` found [T]; no gradient."""

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
        return self.gather_statistics(ids)[:2]

    def gather_statistics(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return gather_statistics(
            self.values, ids, vocab_start=self.vocab_start, group=self.group, temperature=self.temperature
        )

    def gather_topk(self, ids: Tensor, k: int, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = ids.repeat(1, k)
        found[at] = topk(self.values[at], k, vocab_start=self.vocab_start, group=self.group)
        return *self.gather_logprobs(torch.cat([ids, found], 1)), found

    def logprobs_at(self, ids: Tensor, normaliser: Tensor) -> Tensor:
        return self.gather_logprobs(ids)[0].detach()

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
        return self.gather_statistics(ids)[:2]

    def gather_statistics(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self._statistics(ids)[:3]

    def gather_topk(self, ids: Tensor, k: int, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logprobs, entropy, _, found = self._statistics(ids, k, at)
        return logprobs, entropy, found

    def logprobs_at(self, ids: Tensor, normaliser: Tensor) -> Tensor:
        return logprobs_at(
            self.hidden, self.weight, ids, normaliser, width=self.width, vocab_start=self.vocab_start,
            group=self.group, temperature=self.temperature, budget_bytes=self.budget_bytes,
        )  # fmt: skip

    def _statistics(self, ids: Tensor, k: int = 0, at: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return linear_gather_statistics(
            self.hidden, self.weight, ids, width=self.width, vocab_start=self.vocab_start, group=self.group,
            temperature=self.temperature, budget_bytes=self.budget_bytes, k=k, at=at,
        )  # fmt: skip

    def topk(self, k: int) -> Tensor:
        found = [
            local_candidates(logits, k, self.vocab_start)
            for logits in iterate_logits(self.hidden, self.weight, width=self.width, budget_bytes=self.budget_bytes)
        ]
        return merge_candidates(torch.cat(found), k, self.group)[1]

    def logits(self) -> Tensor:
        return self.hidden @ self.weight[: self.width].T
