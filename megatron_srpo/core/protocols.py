"""What the rooms ask of each other. The trainer knows these and nothing of what implements them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from megatron_srpo.core.records import Batch, BatchPlan, Group, Padding, Prompt, Rollout, Sample

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_srpo.core.tensors import LossFunction, PackedBatch, ScoreFunction, Scores, StepStats

T = TypeVar("T")
State = Mapping[str, object]  # JSON-able: what a checkpoint keeps of a part, and gives it back
Weights = Iterable[tuple[str, "Tensor"]]  # (Hugging Face name, full tensor); every rank iterates


class Control(Protocol):
    """How rank 0 and the other ranks talk. Every rank makes the same calls in the same order."""

    @property
    def is_driver(self) -> bool:
        """Whether this is rank 0."""

    def share(self, compute: Callable[[], T]) -> T:
        """Runs `compute` on rank 0; every rank gets its result, or raises its exception."""

    def everywhere(self, compute: Callable[[], T]) -> T:
        """Runs `compute` on every rank; when it fails on one, every rank raises the first rank's exception."""

    def collect(self, mine: T) -> list[T]:
        """What every rank brings, by rank, on every rank."""

    def any(self, flag: bool) -> bool:
        """True on every rank if it is true on one."""


Share = tuple[list[Sample], BatchPlan]  # a data-parallel rank's samples, and the plan with its rows alone


class RoleControl(Control, Protocol):
    """How rank 0 leads and the other ranks follow: what rank 0 broadcasts, the others receive."""

    def failing_together(self) -> AbstractContextManager[None]:
        """Rank 0: an exception inside the block is raised there and, out of their next `receive`, on all ranks."""

    def broadcast(self, value: object) -> None:
        """Rank 0: send `value` to all ranks that `receive`."""

    def receive(self) -> object:
        """Other ranks: what rank 0 broadcasts, or raise what failed there."""

    def deal(self, part: Callable[[int], Share]) -> Share:
        """Rank 0: send `part` of each data-parallel rank to it; returns its own."""

    def receive_share(self) -> Share:
        """Other ranks: the part of this data-parallel rank."""


class Policy(Protocol):
    """The trained model on one rank."""

    steps: int  # optimizer steps asked for, skipped ones included
    padding: Padding

    def weights(self, which: str) -> AbstractContextManager[None]:
        """Inside the block the model computes with the "student"'s, the "teacher"'s or the "reference"'s weights."""

    def on_host(self) -> AbstractContextManager[None]:
        """Inside the block everything of the policy is in host memory, and must not be used."""

    def score(
        self, rows: Sequence[PackedBatch], score: ScoreFunction, *, at: Sequence[Tensor] | None = None,
        chosen: list[Tensor] | None = None,
    ) -> list[dict[str, Tensor]]:  # fmt: skip
        """Scores of every row without gradient in host memory, at the positions `at` of each row if they are given; []
        on ranks that are not on the last pipeline stage. `chosen` gets the experts of every row."""

    def train_step(self, rows: Sequence[PackedBatch], loss: LossFunction) -> StepStats:
        """One optimizer step on Σ loss(row) over all rows of all data-parallel ranks."""

    def end_iteration(self, *, refresh_teacher: bool) -> None:
        """All optimizer steps of an iteration are done: update a teacher that is updated once per iteration, or copy
        the student into it."""

    def sum_over_data(self, values: Tensor) -> Tensor:
        """Sum of `values` over the samples of all ranks, on all ranks."""


class ScoringPass(Protocol):
    """A forward pass whose results are kept for each sample; losses/objective.py makes them."""

    @property
    def name(self) -> str: ...
    @property
    def rows(self) -> str: ...
    @property
    def weights(self) -> str: ...
    @property
    def score(self) -> ScoreFunction: ...
    @property
    def start(self) -> int: ...
    @property
    def stop(self) -> int | None: ...
    @property
    def frees(self) -> tuple[str, ...]: ...
    @property
    def each_step(self) -> bool: ...
    @property
    def replays(self) -> bool: ...
    @property
    def records(self) -> bool: ...


class Objective(Protocol):
    """What the passes of an iteration compute."""

    def passes(self) -> Sequence[ScoringPass]:
        """The scoring passes of one iteration, in order."""

    def check_pass(self) -> ScoringPass:
        """Log-probs of the rows of a step, to look for what is not finite."""

    def distill_weight_sum(self, samples: Sequence[Sample], scores: Sequence[Scores]) -> Tensor:
        """Sum of the dynamic weights over the distilled tokens of these samples."""

    def loss(self, *, loss_tokens: int, responses: int, distill_weight_mean: float) -> LossFunction:
        """The loss of one row inside an optimizer step with these global denominators."""

    def end_step(self) -> None:
        """The optimizer step is done, for which scoring passes may have kept something."""


class Engine(Protocol):
    """What the trainer asks of a rollout engine; rollout/engine.py has the rest."""

    def publish(self, weights: Weights, version: int) -> None:
        """Take new weights."""

    def sleep(self, *, publish_next: bool = False) -> None:
        """Free the device's memory until it is needed. With `publish_next` the next call is a publish."""


class Scorer(Protocol):
    """Scores responses while others are still being generated."""

    def start(self, prompts: list[Prompt], *, taught: bool = True) -> Callable[[Rollout], None] | None:
        """Begin a batch; returns what an engine calls with each response that is complete. `taught`: teachers may be
        shown them."""

    def read(self, rollout: Rollout) -> None:
        """Begin what a teacher needs of a response that comes before its batch is started. It is quick."""

    def finish(self, rollouts: Sequence[Rollout]) -> list[Group]:
        """The groups of rank 0's `rollouts`, by prompt; [] on other ranks."""

    def same_answers(self, pairs: Sequence[tuple[Prompt, str, str]]) -> list[bool]:
        """Rank 0, for each (prompt, response, prediction of another response): whether the reward function takes the
        response for the same answer."""


class Source(Protocol):
    """Where an iteration's work comes from."""

    def next_batch(self, iteration: int, timer: Timer) -> Batch:
        """This rank's share of an iteration."""

    def state_dict(self) -> State:
        """Where a resumed run goes on, on every rank."""


class Store(Protocol):
    """The run's checkpoints."""

    last: Path | None  # the newest one that this process has written

    def poll(self) -> None:
        """Finish what has been written since the last call."""

    def save(self, policy: Policy, iteration: int, state: State, metrics: Mapping[str, float], *, last: bool) -> None:
        """Begin a checkpoint."""


class Log(Protocol):
    """Everything that is told about a run. On other ranks than 0 it tells nothing."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record one iteration's metrics."""

    def record(self, step: int, groups: Sequence[Group]) -> None:
        """Record what became of every response of one iteration."""

    def message(self, text: str) -> None:
        """A line for the user."""

    def warn(self, text: str) -> None:
        """A warning for the user."""

    def state_dict(self) -> State:
        """What a resumed run's log goes on with."""

    def close(self) -> None:
        """Flush and close; a second call does nothing."""


class Timer(Protocol):
    """Marks what a rank does, and how long it takes."""

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Inside the block this rank is in phase `name`."""


class IterationTimer(Timer, Protocol):
    """Adds up seconds by phase."""

    def restart(self, iteration: int) -> None:
        """Begin iteration number `iteration`, counted from 1."""

    def seconds(self) -> dict[str, float]:
        """Seconds by phase, and those of the whole iteration so far as "step"."""
