"""What one implementation computed on one prompt, and the comparison of two of them.

T tokens, H hidden size, K ids of which log-probs are known, at each position those that may come next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

EMBEDDING = "the embedding"
HEAD = "the final norm or the head (every layer agrees)"


@dataclass
class Trace:
    """Hidden states after the embedding and after every layer, and log-probs of the next token."""

    hidden: list[torch.Tensor]  # 1 + layers of [T, H] fp32
    logprobs: torch.Tensor  # [T, K] fp32
    ids: torch.Tensor | None = None  # [T, K] int64, −1 where there is none; None: K is the whole vocabulary

    def at(self, ids: torch.Tensor) -> torch.Tensor:
        """[T, K'] log-probs of `ids`, of a trace that knows the whole vocabulary."""
        assert self.ids is None
        return self.logprobs.gather(1, ids.clamp_min(0))


@dataclass(frozen=True)
class Difference:
    """The token on which two traces are furthest apart, and from where on their hidden states differ."""

    worst: float  # |Δ log-prob|, nats
    position: int
    token: int  # whose log-prob it is
    ours: float
    theirs: float
    first: int | None  # of the embedding and the layers that differ; None: none of them
    by_layer: list[float]  # largest |Δ hidden| ÷ largest |hidden|, after the embedding and every layer

    @property
    def where(self) -> str:
        """EMBEDDING, "layer N", HEAD."""
        return HEAD if self.first is None else EMBEDDING if self.first == 0 else f"layer {self.first - 1}"


def compare(reference: Trace, other: Trace, layer_tolerances: Sequence[float]) -> Difference:
    """`other` against a reference that knows the whole vocabulary. `layer_tolerances`: largest difference that is none,
    after the embedding and every layer, as in `by_layer`. A NaN is the worst of all differences."""
    ids = other.ids
    expected = reference.logprobs if ids is None else reference.at(ids)
    gap = (other.logprobs - expected).abs().nan_to_num(nan=float("inf"))
    if ids is not None:
        gap = gap.where(ids >= 0, 0.0)
    flat = int(gap.argmax())
    position, column = divmod(flat, gap.shape[1])
    by_layer = [_relative(ours, theirs) for ours, theirs in zip(reference.hidden, other.hidden, strict=True)]
    pairs = enumerate(zip(by_layer, layer_tolerances, strict=True))
    return Difference(
        worst=float(gap[position, column]),
        position=position,
        token=column if ids is None else int(ids[position, column]),
        ours=float(expected[position, column]),
        theirs=float(other.logprobs[position, column]),
        first=next((i for i, (error, tolerance) in pairs if not error <= tolerance), None),
        by_layer=by_layer,
    )


def _relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / ours.abs().max().clamp_min(1e-30))
