"""Speculative decoding on a CPU: drafts from the answers to the same prompt, and samples that do not depend on them.

vLLM computes the logits of several tokens of a request in one step if somebody proposes these tokens. Here a draft is
accepted if it is the token that our sampler draws at its position, from its seed and its logits (counter_sampler.py).
The first draft that is not gives way to the token that was drawn. So tokens and log-probs are those of an engine
without drafts, which only change the number of steps. vLLM's own rejection sampling keeps the distribution, but not the
samples. vLLM imports this module in a worker, by the name of `AnswerDrafts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.rejection_sampler import PLACEHOLDER_TOKEN_ID
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from megatron_srpo.rollout.vllm.counter_sampler import CounterSampler, mixed
from megatron_srpo.rollout.vllm.draft_table import NOTHING, DraftTable
from megatron_srpo.rollout.vllm.settings import NGRAMS

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner


class DraftVerifier(torch.nn.Module):
    """Takes the place of vLLM's RejectionSampler: it draws a token at every position, and keeps those up to the first
    one that was not drafted."""

    def __init__(self, runner: GPUModelRunner, sampler: CounterSampler) -> None:
        super().__init__()
        self._runner, self._sampler = runner, sampler

    def forward(
        self, metadata: SpecDecodeMetadata, draft_probs: torch.Tensor | None, logits: torch.Tensor,
        sampling_metadata: SamplingMetadata,
    ) -> SamplerOutput:  # fmt: skip
        """`logits` [rows, vocabulary] are those at the drafts of a request and at one position more, request after
        request. Returns tokens [requests, longest draft + 1], with vLLM's placeholder after the last one that is kept,
        and the log-probs of [requests · (longest draft + 1)] tokens."""
        if not metadata.max_spec_len:
            return self._sampler(logits, sampling_metadata)
        drafts = np.asarray(metadata.num_draft_tokens)
        request = np.repeat(np.arange(len(drafts)), drafts + 1)  # [rows]
        place = np.arange(len(request)) - np.repeat(np.cumsum(drafts + 1) - drafts - 1, drafts + 1)  # among its drafts
        first = self._runner.seq_lens[: len(drafts)].numpy() - drafts  # the position of a request's first new token
        asked = _of_rows(sampling_metadata, request)
        tokens, logprobs = self._sampler.sample_at(first[request] + place, logits.float(), asked, request=request)

        shape = len(drafts), metadata.max_spec_len + 1
        drawn = torch.full(shape, PLACEHOLDER_TOKEN_ID, dtype=torch.int32)
        drawn[request, place] = tokens.to(torch.int32)
        right, drafted = torch.zeros(shape, dtype=torch.bool), place < drafts[request]
        right[request[drafted], place[drafted]] = tokens[drafted] == metadata.draft_token_ids
        kept = torch.ones(shape, dtype=torch.bool)
        kept[:, 1:] = right[:, :-1].cumprod(dim=1).bool()
        told = None
        if asked.max_num_logprobs is not None and logprobs is not None:
            found = self._sampler.gather_logprobs(logprobs, asked.max_num_logprobs, tokens.long())
            told = LogprobsTensors(*(_spread(part, shape, request, place) for part in found[:3]))
        return SamplerOutput(drawn.masked_fill_(~kept, PLACEHOLDER_TOKEN_ID), told)


def _of_rows(asked: SamplingMetadata, request: np.ndarray) -> SamplingMetadata:
    """What each row is asked, from what each request is asked. Of the rest of SamplingMetadata engines use nothing."""
    assert asked.no_penalties and asked.allowed_token_ids_mask is None and not asked.bad_words_token_ids
    rows = torch.from_numpy(request)
    seeded = asked.generators
    generators = {row: seeded[index] for row, index in enumerate(request.tolist()) if index in seeded}

    def expanded(values: torch.Tensor | None) -> torch.Tensor | None:
        return None if values is None else values[rows]

    return replace(
        asked, temperature=expanded(asked.temperature), top_p=expanded(asked.top_p), top_k=expanded(asked.top_k),
        generators=generators,
    )  # fmt: skip


def _spread(values: torch.Tensor, shape: tuple[int, int], request: np.ndarray, place: np.ndarray) -> torch.Tensor:
    """[rows, …] → [shape[0] · shape[1], …], with zeros where there is no row."""
    grid = values.new_zeros(*shape, *values.shape[1:])
    grid[request, place] = values
    return grid.flatten(0, 1)


@dataclass(frozen=True)
class Answer:
    """A response in progress."""

    group: int  # a hash of its prompt
    longest: int  # tokens of the prompt and of the longest response


class AnswerDrafts:
    """vLLM's proposer. It drafts what followed the last tokens in the prompt, in this response and in all other
    responses to the prompt, those of earlier iterations included."""

    runner: GPUModelRunner  # given by `install`

    def __init__(self, vllm_config: VllmConfig) -> None:
        self._count = vllm_config.num_speculative_tokens
        self._max_model_len = vllm_config.model_config.max_model_len
        self._table = DraftTable(NGRAMS)
        self._answers: dict[str, Answer] = {}  # by the request's name
        self._prompts: set[int] = set()  # the groups of these

    def load_model(self, *args: Any) -> None:
        """There is no model to load."""

    def propose(
        self, sampled_token_ids: Sequence[Sequence[int]], lengths: np.ndarray, token_ids: np.ndarray, **others: Any
    ) -> list[list[int]]:
        """The drafts of each request after a step that sampled these tokens. `token_ids` [requests, max_model_len] has
        all tokens of the requests, and `lengths` [requests] their numbers."""
        names = self.runner.input_batch.req_ids
        known, self._answers = self._answers, {}
        for row, name in enumerate(names):
            self._answers[name] = known.get(name) or self._begin(row, name, token_ids[row])
        answers = list(self._answers.values())
        self._prompts = {answer.group for answer in answers}
        groups = np.array([answer.group for answer in answers], np.uint64)
        room = np.array([answer.longest for answer in answers]) - lengths[: len(names)]
        new = np.array([len(tokens) for tokens in sampled_token_ids])
        self._learn(groups, token_ids, lengths, new)

        drafts: list[list[int]] = [[] for _ in names]
        rows = np.flatnonzero((new > 0) & (room > 1))  # a step gives one token more than it accepts
        if len(rows):
            found = self._table.draft(groups[rows], self._contexts(token_ids, rows, lengths[rows]), self._count)
            # As many as the last step gave, so that a response which cannot be guessed costs one wrong draft a step.
            most = np.minimum(new[rows], room[rows] - 1)
            counts = np.minimum((found != NOTHING).sum(axis=1), most)
            for row, draft, count in zip(rows.tolist(), found.tolist(), counts.tolist(), strict=True):
                drafts[row] = draft[:count]
        return drafts

    def _begin(self, row: int, name: str, tokens: np.ndarray) -> Answer:
        """A new request. Its prompt is learned if no response to it is in progress."""
        length = int(self.runner.input_batch.num_prompt_tokens[row])
        weighted = tokens[:length].astype(np.uint64) * mixed(np.arange(1, length + 1, dtype=np.uint64))
        group = mixed(weighted.sum(keepdims=True))
        if (key := int(group[0])) not in self._prompts:
            self._prompts.add(key)
            self._learn(group, tokens[None], np.array([length]), np.array([length - 1]))
        longest = self.runner.requests[name].sampling_params.max_tokens or self._max_model_len
        return Answer(key, min(length + longest, self._max_model_len))

    def _learn(self, groups: np.ndarray, token_ids: np.ndarray, lengths: np.ndarray, new: np.ndarray) -> None:
        """The last `new` tokens of every row."""
        rows = np.repeat(np.arange(len(new)), new)
        places = np.arange(len(rows)) + np.repeat(lengths[: len(new)] - np.cumsum(new), new)
        self._table.learn(groups[rows], self._contexts(token_ids, rows, places), token_ids[rows, places])

    def _contexts(self, token_ids: np.ndarray, rows: np.ndarray, places: np.ndarray) -> np.ndarray:
        """[m, longest n-gram] the tokens before these places of these rows; NOTHING before the first token."""
        before = places[:, None] + np.arange(-self._table.longest, 0)
        return np.where(before >= 0, token_ids[rows[:, None], np.maximum(before, 0)], NOTHING)


def install(runner: GPUModelRunner, sampler: CounterSampler) -> None:
    """Make a model runner whose proposer is `AnswerDrafts` verify drafts by counter."""
    assert isinstance(runner.drafter, AnswerDrafts), f"the proposer is {type(runner.drafter).__name__}"
    runner.drafter.runner = runner
    runner.rejection_sampler = DraftVerifier(runner, sampler)
    # vLLM would draft token 0 for all requests as soon as one of them is near the limit. Our drafts end before it.
    runner.effective_drafter_max_model_len = runner.max_model_len + runner.num_spec_tokens
