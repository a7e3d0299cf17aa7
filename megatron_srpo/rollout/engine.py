"""The protocol of a rollout engine: what the trainer asks, whichever engine answers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, cast

import numpy as np
import torch

from megatron_srpo.core.errors import UserError
from megatron_srpo.core.records import Experts, Rollout

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


@dataclass(frozen=True)
class GenerateRequest:
    """One response to one prompt."""

    prompt: int  # index of the prompt in the batch
    sample: int  # 0 … G-1 inside its group
    token_ids: list[int]  # of the prompt
    seed: int  # of this response's sampling; see request_seed


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


def check_lengths(requests: Sequence[GenerateRequest], sampling: SamplingSettings, max_model_len: int) -> None:
    """Raise RolloutError for a prompt that leaves no room for `max_tokens`."""
    for request in requests:
        if not 0 < len(request.token_ids) <= max_model_len - sampling.max_tokens:
            raise RolloutError(
                f"prompt {request.prompt} has {len(request.token_ids)} tokens: expected 1 to "
                f"{max_model_len - sampling.max_tokens}, so that {sampling.max_tokens} more fit in "
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
