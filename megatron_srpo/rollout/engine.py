"""The protocol of a rollout engine: what the trainer asks, whichever engine answers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, cast

import numpy as np
import torch

from megatron_srpo.core.errors import UserError
from megatron_srpo.core.records import Experts, Prompt, Rollout

OnRollout = Callable[[Rollout], None]
T = TypeVar("T")


class Control(Protocol):
    """The control channel between ranks, as far as engines use it."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def share(self, compute: Callable[[], T]) -> T:
        """Run `compute` on rank 0. Every rank gets its result, or raises its exception."""
        ...

    def receive(self) -> object:
        """Other ranks: the result, or the exception, of what rank 0 shares."""
        ...

    def gather(self, mine: T) -> list[T]:
        """What every rank brings, by rank, on rank 0; [] on the other ranks."""
        ...


class RolloutError(UserError):
    """An engine cannot start, or cannot serve a request. The message says what was expected, what came, and the
    cure."""


@dataclass(frozen=True)
class SamplingSettings:
    """How all requests of one call are sampled.

    The returned log-probs are of the distribution that was sampled from: after temperature, and, when top_p < 1 or
    top_k > 0, renormalised over the kept tokens. Training needs top_p = 1 and top_k = 0.
    """

    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    max_tokens: int = 16
    ignore_eos: bool = False  # continue to max_tokens (benchmarks)
    experts: bool = False  # Rollout.experts is wanted; the engine must have been started for it
    goes_on: bool = False  # every request continues one of the call before: engines in ranks keep their caches


@dataclass(frozen=True)
class GenerateRequest:
    """One response to one prompt."""

    prompt: int  # index of the prompt in the batch
    sample: int  # 0 … G-1 inside its group
    token_ids: list[int]  # of the prompt
    seed: int  # of this response's sampling; see request_seed
    max_tokens: int = 0  # of this response, at most those of the call; 0: as many
    begun: Sequence[int] = ()  # the response so far, behind the prompt; Rollout.text contains it as well
    cut: bool = False  # the response goes on after max_tokens: its finish_reason is then "part", and it has no text
    row: Prompt | None = None  # what an episode is about; None: one turn
    group_seed: int = 0  # of the environment: the same for all samples of a group

    @property
    def length(self) -> int:
        """Tokens that are there already."""
        return len(self.token_ids) + len(self.begun)

    def longest(self, sampling: SamplingSettings) -> int:
        """Tokens of its longest response."""
        return self.max_tokens or sampling.max_tokens


def request_seed(run_seed: int, iteration: int, uid: str, sample: int) -> int:
    """A seed in 0 … 2⁶³−1 that depends on its arguments only: not on the batch, the number of engines or the
    process."""
    key = f"{run_seed}/{iteration}/{sample}/{uid}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1


def experts_of_turns(records: Sequence[Experts]) -> Experts:
    """Rollout.experts of a sequence that several requests have generated, each of which continued the one before: a
    token has the experts with which it was first computed. `records` are those of the requests' answers."""
    joined = records[0]
    for record in records[1:]:
        assert len(record) > len(joined), "each turn has more tokens than the one before"
        joined = cast("Experts", np.concatenate([joined, record[len(joined) :]]))  # NumPy's type forgets the numbers'
    return joined


def turn_seed(seed: int, turn: int) -> int:
    """The seed of a later turn of an episode, from that of its first turn, number 0."""
    if turn == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}/turn {turn}".encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "big") >> 1


def check_lengths(requests: Sequence[GenerateRequest], sampling: SamplingSettings, max_model_len: int) -> None:
    """Raise RolloutError for a prompt that leaves no room for its longest response."""
    for request in requests:
        longest = request.longest(sampling)
        if not 0 < request.length <= max_model_len - longest:
            raise RolloutError(
                f"prompt {request.prompt} has {request.length} tokens: expected 1 to "
                f"{max_model_len - longest}, so that {longest} more fit in "
                f"{max_model_len}. Raise data.max_prompt_length, or drop it."
            )


def decode_inside(vocab_size: int, decode: Callable[[list[int]], str], ids: list[int]) -> str:
    """The text of a response. ValueError for a token id that the model does not have: it would end the trainer deep
    inside its embedding."""
    # These run in C; a Python loop over all tokens would cost rank 0 minutes per iteration of a large run.
    if ids and (set(map(type, ids)) != {int} or min(ids) < 0 or max(ids) >= vocab_size):
        bad = next(token for token in ids if type(token) is not int or not 0 <= token < vocab_size)
        raise ValueError(f"token id {bad!r} is outside the vocabulary of model.path, which has {vocab_size}")
    return decode(ids)


class Feed(Protocol):
    """Requests that become ready while others are being answered: the turns of episodes, each behind its last."""

    rollouts: list[Rollout]  # of the episodes that are complete

    def ready(self, *, wait: bool) -> list[GenerateRequest] | None:
        """Requests that are ready and were not given before; None if there will be no more. With `wait` it returns
        when there is one, or None. At any time an episode, which (prompt, sample) identifies, has one request at
        most. What fails in an episode is not raised here, but what fails around it is."""

    def answer(self, rollout: Rollout) -> None:
        """The response to a request; it must be quick, and must not raise. Called from any thread."""

    def stop(self) -> None:
        """Have `ready` return None at once: an engine has failed. Called from any thread."""


class RolloutEngine(Protocol):
    """Generates responses with weights that the trainer publishes. Every rank calls every method, in the same order."""

    weight_version: int  # of the last publish; 0: the weights of the folder

    def generate(
        self, requests: Sequence[GenerateRequest], sampling: SamplingSettings,
        on_rollout: OnRollout | None = None,
    ) -> list[Rollout]:  # fmt: skip
        """One Rollout for each request, sorted by (prompt, sample), on global rank 0; [] on the other ranks.

        Every rank passes the same requests. A seed gives the same response whatever else is in the batch. `on_rollout`
        is called with each response when it is complete, while others are still being generated. It is called on one
        rank, the one that has the response first. It must be quick, and must not raise.
        """
        ...

    def converse(
        self, requests: Sequence[GenerateRequest], sampling: SamplingSettings,
        begin: Callable[[list[GenerateRequest]], Feed],
    ) -> None:  # fmt: skip
        """Answer the requests of feeds until these have no more. Every rank passes the same `requests`, which stand
        for episodes. A rank that has an engine calls `begin` with its share of them, and serves the feed that it
        returns: it generates whatever is ready, while other episodes wait for their environments."""
        ...

    def publish(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Load new weights, given as (Hugging Face name, full tensor) on every rank, and drop the caches. Until the
        next publish every iteration of `weights` must give the same tensors: engines that are restarted get them
        again."""
        ...

    def metrics(self) -> dict[str, float]:
        """Metrics of the last `generate` on rank 0; {} on the other ranks."""
        ...

    def sleep(self, *, publish_next: bool = False) -> None:
        """Free the device's memory until it is needed, if the device supports it. A publish takes back the memory of
        the weights only, `generate` all of it. With `publish_next` the weights need not be kept: the next call is a
        publish, which replaces them all."""
        ...

    def close(self) -> None:
        """Release all resources. It is safe to call this twice."""
        ...
