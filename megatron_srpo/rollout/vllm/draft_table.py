"""A table of fixed size that remembers which token last followed some tokens of a text.

    key = hash(group, last n tokens)  →  the token that followed them when they were seen last

A draft walks through the table: it appends the token that it finds, and looks up the n tokens that are last now. Longer
n-grams are asked first. All texts with the same group, such as the answers to one prompt, share their entries.

An entry overwrites what had its slot before, so the table never grows, and old entries disappear one by one. A wrong
draft costs time and nothing else, so no entry has to be right.
"""

from __future__ import annotations

import numpy as np

from megatron_srpo.rollout.vllm.counter_sampler import mixed

SLOTS = 2**20  # entries of one n-gram length; 12 bytes each
NOTHING = -1


class DraftTable:
    """`lengths`: the numbers of tokens n, the longest first. All arrays are one row per text."""

    def __init__(self, lengths: tuple[int, ...], slots: int = SLOTS) -> None:
        assert list(lengths) == sorted(set(lengths), reverse=True) and lengths[-1] >= 1, "the longest comes first"
        assert slots & (slots - 1) == 0, "a slot is the last bits of a hash"
        self._lengths, self._mask = lengths, np.uint64(slots - 1)
        self._keys = [np.zeros(slots, np.uint64) for _ in lengths]
        self._next = [np.full(slots, NOTHING, np.int32) for _ in lengths]
        powers = mixed(np.arange(1, lengths[0] + 1, dtype=np.uint64))
        self._weights = [powers[:length] | np.uint64(1) for length in lengths]

    @property
    def longest(self) -> int:
        """Tokens of the longest n-gram."""
        return self._lengths[0]

    def learn(self, groups: np.ndarray, contexts: np.ndarray, tokens: np.ndarray) -> None:
        """The `tokens` [m] were seen after the contexts [m, longest], whose last token is the one right before.
        `groups` [m] uint64 are those of the texts. Of equal entries the last one stays."""
        for index in range(len(self._lengths)):
            keys = self._hash(index, groups, contexts)
            slots = keys & self._mask
            self._keys[index][slots], self._next[index][slots] = keys, tokens

    def draft(self, groups: np.ndarray, contexts: np.ndarray, count: int) -> np.ndarray:
        """[m, count] int32: the tokens that may follow the contexts; from the first unknown one on, NOTHING."""
        window = np.concatenate([contexts, np.full((len(contexts), count), NOTHING, contexts.dtype)], axis=1)
        rows = np.arange(len(contexts))
        for step in range(count):
            found = self._lookup(groups[rows], window[rows, step : step + self.longest])
            rows = rows[found != NOTHING]
            if not len(rows):
                break
            window[rows, self.longest + step] = found[found != NOTHING]
        return window[:, self.longest :].astype(np.int32)

    def _lookup(self, groups: np.ndarray, contexts: np.ndarray) -> np.ndarray:
        """[m] the token of the longest n-gram that is known."""
        found = np.full(len(contexts), NOTHING, np.int32)
        for index in reversed(range(len(self._lengths))):
            keys = self._hash(index, groups, contexts)
            slots = keys & self._mask
            found = np.where(self._keys[index][slots] == keys, self._next[index][slots], found)
        return found

    def _hash(self, index: int, groups: np.ndarray, contexts: np.ndarray) -> np.ndarray:
        """[m] uint64 of the last n tokens, n being lengths[index]."""
        tokens = contexts[:, -self._lengths[index] :].astype(np.uint64)
        return mixed(groups + (tokens * self._weights[index]).sum(axis=1))
