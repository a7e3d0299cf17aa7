"""Samples on a CPU without a random generator per request: a draw is a hash of (seed, position of the token).

vLLM's Model Runner V2, the default on GPUs, hashes as well. Its V1, which CPUs have, keeps a generator for every
request with a seed, asks them one after the other in each step, and draws noise for every token of the vocabulary.
Here one number per row decides, by the inverse of the cumulative distribution, which costs less than vLLM's draw
without seeds. vLLM imports this module in a worker.

    uniform(seed, position) in [0, 1)  →  the first token at which the sum of the probabilities exceeds it

A draw so depends on nothing else: not on the batch, on the engine's ranks, or on whether vLLM computed a request again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p
from vllm.v1.sample.sampler import _SAMPLING_EPS, Sampler

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

BLOCK = 64  # tokens whose probabilities are added first
BELOW_ONE = 1 - 2.0**-52


def mixed(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014) on uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniforms(seeds: np.ndarray, positions: np.ndarray) -> torch.Tensor:
    """[n] float64 in [0, 1), from [n] seeds (int64) and positions (any integers): number `position` of a SplitMix64
    whose start is the mixed seed."""
    step = np.uint64(0x9E3779B97F4A7C15)
    state = mixed(seeds.astype(np.uint64) + step) + step * (positions.astype(np.uint64) + np.uint64(1))
    return torch.from_numpy((mixed(state) >> np.uint64(12)).astype(np.float64) * 2.0**-52)


def _first_above(masses: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, 1] int64: where the running sum of the masses [rows, n] exceeds the share `uniform` [rows, 1] of all; and
    [rows, 1] float64 in [0, 1): how far inside that mass. A mass of 0 is never chosen. NaN gives the last one."""
    ends = masses.double().cumsum(dim=1)
    targets = uniform * ends[:, -1:]
    index = torch.searchsorted(ends, targets, right=True).clamp_(max=masses.shape[1] - 1)
    mass = masses.gather(1, index).double()
    return index, ((targets - (ends.gather(1, index) - mass)) / mass).clamp_(0.0, BELOW_ONE)


def draw(probs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """[rows] int64 tokens from probs [rows, vocabulary] float32 and uniform [rows] float64 in [0, 1).

    Two steps, a block of tokens and then one of its tokens. A running sum over the vocabulary would lose the tokens
    whose probability is below its own rounding, 6e-8."""
    rows, vocabulary = probs.shape
    whole = vocabulary // BLOCK * BLOCK
    blocks = probs[:, :whole].view(rows, -1, BLOCK).sum(dim=2)
    blocks = torch.cat([blocks, probs[:, whole:].sum(dim=1, keepdim=True)], dim=1)
    block, inside = _first_above(blocks, uniform[:, None])
    tokens = block * BLOCK + torch.arange(BLOCK)
    masses = probs.gather(1, tokens.clamp(max=vocabulary - 1)).masked_fill_(tokens >= vocabulary, 0.0)
    token, _ = _first_above(masses, inside)
    return (block * BLOCK + token)[:, 0].clamp_(max=vocabulary - 1)


class LogprobRecord:
    """The log-probs of sampled tokens, by request and position, until the request is complete.

    vLLM hands a log-prob from step to step through five objects, which costs as much as a tenth of a tiny model's
    generation. Here a step is one assignment. `width` is the highest position plus one. There is room for `requests` at
    a time, and more is made when it is needed, for requests that vLLM has preempted.
    """

    def __init__(self, requests: int, width: int) -> None:
        self._values = np.empty((requests, width), np.float32)  # memory is taken as positions are written
        self._row_of: dict[str, int] = {}
        self._free = list(range(requests))  # rows without a request
        self._names: list[str] = []  # of the last step, in vLLM's order
        self._rows = np.empty(0, np.int64)  # theirs

    def add(
        self, names: Sequence[str], positions: np.ndarray, logprobs: np.ndarray, request: np.ndarray | slice
    ) -> None:
        """Keep the log-probs [n] of tokens at these positions [n] in the requests names[request]. A position that is
        sampled again, as after a draft that was wrong, keeps the last one."""
        if self._names != names:
            self._names = list(names)
            self._rows = np.array([self._row(name) for name in names], np.int64)
        self._values[self._rows[request], positions] = logprobs

    def _row(self, name: str) -> int:
        row = self._row_of.get(name)
        if row is None:
            if not self._free:
                rows, width = self._values.shape
                self._values = np.concatenate([self._values, np.empty((rows, width), np.float32)])
                self._free = list(range(rows, 2 * rows))
            row = self._row_of[name] = self._free.pop()
        return row

    def take(self, name: str, start: int, count: int) -> np.ndarray:
        """[count] float32 log-probs of a request's tokens from position `start` on. The request is forgotten. Raises
        KeyError for one that has sampled nothing."""
        row = self._row_of.pop(name)
        self._free.append(row)
        self._names = []
        return self._values[row, start : start + count].copy()


class CounterSampler(Sampler):
    """vLLM's sampler for its V1 model runner on a CPU, with draws by counter for requests that have seeds.

    Temperature, top-k, top-p, penalties and logits processors are vLLM's. If nothing but the log-prob of the sampled
    token is asked for (logprobs = 0, processed), it is taken from its probability alone, and its rank is not counted:
    it is told as 0. With a `record`, that log-prob is kept there, whether the request asks vLLM for it or not.
    """

    def __init__(self, runner: GPUModelRunner) -> None:
        super().__init__(runner.sampler.logprobs_mode, runner.sampler.use_fp64_gumbel)
        self._runner = runner
        self.record: LogprobRecord | None = None

    def sample(
        self, logits: torch.Tensor, sampling_metadata: SamplingMetadata, logprobs_mode_override: str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(tokens [rows], processed log-probs [rows, vocabulary], or those of the tokens alone [rows, 1], or None)."""
        lengths = self._runner.seq_lens[: len(logits)].numpy()
        return self.sample_at(lengths, logits, sampling_metadata, logprobs_mode_override)

    def sample_at(
        self, positions: np.ndarray, logits: torch.Tensor, asked: SamplingMetadata,
        logprobs_mode_override: str | None = None, request: np.ndarray | slice = slice(None),
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        """As `sample`, of the tokens that get these positions [rows] in the runner's requests[request]."""
        if not asked.generators or asked.all_greedy or self.logprobs_mode != "processed_logprobs":
            tokens, logprobs = super().sample(logits, asked, logprobs_mode_override)
            if self.record is not None:  # greedy, so that vLLM has not changed the logits
                self._keep(positions, self.compute_logprobs(logits).gather(1, tokens[:, None].long()), request)
            return tokens, logprobs
        logits = self.apply_temperature(logits, asked.temperature, asked.all_random)
        for processor in asked.logitsprocs.argmax_invariant:
            logits = processor.apply(logits)
        logits = apply_top_k_top_p(logits, asked.top_k, asked.top_p)
        probs = logits.softmax(dim=-1, dtype=torch.float32)
        tokens = draw(probs, self._uniforms(asked.generators, positions))
        if not asked.all_random:
            tokens = torch.where(asked.temperature < _SAMPLING_EPS, self.greedy_sample(logits), tokens)
        if asked.max_num_logprobs or asked.logprob_token_ids:
            return tokens, self.compute_logprobs(logits)
        logprobs = probs.gather(1, tokens[:, None]).log_()
        self._keep(positions, logprobs, request)
        return tokens, logprobs

    def _keep(self, positions: np.ndarray, logprobs: torch.Tensor, request: np.ndarray | slice) -> None:
        if self.record is not None:
            self.record.add(self._runner.input_batch.req_ids, positions, logprobs[:, 0].numpy(), request)

    def _uniforms(self, generators: Mapping[int, torch.Generator], positions: np.ndarray) -> torch.Tensor:
        """[rows] float64: one number per row. Rows without a seed, of which a run has none, get a random one."""
        rows = len(positions)
        seeds = np.zeros(rows, np.int64) if len(generators) == rows else torch.randint(0, 2**62, (rows,)).numpy()
        for row, generator in generators.items():
            seeds[row] = generator.initial_seed()
        return uniforms(seeds, positions)

    @staticmethod
    def gather_logprobs(logprobs: torch.Tensor, num_logprobs: int, token_ids: torch.Tensor) -> LogprobsTensors:
        """As vLLM's. With one column, that of the sampled tokens, there is nothing to gather."""
        if logprobs.shape[1] > 1 or num_logprobs:
            return Sampler.gather_logprobs(logprobs, num_logprobs, token_ids)
        ranks = torch.zeros_like(token_ids)
        return LogprobsTensors(token_ids[:, None].to(torch.int32), logprobs, ranks)


def install(runner: GPUModelRunner) -> CounterSampler:
    """Make a model runner sample by counter."""
    runner.sampler = CounterSampler(runner)
    return runner.sampler


def record(runner: GPUModelRunner) -> LogprobRecord:
    """Make a runner's CounterSampler keep the log-probs of what it samples."""
    sampler = runner.sampler
    assert isinstance(sampler, CounterSampler) and sampler.logprobs_mode == "processed_logprobs"
    drafts = runner.num_spec_tokens  # a step samples behind drafts, also where they turn out to be too long
    sampler.record = LogprobRecord(runner.max_num_reqs, runner.max_model_len + drafts + 1)
    return sampler.record
