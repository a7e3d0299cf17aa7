"""The records that hold tensors: what packed rows, scoring passes and the model exchange. Shapes as in records.py."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_srpo.core.metrics import Metric, Metrics

Owner = TypeVar("Owner", "Scores", "PackedBatch")


def _with_tensors(owner: Owner, function: Callable[[Tensor], Tensor], *, without: tuple[str, ...] = ()) -> Owner:
    """`owner` with `function` of each of its tensors."""
    changed = copy.copy(owner)
    for name in (f.name for f in dataclasses.fields(owner) if f.name not in without):
        if torch.is_tensor(value := getattr(owner, name)):
            setattr(changed, name, function(value))
    return changed


@dataclass
class Scores:
    """What scoring passes found, by name: of one sample [R, …] on the host, or of a packed row [T, …].

    Only the ranks of the last pipeline stage have it. None: no such pass. A pass returns tensors by these names.
    """

    logprob: Tensor | None = None  # [R] fp32, log π_old of the trained tokens; None: the policy has not moved
    topk_ids: Tensor | None = None  # [R, K] int32, the student's top-k, global ids; None: the train pass finds them
    teacher_logprobs: Tensor | None = None  # [R, K] fp32, the teacher's log-prob at topk_ids
    teacher_hidden: Tensor | None = None  # [R, H], inputs of the teacher's head, where the train pass finds the top-k
    teacher_normaliser: Tensor | None = None  # [R] fp32, the teacher's log Σ exp(logit ÷ temperature), with them
    teacher_logits: Tensor | None = None  # [R, v], full-vocabulary divergence only: this rank's shard
    teacher_entropy: Tensor | None = None  # [R] fp32, nats, over the full vocabulary
    teacher_logprob: Tensor | None = None  # [R] fp32, the teacher's log-prob of the trained tokens
    contrast_logprob: Tensor | None = None  # [R] fp32, the same behind a prompt that shows a wrong answer
    reference_logprob: Tensor | None = None  # [R] fp32, log π_ref of the trained tokens
    initial_hidden: Tensor | None = None  # [R, H], the initial model's as a teacher; trust-region teacher only

    def map(self, function: Callable[[Tensor], Tensor]) -> Scores:
        """The same with `function` of each tensor."""
        return _with_tensors(self, function)


SCORE_NAMES = tuple(f.name for f in dataclasses.fields(Scores))


@dataclass
class PackedBatch:
    """One packed row as tensors, next-token aligned: position t predicts targets[t].

    All tensors are [T] (top-k scores [T, K]) and equal on every tensor-parallel rank. At positions that predict no
    trained token `loss_mask` is 0 and the other values are 0. Samples without a teacher have 0 too, but
    −log(K + 1) in `teacher_logprobs`, a distribution whose tail is not empty, so that nothing there is ever NaN.
    """

    input_ids: Tensor  # int64
    targets: Tensor  # int64
    position_ids: Tensor  # int64, restart at 0 for every sequence
    cu_seqlens: Tensor  # [S+1] int32, boundaries of the S sequences (padding of the row is the last one)
    loss_mask: Tensor  # fp32, 1 where the target is a trained token of a counted sample
    advantages: Tensor  # fp32
    rollout_logprobs: Tensor  # fp32
    first_token: Tensor  # fp32, 1 where the target is the first trained token of a counted attempt
    weights: dict[str, Tensor] = field(default_factory=dict)  # fp32, by loss term
    response_tokens: Tensor | None = None  # fp32, R of the attempt that the target belongs to
    turn: Tensor | None = None  # fp32, number of the episode's turn that the target belongs to, from 1; None: one turn
    scores: Scores = field(default_factory=Scores)  # [T, …]
    prefixes: tuple[int, ...] = ()
    """Which sequence each sequence goes on behind, −1: none; it stands earlier in the row, and may have a prefix
    itself. One that others go on behind has tokens of prompts alone, and predicts nothing. Empty: no sequence has a
    prefix."""
    experts: Tensor | None = None  # [T, layers with experts, experts of a token] int16, −1: the router chooses; host
    is_padding: Tensor | None = None  # bool, True where a sequence or the row is filled up; None: nowhere
    context_group: ProcessGroup | None = None  # ranks with the other parts of every sequence; None: the row is whole

    def map(self, function: Callable[[Tensor], Tensor], *, without: tuple[str, ...] = ()) -> PackedBatch:
        """The same row with `function` of each tensor, those named in `without` as they are."""
        row = _with_tensors(self, function, without=without)
        weights = {name: function(weight) for name, weight in self.weights.items()}
        return dataclasses.replace(row, weights=weights, scores=self.scores.map(function))

    def at(self, positions: Tensor) -> PackedBatch:
        """The row with these positions alone [R], in ascending order. Every sequence stays one, maybe an empty one."""
        part = self.map(lambda values: values.index_select(0, positions), without=("cu_seqlens",))
        ends = torch.searchsorted(positions, self.cu_seqlens[1:].to(positions.dtype)).to(self.cu_seqlens.dtype)
        return dataclasses.replace(part, cu_seqlens=torch.cat([torch.zeros_like(ends[:1]), ends]))


def chain_of(sequence: int, prefixes: Sequence[int]) -> list[int]:
    """The sequences that a sequence sees, itself included: its outermost prefix first."""
    chain = []
    while sequence >= 0:
        chain.append(sequence)
        sequence = prefixes[sequence]
    return chain[::-1]


@dataclass(frozen=True)
class HeadInput:
    """What the last pipeline stage gives the objective: hidden states and the head's weight. The logits are not made.

    `hidden` is whole on every tensor-parallel rank, also under sequence parallelism; its gradient may be the rank's own
    part, which the graph behind it sums.
    """

    hidden: Tensor  # [T, H], the model's dtype
    weight: Tensor  # [≥ width, H], this rank's rows of the head; the rows from `width` on are padding
    width: int  # v
    vocab_start: int  # global id of the first row
    group: ProcessGroup | None  # tensor-parallel group; None for one rank


# The last stage's hidden states and head, and the row → per-position tensors [T, …] by the names of `Scores`.
ScoreFunction = Callable[[HeadInput, PackedBatch], dict[str, Tensor]]
# … → this row's part of the objective (a scalar), and its metrics.
LossFunction = Callable[[HeadInput, PackedBatch], tuple[Tensor, Metrics]]


@dataclass(frozen=True)
class Guidance:
    """What an algorithm may turn into advantages of single tokens (Algorithm.guide). All [T] fp32, without gradient, 0
    at tokens without a "guided" weight."""

    advantage: Tensor  # Credit.advantage
    teacher_gap: Tensor  # nats, log π_teacher(y_t) − log π_old(y_t)
    contrast_gap: Tensor  # nats, log π_contrast(y_t) − log π_old(y_t); 0 without Needs.contrast


@dataclass
class StepStats:
    """One optimizer step: what the log needs."""

    metrics: dict[str, Metric]
    grad_norm: float
    skipped: bool = False  # non-finite gradient: parameters untouched


@dataclass(frozen=True)
class ModelShards:
    """This rank's part of a Megatron model, in the form that the bridge reads and writes.

    `parameters` maps the Megatron name with the GLOBAL layer number, e.g.
    "decoder.layers.17.self_attention.linear_qkv.weight", to this rank's tensor (TP shard; only the layers
    of this pipeline stage). An expert's number in a name is global too, and its parameters are split over the expert
    tensor-parallel ranks. Groups are torch process groups; None where the size is 1.

    With LoRA `parameters` are the base weights, and `adapters` the trained ones, for example
    "decoder.layers.17.self_attention.linear_qkv.adapters.q_proj.lora_A".
    """

    parameters: dict[str, Tensor]
    tp_rank: int
    tp_size: int
    tp_group: ProcessGroup | None
    pp_rank: int
    pp_size: int
    pp_group: ProcessGroup | None
    padded_vocab_size: int  # rows of the full (padded) embedding; the HF vocab_size may be smaller
    ep_rank: int = 0  # its experts are the ep_rank-th run of experts / ep_size
    ep_size: int = 1
    etp_rank: int = 0
    etp_size: int = 1
    expert_group: ProcessGroup | None = None  # ranks that have all experts of a stage, etp_size for each run of them
    adapters: dict[str, Tensor] = field(default_factory=dict)
    merged: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict)
    """By name of a parameter that has adapters: makes this rank's shard of base + scale · B · A, a new tensor."""

    def of_adapters(self) -> ModelShards:
        """The adapters alone, as the parameters of a model that has nothing else."""
        return dataclasses.replace(self, parameters=self.adapters, adapters={}, merged={})

    def of_base(self) -> ModelShards:
        """The base model alone."""
        return dataclasses.replace(self, adapters={}, merged={})
