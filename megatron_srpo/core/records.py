"""The records that flow around the loop, in the order in which they appear. Nothing here imports torch.

    Prompt ─► Rollout ─► Reward ─► Attempt, Group ─► Credit ─► Sample ─► Row, MiniBatchPlan, BatchPlan

Shape legend used in this package:
    G  rollouts of one prompt (a group)         N  samples of one iteration
    L  tokens of one sequence                   R  trained tokens of one sample
    T  tokens of one packed row, padding included
    V  vocabulary of the model; v  the part of it on one tensor-parallel rank
    K  distillation top-k
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.float32]  # [R], one value for each trained token
PerToken = float | Tokens  # a float counts for every trained token
# [tokens, layers with experts, experts of a token]: the numbers of the experts; int16 with −1 where none is known.
Experts = NDArray[np.uint8] | NDArray[np.uint16] | NDArray[np.int16]
StreamName = Literal["student", "teacher", "contrast"]


@dataclass(frozen=True)
class Prompt:
    """One question, ready for the engine.

    Example: Prompt(uid="train:17", messages=({"role": "user", "content": "order 53142"},),
                    token_ids=[9, 4, 4], answer="12345", kind="exact")
    """

    uid: str  # "<split>:<row>", stable across runs: seeds and logs refer to it
    messages: tuple[dict[str, str], ...]  # chat messages up to and without the assistant's turn
    token_ids: list[int]  # the chat template applied, generation prompt included
    answer: object  # what the reward function compares with
    kind: str  # which reward function scores it
    metadata: Mapping[str, object] = field(default_factory=dict)  # the row's other fields
    source: str = ""  # "file:line", for messages
    solution: str = ""  # the data's own worked solution (data.solution_key); "" if it has none
    tools: tuple[Mapping[str, object], ...] = ()  # JSON schemas of functions, for the chat template
    question: int | None = None  # index of the message that a teacher's prompt replaces; None: the last user message


@dataclass(frozen=True)
class Context:
    """What a sequence of an episode begins with, if that is not the prompt of the data.

    An environment may begin with messages or tools of its own, and a chat template may rewrite what was said before.
    """

    start: int  # index of the first of the rollout's tokens that follow it
    token_ids: array[int]  # never trained
    messages: tuple[dict[str, str], ...]  # what the tokens were rendered from
    tools: tuple[Mapping[str, object], ...] = ()
    question: int | None = None  # as in Prompt


@dataclass(frozen=True)
class Gap:
    """The environment's messages between two turns of a sequence, cut where its last message ends: a teacher may read
    there what was wrong with the turn that follows."""

    turn: int  # number of the turn that follows, from 0
    begin: int  # of its tokens among the rollout's (in TurnFeedback: among the sequence's)
    end: int
    before: array[int]  # the same messages in two parts, each tokenised by itself
    after: array[int]


@dataclass(frozen=True)
class TurnFeedback:
    """Feedback on turns behind the first, in one sequence: each before the turn that it is about."""

    messages: Mapping[int, str] = field(default_factory=dict)  # by index of a message that the sequence begins with
    gaps: tuple[tuple[Gap, str], ...] = ()


@dataclass
class Episode:
    """What a conversation with an environment adds to a rollout.

    Example: Episode(turns=(14, 9), messages=[{"role": "assistant", …}, {"role": "tool", …}, {"role": "assistant", …}],
                     reply="It is 42.", reward=None, tool_calls=1)
    """

    turns: tuple[int, ...]  # number of sampled tokens of each turn of the model
    messages: list[dict[str, str]]  # everything behind the first prompt
    reply: str  # text of the last turn without special tokens: what a reward function scores
    reward: Reward | None  # the environment's own; None: the reward function of the row's kind scores `reply`
    feedback: str | None = None  # the environment's; the reward function's is added to it
    tool_calls: int = 0
    tool_errors: int = 0  # calls that could not be read or carried out; the model was told
    cut: str = ""  # which budget ended it: "turns", "tokens", or "" if none did
    turn_feedback: tuple[str, ...] = ()  # the environment's by turn; "" where it gave none
    answers: tuple[int, ...] = ()  # by turn: index, among all messages, of the last one before it
    gaps: tuple[Gap, ...] = ()  # with teacher.feedback_at = "turn": where a teacher can be shown more


@dataclass
class Rollout:
    """One response of the engine to one prompt, or a whole episode: several responses with the environment's tokens
    between them.

    Token ids and log-probs become arrays of 4 bytes a value: as Python lists, the responses of a large batch would not
    fit into the memory of rank 0, nor travel in time.

    Example: Rollout(prompt=0, sample=3, token_ids=[4, 8, 2], logprobs=[-0.1, -2.3, -0.01], text="12",
                     finish_reason="stop", weight_version=7)
    """

    prompt: int  # index of its prompt in the batch
    sample: int  # 0 … G-1 inside its group
    token_ids: array[int]  # what follows the prompt; its end-of-sequence token included when it ended by itself
    logprobs: array[float]  # [len(token_ids)] the engine's log-probs at the sampling temperature
    text: str  # decoded without special tokens; of an episode: what was said, without thinking
    finish_reason: str  # "stop" or "length"; "part" if it is to go on (rollout.partial_tokens)
    weight_version: int  # the publish that produced it; the oldest one if there were several
    token_versions: list[int] | None = None  # the publish behind each token; None: weight_version for all of them
    stale: bool = False  # older than rollout.max_staleness: left out of the loss
    trained: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, dtype=bool), compare=False)
    """[len(token_ids)] True for tokens that the policy sampled, False for tokens of the environment (a tool's answer).
    An empty mask, the default, becomes True everywhere."""
    experts: Experts | tuple[Experts, ...] | None = field(default=None, compare=False)
    """uint8 or uint16, what the engine used for each token of prompt and response but the last, which it never
    computed; None if it was not asked for them. An episode has them for each of its `sequences`."""
    contexts: tuple[Context, ...] = ()
    """Where sequences of their own begin. Empty, as for every rollout without an environment: all tokens follow the
    prompt of the data."""
    episode: Episode | None = None  # None: one turn, without an environment
    drafted: int = field(default=0, compare=False)  # tokens that speculative decoding proposed
    accepted: int = field(default=0, compare=False)  # those of them that are part of the response

    def __post_init__(self) -> None:
        if not isinstance(self.token_ids, array):
            self.token_ids = array("i", self.token_ids)
        if not isinstance(self.logprobs, array):
            self.logprobs = array("f", self.logprobs)  # what engines give is fp32
        if len(self.trained) != len(self.token_ids):
            assert not len(self.trained), "the mask has one value for each token after the prompt"
            self.trained = np.ones(len(self.token_ids), dtype=bool)

    @property
    def newest_version(self) -> int:
        """The publish behind its last token."""
        return self.token_versions[-1] if self.token_versions else self.weight_version

    @property
    def response_length(self) -> int:
        """R, the number of tokens that the policy sampled."""
        return int(np.count_nonzero(self.trained))

    @property
    def trained_logprobs(self) -> Tokens:
        """[R] the engine's log-probs of the trained tokens. Without tokens of the environment it is a view: most
        responses have none, and copies of them would fill the memory of rank 0."""
        logprobs = np.asarray(self.logprobs, dtype=np.float32)
        return logprobs if self.trained.all() else logprobs[self.trained]

    @property
    def finite(self) -> bool:
        """Whether the engine gave a finite log-prob for every trained token."""
        with np.errstate(over="ignore", invalid="ignore"):
            total = np.asarray(self.logprobs, dtype=np.float32).sum()  # one pass; rarely infinite if all are finite
        return bool(np.isfinite(total) or np.isfinite(self.trained_logprobs).all())

    @property
    def sequences(self) -> list[tuple[Context | None, int, int]]:
        """What each sequence's tokens follow, None for the prompt of the data, and the indices at which they begin and
        end."""
        ends = [*(context.start for context in self.contexts), len(self.token_ids)]
        found: list[tuple[Context | None, int, int]] = [(None, 0, ends[0])] if ends[0] or not self.contexts else []
        for context, end in zip(self.contexts, ends[1:], strict=True):
            found.append((context, context.start, end))
        return found

    def experts_of(self, part: int) -> Experts | None:
        """The experts of one of the `sequences`, from its first token on."""
        return self.experts[part] if isinstance(self.experts, tuple) else self.experts


@dataclass
class Reward:
    """What a reward function says of one response."""

    score: float  # ≥ algorithm.success_reward_threshold means correct
    feedback: str | None = None  # what was wrong, in words that may be shown to the teacher
    well_formed: bool | None = None  # the response ends in the required format; None: not applicable
    error: str | None = None  # "time-out …" or "crash …": the score is then the failure score
    prediction: str | None = None  # the answer that was read from the response: what a majority vote counts


@dataclass
class Attempt:
    """One answer to a prompt, scored."""

    rollout: Rollout
    reward: Reward
    correct: bool  # the score is at least algorithm.success_reward_threshold
    teachable: bool = False  # there is something to show a teacher of this attempt; routing finds it out
    why: str = ""  # why routing gave it its branch, in words for the log: "wrong, taught by sibling"
    turn_feedback: tuple[str, ...] = ()  # what was wrong in each turn of an episode; "" where nothing was said
    demonstration: array[int] | None = field(default=None, compare=False)
    """The tokens of its text as a teacher reads it, where they are known before routing."""


@dataclass(frozen=True)
class History:
    """What earlier iterations saw of a prompt. Counts fade: an attempt n iterations ago counts 0.85ⁿ.

    Example: History(solved=1.7, failed=3.2, answers=("9 + 3 = 12. <answer>B</answer>",))
    """

    solved: float = 0.0
    failed: float = 0.0
    answers: tuple[str, ...] = ()  # correct responses, the newest last


@dataclass
class Group:
    """All attempts at one prompt: the shape of an iteration's data from the scorer to the log.

    Example: Group(prompt, [Attempt(rollout, Reward(1.0), correct=True), Attempt(other, Reward(0.0), correct=False)])
    """

    prompt: Prompt
    attempts: list[Attempt]
    samples: list[Sample] = field(default_factory=list)
    """What routing made of the attempts, in their order: one for each, and several for an episode of several
    sequences."""
    iteration: int = 0  # of the run, counted from 0; routing sets it
    handed_over: int | None = None  # the first iteration after distillation handed over; None: it has not
    history: History = History()  # only for an algorithm that needs it

    @property
    def first_samples(self) -> list[Sample]:
        """The first sample of each attempt, in their order: an attempt's samples have one branch and one advantage."""
        return [sample for sample in self.samples if sample.part == 0]

    @property
    def scores(self) -> list[float]:
        """The attempts' scores, in their order."""
        return [attempt.reward.score for attempt in self.attempts]


@dataclass(frozen=True)
class Needs:
    """What an algorithm needs of the rest of the system: the only thing that others may ask about it."""

    teacher: bool = False  # some attempts are scored under the self-teacher
    divergence: bool = False  # the teacher is compared with the student on many tokens of the vocabulary
    topk: int = 0  # K: the divergence is over the student's top-k ids; 0: over the full vocabulary
    teacher_tokens: bool = False  # the teacher's log-probs of the trained tokens themselves, for Algorithm.guide
    contrast: bool = False  # a second teacher prompt, which shows a wrong answer; implies teacher_tokens
    history: bool = False  # what earlier iterations saw of each prompt
    reference: bool = False  # log-probs of the initial model
    group_baseline: bool = True  # an advantage is relative to the group: a group of one has none


@dataclass(frozen=True)
class Credit:
    """What one attempt earns: the weight of each loss term, and the advantage of the policy gradient.

    The loss of a trained token is Σ weights[name] · term(name); a term that is not named weighs 0, and an attempt
    without weights is left out of the loss and of its denominator.

    Example: Credit({"policy": 1.0}, advantage=-0.5), Credit({"distill": 1.0}, advantage=-0.5, taught=True)
    """

    weights: Mapping[str, PerToken]
    advantage: PerToken
    taught: bool = False  # the teacher (and with Needs.contrast the second one) scores it; for teachable attempts only


@dataclass(frozen=True)
class Stream:
    """The tokens of one sequence: a prompt, what follows it, and which of the latter are trained.

    The arrays are shared, not copied: a group's samples have one prompt, and a sample's student and teacher have one
    response. Pickled together, they stay shared.
    """

    prompt_ids: array[int]  # [P], never trained
    response_ids: array[int]  # [L − P], answers of the environment included
    trained: NDArray[np.bool_]  # [L − P]

    def __post_init__(self) -> None:
        assert len(self.response_ids) == len(self.trained), "one mask value for each token after the prompt"
        assert len(self.prompt_ids) or not self.trained[:1].any(), "nothing predicts the first token of a sequence"

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)

    def __reduce__(self) -> tuple[type[Stream], tuple[array[int], array[int], NDArray[np.bool_]]]:
        """Pickled without `targets`, which are twice as large as the rest."""
        return Stream, (self.prompt_ids, self.response_ids, self.trained)

    @property
    def trained_tokens(self) -> int:
        """R, the number of trained tokens."""
        return int(np.count_nonzero(self.trained))

    @cached_property
    def targets(self) -> NDArray[np.int64]:
        """[R] positions of the trained tokens in the sequence."""
        return np.flatnonzero(self.trained) + len(self.prompt_ids)

    @property
    def token_ids(self) -> NDArray[np.int32]:
        """[L] the whole sequence, in memory of its own."""
        return self.tokens(0, len(self))

    def tokens(self, start: int, end: int) -> NDArray[np.int32]:
        """[end − start] a part of the sequence, in memory of its own."""
        prompt = len(self.prompt_ids)
        parts = ((self.prompt_ids, start, end), (self.response_ids, max(0, start - prompt), max(0, end - prompt)))
        return np.concatenate([np.frombuffer(part, dtype=np.int32)[first:last] for part, first, last in parts])

    @property
    def trained_ids(self) -> NDArray[np.int32]:
        """[R] ids of the trained tokens."""
        return np.frombuffer(self.response_ids, dtype=np.int32)[self.trained]


def weighs(weight: PerToken) -> bool:
    """Whether it is different from 0 on any token."""
    return bool(weight.any()) if isinstance(weight, np.ndarray) else bool(weight)


@dataclass
class Sample:
    """A sequence to train on, with everything that the loss needs to know about it.

    Values per token belong to the trained tokens, in order: the student's and the teacher's streams differ in length,
    but have the same trained tokens.

    Example: Sample(uid="train:17", sample=3, student=Stream(…), rollout_logprobs=[…], advantage=-0.5,
                    weights={"distill": 1.0}, teacher=Stream(…), teacher_sample=1)
    """

    uid: str
    sample: int
    student: Stream
    rollout_logprobs: Tokens  # [R]
    advantage: PerToken
    weights: Mapping[str, PerToken]  # by loss term
    teacher: Stream | None = None  # the enriched prompt and the same tokens; None: no teacher scores this sample
    teacher_sample: int | None = None  # the sibling that teaches; None: another source, or no teacher
    contrast: Stream | None = None  # the same behind a prompt that shows a wrong answer; Needs.contrast alone
    experts: Experts | None = field(default=None, compare=False)  # of the student's tokens: Rollout.experts
    # How many first tokens of the prompt have the same experts in all samples that have this prompt; None: all.
    same_experts: int | None = field(default=None, compare=False)
    part: int = 0  # which sequence of its attempt it is; parts share the attempt's credit, and count as one response
    attempt_length: int | None = None  # trained tokens of the whole attempt; None: `length`
    turns: tuple[int, ...] = ()  # trained tokens of each turn in it; () for one turn
    first_turn: int = 0  # the number of the first of them in the attempt

    @property
    def response_length(self) -> int:
        """Trained tokens of the attempt that it is a part of."""
        return self.length if self.attempt_length is None else self.attempt_length

    @property
    def length(self) -> int:
        """R, the number of trained tokens."""
        return len(self.rollout_logprobs)

    @cached_property
    def counted(self) -> bool:
        """Whether its trained tokens are in the denominator of the loss. All sequences of an attempt are or none is, so
        an array counts also where a sequence's part of it is 0: routing leaves out what is 0 on the whole attempt."""
        return any(isinstance(weight, np.ndarray) or bool(weight) for weight in self.weights.values())

    @cached_property
    def has_gradient(self) -> bool:
        """Whether any loss term gives it a gradient: an advantage of 0 is all that can take the policy's away."""
        terms = {name for name, weight in self.weights.items() if weighs(weight)}
        return bool(terms - {"policy"}) or ("policy" in terms and weighs(self.advantage))

    @cached_property
    def distilled(self) -> int:
        """Number of tokens with a distillation weight."""
        weight = self.weights.get("distill", 0.0)
        if isinstance(weight, np.ndarray):
            return int(np.count_nonzero(weight))
        return self.length if weight else 0

    @cached_property
    def student_length(self) -> int:
        return len(self.student)

    @cached_property
    def teacher_length(self) -> int:
        return 0 if self.teacher is None else len(self.teacher)

    @cached_property
    def contrast_length(self) -> int:
        return 0 if self.contrast is None else len(self.contrast)

    def length_of(self, which: StreamName) -> int:
        """Tokens of one of its streams, which must exist. Planning asks often: each length is computed once."""
        if which == "student":
            return self.student_length
        self.stream(which)
        return self.teacher_length if which == "teacher" else self.contrast_length

    def stream(self, which: StreamName) -> Stream:
        """One of its streams, which must exist."""
        found: Stream | None = getattr(self, which)
        assert found is not None, f"{self.uid} sample {self.sample} has no {which} prompt"
        return found


@dataclass(frozen=True)
class Padding:
    """Multiples to which lengths, and the number of rows, are filled up; `row` is a multiple of `sequence`.

    Context parallelism cuts every sequence into 2·CP equal chunks; sequence parallelism cuts what a rank holds of a row
    into TP; an interleaved pipeline takes its rows PP at a time, all of one length.
    """

    sequence: int = 1
    row: int = 1
    rows: int = 1  # of a data-parallel rank in one pass; above 1 they are filled up to the longest
    shares: bool = False  # the samples of a row share the tokens that their prompts have in common
    attention_length: int = 0
    """Tokens of a sequence whose causal attention costs as much as its matrix products, where attention behind a prefix
    also computes what its mask hides: prompts are shared where that saves more. 0: it does not, they always are."""


@dataclass(frozen=True)
class Row:
    """Samples that share one packed row, in order. `samples` index the iteration's list of samples; an empty row keeps
    the ranks in step and contributes nothing."""

    samples: tuple[int, ...]
    tokens: int  # sum of the lengths of its sequences, padding excluded; a shared prompt counts once


@dataclass(frozen=True)
class MiniBatchPlan:
    """What every data-parallel rank forwards for one optimizer step.

    `student[d]` and `teacher[d]` are the rows of data-parallel rank d; every rank has the same number of rows in each
    pass. A sample's teacher row lives on the same rank as its student row, so that teacher scores never travel. In one
    rank's share of a plan there is that rank alone, and `samples` of its rows index that rank's samples; the totals are
    still over all ranks.
    """

    student: list[list[Row]]
    teacher: list[list[Row]]
    loss_tokens: int  # N: trained tokens of counted samples, over all ranks (the joint denominator)
    distill_tokens: int  # |Ω|: trained tokens with a distillation weight, over all ranks
    responses: int = 0  # S: counted attempts with a trained token, over all ranks
    forwarded: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Rows and tokens of all ranks, padding excluded, by ScoringPass.rows. "distilled" are the teacher's rows with the
    students' streams, "contrast" those with the streams that show a wrong answer."""


@dataclass(frozen=True)
class BatchPlan:
    """The forward passes of one iteration: one MiniBatchPlan for each optimizer step."""

    mini_batches: list[MiniBatchPlan]
    efficiency: float  # useful tokens ÷ tokens of the padded rows
    imbalance: float  # slowest rank's cost ÷ mean cost − 1


@dataclass
class Batch:
    """One iteration's work of this data-parallel rank."""

    samples: list[Sample]
    plan: BatchPlan
    metrics: dict[str, float]  # of all ranks' samples
