"""Routing replay: the experts of a token are given instead of chosen again (R3, arXiv 2510.11370). The routers are also
told which tokens of a row are padding: these are not counted, and go to all experts in turn.

The gate still weighs the given experts, so its gradient flows through their values; only the choice is fixed. Every
router has a RowReplay under Megatron's name `router_replay`, which Megatron asks for the top-k of each row.

Which row is it? A router sees the rows of a pass in order, and sees them in order once more where activations are
recomputed. A recomputed forward pass runs first without and later with gradients, so the k-th call of each sort is for
row k, whatever the pipeline schedule does in between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from megatron.core.transformer.moe.router_replay import RouterReplay
from torch import Tensor

FREE = -1  # in place of an expert's number: the router chooses for this token
# Of a token in `RowReplay.compared`; the largest of several layers counts.
NOT_REPLAYED, SAME, DIFFERENT = 0, 1, 2
TopK = Callable[..., tuple[Tensor, Tensor]]  # Megatron's: scores [T, E] → values and indices [T, K]


class RowReplay(RouterReplay):
    """One router's experts in the rows of a pass: given, recorded, or neither. T: this rank's tokens of a row."""

    def __init__(self) -> None:
        # Megatron's own __init__ adds to a global list, which would mix the models of one process.
        self.begin([])

    def begin(
        self, given: Sequence[Tensor | None], *, record: bool = False, padding: Sequence[Tensor | None] = ()
    ) -> None:
        """Before a pass. `given` has [T, K] integers for each row, FREE where the router chooses, or None; an empty
        list leaves all to the router. `padding` has [T] bool for each row, True where it is filled up, or None; an
        empty list means that no row is."""
        self._given, self._calls = list(given), [0, 0]  # calls without and with gradients
        self._padding = list(padding)
        self.padding: Tensor | None = None  # [T] of the row that was asked for last, on the router's device
        self.padded = 0  # how many tokens of that row are padding
        self._record = record
        self.recorded: list[Tensor] = []  # [T, K] int16 in host memory, a row each: what was used
        self.compared: list[Tensor] = []  # [T] uint8, a row of a training pass each: whether the router agrees

    def end(self) -> None:
        """After a pass: forget it. Every given row must have been computed."""
        assert max(self._calls) >= len(self._given) and set(self._calls) <= {0, max(self._calls)}, (
            f"a router was called {self._calls} times for {len(self._given)} rows"
        )
        self.begin([])

    def get_replay_topk(
        self, scores: Tensor, topk: int, num_groups: int | None = None, group_topk: int | None = None,
        default_compute_topk: TopK | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Megatron's hook: values and indices of the experts of each token, [T, K]."""
        assert default_compute_topk is not None, "Megatron passes its own choice"
        values, chosen = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        learning = torch.is_grad_enabled()
        row = self._calls[learning]
        self._calls[learning] += 1
        given = self._given[row] if self._given else None
        padding = self._padding[row] if self._padding else None
        self.padding = None if padding is None else padding.to(chosen.device, non_blocking=True)
        self.padded = 0 if padding is None else int(padding.sum())
        if given is not None:
            own, given = chosen, given.to(device=chosen.device, dtype=chosen.dtype)
            assert given.shape == own.shape, f"experts of {tuple(given.shape)} for a row of {tuple(own.shape)}"
            free = given[:, :1] == FREE
            chosen = torch.where(free, own, given)
            values = scores.gather(1, chosen)
        if self.padding is not None:
            chosen = torch.where(self.padding[:, None], _spread(chosen, scores.size(1)), chosen)
            values = scores.gather(1, chosen)
        if self._record:
            self.recorded.append(chosen.to("cpu", torch.int16))  # on a GPU those of all rows would be hundreds of MB
        if self._given and learning:
            compared = torch.full_like(chosen[:, 0], NOT_REPLAYED, dtype=torch.uint8)
            if given is not None:
                differs = (given.sort(-1).values != own.sort(-1).values).any(-1)
                compared = torch.where(free[:, 0], compared, SAME + differs.to(torch.uint8))
            self.compared.append(compared)
        return values, chosen


def _spread(like: Tensor, experts: int) -> Tensor:
    """Experts in turn, [T, K] as `like`. Tokens of padding are all the same, and would all choose the same experts: the
    ranks that have these would hold most of what an interleaved pipeline fills its rows up with."""
    return torch.arange(like.numel(), device=like.device).remainder_(experts).view_as(like)
