"""Which tokens the samples of a row share: the equal beginnings of the prompts of a group, as a tree.

    group    question … │ demonstration a │ response 0
                        │                 │ response 1
                        │ demonstration b │ response 2
    turns    prompt … │ response 0
                      │ turn 1 … │ response 1
                                 │ turn 2 … │ response 2

A prefix ends before the last token of every prompt that it is of, because that token predicts a response's first.
Nothing is told by those who make samples: prompts are compared, so that everything that is equal is found.

Sharing is never to cost more than it saves. Without Transformer Engine, attention behind a prefix goes through a mask
and computes all pairs of L tokens and their P + L keys, of which causal attention computes only those that it needs. So
tokens are shared where that makes less work (`_pays`), which a short prompt before very long responses does not.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_srpo.core.records import Padding, Sample, StreamName

SHORTEST_SHARED = 8  # tokens; sharing fewer saves less than the attention behind a prefix costs

Chain = tuple[tuple[Hashable, int], ...]
"""The prefixes of a sample, the outermost first: what identifies each in its row, and the number of the sample's tokens
up to its end."""


def prefixes_of(indices: Sequence[int], samples: Sequence[Sample], padding: Padding, stream: StreamName) -> list[Chain]:
    """The prefixes of each sample of a row."""
    groups: dict[Hashable, dict[int, _Prompt]] = {}
    keys: list[tuple[Hashable, int]] = []
    for index in indices:
        sample = samples[index]
        ids = sample.stream(stream).prompt_ids
        # Experts that are used again are known to be equal for the samples of one prompt alone.
        apart = stream == "student" and sample.experts is not None
        group: Hashable = id(ids) if apart else sample.uid
        keys.append((group, id(ids)))  # a group's equal prompts are one object (Stream), also on another rank
        same = sample.same_experts if stream == "student" else None
        limit = len(ids) - 1 if same is None else min(len(ids) - 1, same)
        prompt = groups.setdefault(group, {}).setdefault(id(ids), _Prompt(ids, limit))
        prompt.lengths.append(sample.length_of(stream))
    for number, prompts in enumerate(groups.values()):
        _grow(list(prompts.values()), padding, number)
    return [groups[group][prompt].chain for group, prompt in keys]


@dataclass
class _Prompt:
    """A prompt that one or more samples of a row have."""

    ids: array[int]
    limit: int  # so many of its first tokens may be shared
    lengths: list[int] = field(default_factory=list)  # tokens of these samples
    chain: Chain = ()


def _grow(prompts: list[_Prompt], padding: Padding, group: int) -> None:
    """Give the prompts of a group their chains. Episodes of many turns make a deep tree, so nothing here recurses."""
    waiting: list[tuple[list[_Prompt], int, int, Chain]] = [(prompts, 0, 0, ())]
    while waiting:  # prompts that have `chain` in common, `shared` tokens, and whose first `equal` tokens are equal
        prompts, equal, shared, chain = waiting.pop()
        common = _common(prompts, equal)
        lengths = [length for prompt in prompts for length in prompt.lengths]
        if len(lengths) > 1:
            end = min(common, *(prompt.limit for prompt in prompts))
            end -= end % padding.sequence
            if end - shared >= SHORTEST_SHARED and _pays(shared, end, lengths, padding.attention_length):
                shared, chain = end, (*chain, ((group, id(prompts[0].ids), end), end))
        if len(prompts) == 1:
            prompts[0].chain = chain
            continue
        longer = [prompt for prompt in prompts if len(prompt.ids) > common]
        if len(longer) < len(prompts):  # the others end here, and keep the longer ones from sharing their last token
            ending = [[prompt] for prompt in prompts if len(prompt.ids) == common]
            waiting += [(part, common, shared, chain) for part in [*ending, longer] if part]
            continue
        branches: dict[int, list[_Prompt]] = {}
        for prompt in prompts:
            branches.setdefault(prompt.ids[common], []).append(prompt)
        waiting += [(branch, common + 1, shared, chain) for branch in branches.values()]


def _pays(start: int, end: int, lengths: Sequence[int], attention_length: int) -> bool:
    """Whether it is less work that samples of these lengths, which share `start` tokens, share those up to `end`."""
    apart = sum(_cost(start, length, attention_length) for length in lengths)
    shared = _cost(start, end, attention_length)
    return shared + sum(_cost(end, length, attention_length) for length in lengths) < apart


def _cost(start: int, end: int, attention_length: int) -> float:
    """Work for the tokens of a sequence from `start` to `end`, in units of one token's matrix products."""
    own = end - start
    if not attention_length:
        return own
    pairs = 2 * own * end if start else own * own  # behind a prefix all of them, else the causal half
    return own + pairs / attention_length


def _common(prompts: Sequence[_Prompt], equal: int) -> int:
    """How many first tokens are equal in all of them; the first `equal` ones are known to be."""
    first = np.frombuffer(prompts[0].ids, dtype=np.int32)
    common = len(first)
    for prompt in prompts[1:]:
        other = np.frombuffer(prompt.ids, dtype=np.int32)[equal:common]
        differs = first[equal : equal + len(other)] != other
        common = equal + (int(differs.argmax()) if differs.any() else len(other))
    return common
