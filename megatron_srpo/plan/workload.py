"""Describes an iteration: how many prompts, how long their responses are, and how many are distilled."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from statistics import NormalDist

KEYS_A_TOKEN = 8.0  # the most that a row has on average: batching/rows.py's number, whose module needs torch
QUANTILES = 64  # the number of equally likely lengths that represent a distribution


@dataclass(frozen=True)
class Workload:
    """One iteration; lengths are tokens. The defaults are the paper's recipe (arXiv 2604.02288). It does not give
    response lengths, so those are an assumption."""

    prompts: int = 32
    samples: int = 8  # responses to each prompt
    prompt_mean: int = 400
    prompt_max: int = 2048
    response_mean: int = 2000
    response_max: int = 8192
    response_sigma: float = 0.8  # of the logarithm of a length
    teacher_prompt_max: int = 10240  # question and demonstration
    distilled: float = 0.3  # share of samples that a teacher scores; with srpo it falls during a run
    steps: int = 1  # optimizer steps in each iteration
    topk: int = 100
    iterations: int = 475  # the paper's 10 hours at 75.8 s
    packing: float = 0.97  # share of useful tokens in packed rows
    imbalance: float = 0.03  # how much the slowest data-parallel rank exceeds the mean
    shares_prompts: bool = True  # the responses in a packed row use one copy of their prompt
    teacher_head_mib: int = 2048  # train.teacher_head_mib; 0: the student's top-k ids have a pass of their own
    teacher: str = "ema"  # teacher.mode
    contrast: bool = False  # the teacher scores the samples behind a wrong demonstration too (Needs.contrast)
    scores_each_step: bool = False  # the teacher scores before every step (train.score_every = "step")
    reference: bool = False  # samples are scored under the initial model too (Needs.reference)
    starts_as_base: bool = False  # the initial model is the one without adapters, which needs no shadow
    full_vocabulary: bool = False  # distillation compares whole distributions (algorithm.distillation_topk = 0)
    engine_sequences: int = 256  # responses that an engine generates at the same time at most (rollout.max_num_seqs)
    correct: float | None = None  # share of samples that are correct; None: those that are not distilled

    @property
    def rollouts(self) -> int:
        return self.prompts * self.samples

    @property
    def mode(self) -> str:
        """teacher.mode, "live" where nothing is distilled."""
        return self.teacher if self.distilled > 0 else "live"

    @property
    def _initial(self) -> bool:
        """Whether the teacher is, or is made of, the initial model."""
        return self.mode in ("frozen", "trust_region")

    @property
    def shadows(self) -> int:
        """Sets of weights besides the student's (mcore/policy.py): the teacher's, and the reference."""
        return (self.mode in ("ema", "refresh")) + ((self.reference or self._initial) and not self.starts_as_base)

    @property
    def swaps(self) -> int:
        """How often an iteration swaps a shadow in and out again."""
        initial = 0 if self.starts_as_base else self._initial
        teachers = ((self.mode in ("ema", "refresh")) + initial) * (1 + self.contrast)
        return teachers * (self.steps if self.scores_each_step else 1) + (self.reference and not self.starts_as_base)

    @property
    def teacher_passes(self) -> int:
        """Passes over the samples that a teacher judges: of the teacher, for a contrast once more, and of the initial
        model where logits are mixed."""
        return (1 + self.contrast) * (1 + self.joins_heads)

    @property
    def joins_heads(self) -> bool:
        """Whether the teacher mixes the logits of the initial and of the current model."""
        return self.mode == "trust_region"

    def response_lengths(self) -> tuple[int, ...]:
        """QUANTILES equally likely response lengths, shortest first."""
        return log_normal_lengths(min(self.response_mean, self.response_max), self.response_max, self.response_sigma)

    @property
    def distilled_tokens(self) -> float:
        """Tokens of responses that a teacher scores in an iteration."""
        return self.distilled * self.rollouts * _mean(self.response_lengths())

    @property
    def student_tokens(self) -> float:
        """Tokens of all samples of an iteration, each with its prompt."""
        return self.rollouts * (self.prompt_mean + _mean(self.response_lengths()))

    def shared_tokens(self, copies: float, share: float = 1.0) -> float:
        """Tokens of this share of all samples if a prompt is computed `copies` times in a pass, without its last token,
        which every sample has (batching/rows.py)."""
        responses = share * self.rollouts * (1 + _mean(self.response_lengths()))
        return self.prompts * copies * (self.prompt_mean - 1) + responses

    def shared_context(self, copies: float) -> float:
        """`mean_context` where a prompt is computed `copies` times: twice the mean number of keys that a token attends
        to."""
        prompt, lengths = self.prompt_mean, self.response_lengths()
        branches = sum((prompt + length) ** 2 - prompt**2 for length in lengths) / len(lengths)
        squares = self.prompts * (copies * prompt**2 + self.samples * branches)
        return squares / self.shared_tokens(copies)

    def shared_keys(self, copies: float, share: float = 1.0) -> float:
        """How many keys (and values) attention keeps for each token of a pass: those of a prompt once more for every
        response behind it (batching/rows.py: room_of)."""
        samples = share * self.samples
        if copies >= samples:
            return 1.0
        behind = samples * (self.prompt_mean + _mean(self.response_lengths()))
        keys = self.prompts * (copies * (self.prompt_mean - 1) + behind)
        return min(KEYS_A_TOKEN, keys / self.shared_tokens(copies, share))

    @property
    def taught(self) -> float:
        """Samples of a prompt that are distilled, on average."""
        return self.distilled * self.samples

    @property
    def demonstration(self) -> float:
        """Tokens of the answer that a teacher is shown: a sibling's, cut to fit."""
        return min(_mean(self.response_lengths()), self.teacher_prompt_max - self.prompt_mean)

    @property
    def _siblings(self) -> float:
        """Correct samples of a prompt, of which teachers are shown one at random."""
        return max(1.0, self.samples - self.taught if self.correct is None else self.samples * self.correct)

    def demonstrations(self, copies: float) -> float:
        """How many answers the teachers of a prompt are shown in one pass, those that are the same once for each of
        `copies` rows."""
        different = self._siblings * (1 - (1 - 1 / self._siblings) ** self.taught)
        return self.taught if copies >= self.taught else min(self.taught, different + copies - 1)

    def teacher_tokens(self, copies: float) -> float:
        """Tokens of the distilled samples as the teacher sees them: question, a sibling's response, own response. The
        question is computed `copies` times in a pass, and shared demonstrations once for each copy."""
        response = _mean(self.response_lengths())
        shared = copies * (self.prompt_mean - 1) + self.demonstrations(copies) * self.demonstration
        return self.prompts * (shared + self.taught * (1 + response))

    def teacher_keys(self, copies: float) -> float:
        """`shared_keys` of the teacher's pass, in which those that are shown the same answer are behind it too."""
        if copies >= self.taught:
            return 1.0
        question, siblings, together = self.prompt_mean - 1, self._siblings, self.taught / copies
        enriched = question + self.demonstration
        shown = siblings * (1 - (1 - 1 / siblings) ** together)
        to_one = together * (1 - 1 / siblings) ** (together - 1)
        behind = self.taught * (enriched + 1 + _mean(self.response_lengths()))
        keys = self.prompts * (copies * (question + max(0.0, shown - to_one) * enriched) + behind)
        return min(KEYS_A_TOKEN, keys / self.teacher_tokens(copies))

    def teacher_context(self, copies: float) -> float:
        """`shared_context` of the teacher's pass."""
        prompt, enriched = self.prompt_mean, self.prompt_mean + self.demonstration
        lengths = self.response_lengths()
        branches = sum((enriched + length) ** 2 - enriched**2 for length in lengths) / len(lengths)
        shown = self.demonstrations(copies) * (enriched**2 - prompt**2)
        return self.prompts * (copies * prompt**2 + shown + self.taught * branches) / self.teacher_tokens(copies)

    def mean_context(self) -> float:
        """Σ n² / Σ n over sequences of n tokens: twice the number of keys that a token attends to on average."""
        return _mean_context(self.response_lengths(), self.prompt_mean)

    @property
    def longest_row(self) -> int:
        """Tokens of the longest sequence that a packed row must hold."""
        teacher = self.teacher_prompt_max if self.distilled > 0 else self.prompt_max
        return max(self.prompt_max, teacher) + self.response_max


@functools.cache
def log_normal_lengths(mean: int, longest: int, sigma: float) -> tuple[int, ...]:
    """QUANTILES equally likely lengths of a log-normal distribution, cut at `longest`, with a mean of about `mean`."""
    levels = [NormalDist().inv_cdf((i + 0.5) / QUANTILES) for i in range(QUANTILES)]

    def lengths(centre: float) -> tuple[int, ...]:
        return tuple(min(longest, max(1, round(math.exp(centre + sigma * level)))) for level in levels)

    low, high = 0.0, math.log(longest) + 6 * sigma
    for _ in range(50):  # the cut lowers the mean: find the centre that restores it
        middle = (low + high) / 2
        low, high = (middle, high) if sum(lengths(middle)) < mean * QUANTILES else (low, middle)
    return lengths(high)


@functools.cache
def _mean_context(responses: tuple[int, ...], prompt: float) -> float:
    whole = [prompt + length for length in responses]
    return sum(n * n for n in whole) / sum(whole)


@functools.cache
def _mean(values: tuple[int, ...]) -> float:
    return sum(values) / len(values)
