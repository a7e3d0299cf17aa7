"""The records that flow around the loop, in the order in which they appear.

Shape legend used in this package:
    G  rollouts of one prompt (a group)         N  samples of one iteration
    T  tokens of one packed row, padding included
    V  vocabulary of the model; v  the part of it on one tensor-parallel rank
    K  distillation top-k
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Prompt:
    """One question, ready for the engine.

    Example: Prompt(uid="train:17", messages=({"role": "user", "content": "order 53142"},),
                    token_ids=[9, 4, 4], answer="12345", kind="exact")
    """

    uid: str  # "<split>:<row>", stable across runs: seeds and logs refer to it
    messages: tuple[dict[str, str], ...]  # chat messages up to and without the assistant's turn
    token_ids: list[int]  # the chat template applied, generation prompt included
    answer: Any  # what the reward function compares with
    kind: str  # which reward function scores it
    metadata: dict[str, Any] = field(default_factory=dict)  # the row's other fields
    source: str = ""  # "file:line", for messages


@dataclass
class Rollout:
    """One response of the engine to one prompt. Tokens and log-probs become arrays, 4 bytes each: as Python lists, the
    responses of a large batch would not fit the driver's memory, nor travel in time."""

    prompt: int  # index of its prompt in the batch
    sample: int  # 0 … G-1 inside its group
    token_ids: Sequence[int]  # the response, its end-of-sequence token included when it ended by itself
    logprobs: Sequence[float]  # the engine's log-prob of each response token at the sampling temperature
    text: str  # decoded without special tokens
    finish_reason: str  # "stop" or "length"
    weight_version: int  # the publish that produced it; the oldest, where there were several
    token_versions: list[int] | None = None  # the publish behind each token; None: weight_version, all of them
    stale: bool = False  # older than rollout.max_staleness: left out of the loss

    def __post_init__(self) -> None:
        if not isinstance(self.token_ids, array):
            self.token_ids = array("i", self.token_ids)
        if not isinstance(self.logprobs, array):
            self.logprobs = array("f", self.logprobs)  # what engines give is fp32


@dataclass
class Reward:
    """What a reward function says of one response."""

    score: float  # ≥ algorithm.success_reward_threshold means correct
    feedback: str | None = None  # what was wrong, in words that may be shown to the teacher
    well_formed: bool | None = None  # the response ends in the required format; None: not applicable
    error: str | None = None  # "time-out …" or "crash …": the score is then the failure score
    prediction: str | None = None  # the answer that was read from the response: what a majority vote counts


@dataclass
class RoutedSample:
    """A rollout with everything that the loss needs to know of it. Routing is these numbers.

    The token loss of every response token is
        policy_weight · ℓ_GRPO(advantage) + distill_weight · w_t · ℓ_SDPO(teacher)
    and its tokens count in the joint denominator when `counted`.
    """

    uid: str
    group: int
    sample: int
    prompt_ids: list[int]
    response_ids: Sequence[int]
    rollout_logprobs: Sequence[float]  # same length as response_ids
    advantage: float
    policy_weight: float
    distill_weight: float
    teacher_ids: Sequence[int] | None = None  # enriched prompt; present if and only if distill_weight > 0
    teacher_sample: int | None = None  # the sibling that teaches; None: feedback alone, or no teacher

    @property
    def counted(self) -> bool:
        return self.policy_weight > 0 or self.distill_weight > 0

    @property
    def student_length(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def teacher_length(self) -> int:
        return 0 if self.teacher_ids is None else len(self.teacher_ids) + len(self.response_ids)


@dataclass(frozen=True)
class Padding:
    """Multiples to which lengths, and the number of rows, are filled up; `row` is a multiple of `sequence`.

    Context parallelism cuts every sequence into 2·CP equal chunks; sequence parallelism cuts what a rank holds of a row
    into TP; an interleaved pipeline takes its rows PP at a time, all of one length.
    """

    sequence: int = 1
    row: int = 1
    rows: int = 1  # of a data-parallel rank in one pass; above 1 they are filled up to the longest


@dataclass(frozen=True)
class Row:
    """Samples that share one packed row, in order. `samples` index the iteration's list of
    RoutedSample; an empty row keeps the ranks in step and contributes nothing."""

    samples: tuple[int, ...]
    tokens: int  # sum of the lengths of its sequences, padding excluded


@dataclass(frozen=True)
class MiniBatchPlan:
    """What every data-parallel rank forwards for one optimiser step.

    `student[d]` / `teacher[d]` are the rows of data-parallel rank d; every rank has the same number of
    rows in each pass. A sample's teacher row lives on the same rank as its student row, so that
    teacher scores never travel. In one rank's share of a plan there is that rank alone, and `samples` of its rows index
    that rank's samples; the totals are still over all ranks.
    """

    student: list[list[Row]]
    teacher: list[list[Row]]
    loss_tokens: int  # N: response tokens of counted samples, over all ranks (the joint denominator)
    distill_tokens: int  # |Ω|: response tokens of samples with distill_weight > 0, over all ranks
    forwarded: dict[str, tuple[int, int]] = field(default_factory=dict)  # "student", "teacher" rows, and "topk", the
    # teacher's rows under the students' prompts: rows and tokens of all ranks, padding excluded


@dataclass(frozen=True)
class BatchPlan:
    """The forward passes of one iteration: one MiniBatchPlan an optimiser step."""

    mini_batches: list[MiniBatchPlan]
    efficiency: float  # useful tokens ÷ tokens of the padded rows
    imbalance: float  # slowest rank's cost ÷ mean cost − 1


@dataclass
class TokenScores:
    """What a scoring pass keeps of one sample, per response token (R = len(response_ids)); on the
    ranks of the last pipeline stage only. Never [R, V] unless the divergence is over the full
    vocabulary, and then only this rank's shard."""

    logprob: torch.Tensor | None = None  # [R] fp32, log π_old of the response tokens
    topk_ids: torch.Tensor | None = None  # [R, K] int64, the student's top-k, global ids
    teacher_logprobs: torch.Tensor | None = None  # [R, K] fp32, the teacher's log-prob at topk_ids
    teacher_logits: torch.Tensor | None = None  # [R, v], full-vocabulary divergence only
    teacher_entropy: torch.Tensor | None = None  # [R] fp32, nats, over the full vocabulary
    reference_logprob: torch.Tensor | None = None  # [R] fp32, log π_ref of the response tokens
    initial_hidden: torch.Tensor | None = None  # [R, H], the initial model's as a teacher; trust-region teacher only


@dataclass
class PackedBatch:
    """One packed row as tensors, next-token aligned: position t predicts targets[t].

    All tensors are [T] (top-k ones [T, K]) and equal on every tensor-parallel rank. Outside response
    positions `loss_mask` is 0 and the other values are 0. Samples that are not distilled have no teacher: 0 too, but
    −log(K + 1) in `teacher_logprobs`, a distribution whose tail is not empty, so that nothing there is ever NaN.
    """

    input_ids: torch.Tensor  # int64
    targets: torch.Tensor  # int64
    position_ids: torch.Tensor  # int64, restart at 0 for every sequence
    cu_seqlens: torch.Tensor  # [S+1] int32, boundaries of the S sequences (padding of the row is the last one)
    loss_mask: torch.Tensor  # fp32, 1 where the target is a response token of a counted sample
    advantages: torch.Tensor  # fp32
    policy_weight: torch.Tensor  # fp32
    distill_weight: torch.Tensor  # fp32
    rollout_logprobs: torch.Tensor  # fp32
    old_logprobs: torch.Tensor | None = None  # fp32; None: the policy has not moved, ρ = 1 in value
    reference_logprobs: torch.Tensor | None = None  # fp32
    topk_ids: torch.Tensor | None = None  # [T, K] int64
    teacher_logprobs: torch.Tensor | None = None  # [T, K] fp32
    teacher_logits: torch.Tensor | None = None  # [T, v]
    teacher_entropy: torch.Tensor | None = None  # fp32
    initial_hidden: torch.Tensor | None = None  # [T, H]
    first_token: torch.Tensor | None = None  # fp32, 1 where the target is the first token of a counted response
    context_group: Any = None  # ranks with the other parts of every sequence; None: the row is whole


@dataclass(frozen=True)
class HeadInput:
    """What the last pipeline stage leaves to the objective: hidden states and the head's weight, the logits not made.

    `hidden` is whole on every tensor-parallel rank, also under sequence parallelism; its gradient may be the rank's own
    part, which the graph behind it sums.
    """

    hidden: torch.Tensor  # [T, H], the model's dtype
    weight: torch.Tensor  # [≥ width, H], this rank's rows of the head; the rows from `width` on are padding
    width: int  # v
    vocab_start: int  # global id of the first row
    group: Any  # tensor-parallel group; None for one rank


@dataclass
class StepStats:
    """One optimiser step: what the log needs."""

    metrics: dict[str, float]
    grad_norm: float
    skipped: bool = False  # non-finite gradient: parameters untouched


@dataclass(frozen=True)
class ModelShards:
    """This rank's part of a Megatron model, in the form that the bridge reads and writes.

    `parameters` maps the Megatron name with the GLOBAL layer number, e.g.
    "decoder.layers.17.self_attention.linear_qkv.weight", to this rank's tensor (TP shard; only the layers
    of this pipeline stage). An expert's number in a name is global too, and its parameters are split over the expert
    tensor-parallel ranks. Groups are torch process groups; None where the size is 1.
    """

    parameters: dict[str, torch.Tensor]
    tp_rank: int
    tp_size: int
    tp_group: Any
    pp_rank: int
    pp_size: int
    pp_group: Any
    padded_vocab_size: int  # rows of the full (padded) embedding; the HF vocab_size may be smaller
    ep_rank: int = 0  # its experts are the ep_rank-th run of experts / ep_size
    ep_size: int = 1
    etp_rank: int = 0
    etp_size: int = 1
    expert_group: Any = None  # ranks that have all experts of a stage, the etp_size ones of a run together
