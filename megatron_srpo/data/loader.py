"""Batches of prompts. The order depends on the seed and the epoch alone, and a checkpoint stores the position in it."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence

from megatron_srpo.core.records import Prompt
from megatron_srpo.data.dataset import DataError


class PromptLoader:
    """Infinite batches of `batch_size` prompts.

    Every epoch shows each prompt once, in an order drawn from (seed, epoch), or in file order without `shuffle`.
    A batch may continue into the next epoch, so it may also be larger than the data set.
    """

    def __init__(self, prompts: Sequence[Prompt], batch_size: int, *, seed: int = 0, shuffle: bool = True) -> None:
        if not prompts:
            raise DataError("the data set is empty: there is nothing to train on")
        if batch_size < 1:
            raise DataError(f"rollout.rollout_batch_size: expected at least 1, got {batch_size}")
        self._prompts = list(prompts)
        self._batch_size = batch_size
        self._seed, self._shuffle = seed, shuffle
        self._fingerprint = _fingerprint(self._prompts)
        self._epoch, self._position = 0, 0
        self._order = self._draw()

    @property
    def prompts(self) -> Sequence[Prompt]:
        """All prompts, in the order of the file."""
        return self._prompts

    @property
    def epoch(self) -> int:
        """How often the whole data set has been shown; 0 during the first pass."""
        return self._epoch

    def next_batch(self) -> list[Prompt]:
        batch: list[Prompt] = []
        while len(batch) < self._batch_size:
            some = self._order[self._position : self._position + self._batch_size - len(batch)]
            batch.extend(self._prompts[index] for index in some)
            self._position += len(some)
            if self._position == len(self._order):
                self._epoch, self._position = self._epoch + 1, 0
                self._order = self._draw()
        return batch

    def state_dict(self) -> dict[str, int | str]:
        """The position, and what identifies the data and its order, as JSON values."""
        return {"epoch": self._epoch, "position": self._position, **self._identity()}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue at the position of `state`. DataError if it belongs to other data or to another order; the batch
        size may differ."""
        for key, mine in self._identity().items():
            if state.get(key) != mine:
                raise DataError(
                    f"the checkpoint's data order cannot be continued: its {_NAMES[key]} is {state.get(key)!r}, this "
                    f"run's is {mine!r}. Restore it, or start again: checkpoint.resume = false"
                )
        epoch, position = state.get("epoch"), state.get("position")
        if not isinstance(epoch, int) or not isinstance(position, int) or not 0 <= position < len(self._prompts):
            raise DataError(f"the checkpoint's data position is damaged: epoch {epoch!r}, position {position!r}")
        self._epoch, self._position = epoch, position
        self._order = self._draw()

    def _identity(self) -> dict[str, int | str]:
        return {
            "size": len(self._prompts), "fingerprint": self._fingerprint, "seed": self._seed, "shuffle": self._shuffle
        }  # fmt: skip

    def _draw(self) -> list[int]:
        order = list(range(len(self._prompts)))
        if self._shuffle:
            # Python hashes a text seed with SHA-512, so that neighbouring seeds and epochs give unrelated orders.
            random.Random(f"megatron_srpo:order:{self._seed}:{self._epoch}").shuffle(order)
        return order


_NAMES = {
    "size": "number of prompts",
    "fingerprint": "data set",
    "seed": "run.seed",
    "shuffle": "data.shuffle",
}


def _fingerprint(prompts: list[Prompt]) -> str:
    digest = hashlib.sha256()
    for prompt in prompts:
        facts = [prompt.uid, prompt.token_ids, prompt.kind, prompt.answer]
        digest.update(json.dumps(facts, sort_keys=True, default=str).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:32]
