"""Scores responses in worker processes: in order, within a time for each one, whatever the functions do.

A worker reports every result when it has it. So when one hangs or dies, the driver knows at which task: that one fails,
and the rest of its chunk goes to another worker. A task at which a worker died gets a second try alone, because an
earlier one may have done the damage.
"""

from __future__ import annotations

import os
import selectors
import time
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from megatron_srpo.config import RewardConfig
from megatron_srpo.core.errors import UserError
from megatron_srpo.core.records import Reward
from megatron_srpo.rewards.process import STOP_SECONDS, WorkerProcess
from megatron_srpo.rewards.worker import Setup

CHUNKS_PER_WORKER = 4  # more balance better, fewer cost less
LARGEST_CHUNK = 64
STARTS = 3  # that may fail in a row: one process killed from outside is no reason to end a run


@dataclass(frozen=True)
class RewardTask:
    """One response to score: the row's kind, the response's text, the row's answer and other fields."""

    kind: str
    response: str
    answer: Any
    metadata: dict[str, Any] = field(default_factory=dict)

    def as_tuple(self) -> tuple:
        return self.kind, self.response, self.answer, self.metadata


@dataclass
class _Batch:
    """Tasks on their way. They are known by their number, in the order in which they came."""

    tasks: list[RewardTask] = field(default_factory=list)
    rewards: list[Reward | None] = field(default_factory=list)
    waiting: deque[list[int]] = field(default_factory=deque)  # chunks that no worker has
    open: int = 0  # tasks without a reward
    retried: set[int] = field(default_factory=set)

    def add(self, tasks: Sequence[RewardTask], chunk: int) -> None:
        numbers = range(len(self.tasks), len(self.tasks) + len(tasks))
        self.tasks += tasks
        self.rewards += [None] * len(tasks)
        self.open += len(tasks)
        self.waiting += [list(numbers[start : start + chunk]) for start in range(0, len(tasks), chunk)]

    def settle(self, number: int, reward: Reward) -> None:
        self.rewards[number] = reward
        self.open -= 1


class RewardPool:
    """`reward.workers` processes that have imported the reward functions of `kinds`. A context manager; for one thread.

    `score` takes a whole batch; `add` and `finish` one that comes bit by bit.

    The constructor returns when every function is imported; UserError if one cannot be: unknown kind, an error in the
    user's module.
    """

    def __init__(self, config: RewardConfig, kinds: Iterable[str]) -> None:
        self._config = config
        self._setup = Setup(
            tuple(sorted(set(kinds))), dict(config.functions), config.timeout_seconds, config.memory_mib
        )
        self._selector = selectors.DefaultSelector()
        self._workers: list[WorkerProcess] = []
        self._batch = _Batch()  # of `add` and `finish`
        self._failed_starts = 0  # in a row
        self._finalizer = weakref.finalize(self, _end_all, self._workers, os.getpid())  # also at exit
        try:
            for _ in range(config.workers):
                self._start()
            while not all(worker.ready for worker in self._workers):
                self._turn(None)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def score(self, tasks: Sequence[RewardTask]) -> list[Reward]:
        """The reward of each task, in order. What cannot be scored gets `reward.failure_score` and an `error`.

        Raises UserError only if workers cannot be started again.
        """
        self.add(tasks)
        return self.finish()

    def add(self, tasks: Sequence[RewardTask]) -> None:
        """Begin to score tasks and return at once. Between calls the workers do what they were given, and no more."""
        if not self._finalizer.alive:
            raise RuntimeError("the reward pool is closed")
        unknown = {task.kind for task in tasks} - set(self._setup.kinds)
        if unknown:
            raise UserError(f"reward kinds {sorted(unknown)} are not among those the pool was made for")
        self._batch.add(tasks, self._chunk_size(len(tasks)))
        with self._abandoned_on_failure():
            self._turn(self._batch, wait=False)
            self._hand_out(self._batch)

    def finish(self) -> list[Reward]:
        """The rewards of all that was added since the last call, in order; see `score`."""
        batch = self._batch
        with self._abandoned_on_failure():
            while batch.open:
                self._hand_out(batch)
                self._turn(batch)
        self._batch = _Batch()
        return batch.rewards

    @contextmanager
    def _abandoned_on_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException:  # interrupted: results on their way belong to no later batch
            self._batch = _Batch()
            for worker in [worker for worker in self._workers if worker.pending]:
                self._forget(worker).kill()
            raise

    def close(self) -> None:
        """End the workers. May be called again."""
        self._finalizer()
        self._selector.close()

    def _chunk_size(self, count: int) -> int:
        return min(LARGEST_CHUNK, max(1, -(-count // (CHUNKS_PER_WORKER * self._config.workers))))

    def _hand_out(self, batch: _Batch) -> None:
        while len(self._workers) < self._config.workers:  # after an interrupted batch
            self._start()
        for worker in [worker for worker in self._workers if worker.idle]:
            if not batch.waiting:
                return
            numbers = batch.waiting.popleft()
            try:
                worker.assign(numbers, [batch.tasks[number].as_tuple() for number in numbers])
            except OSError:
                self._died(worker, batch)

    def _turn(self, batch: _Batch | None, *, wait: bool = True) -> None:
        """Wait for the workers' next news, or for the first deadline, and act on it; or act on what there is."""
        deadlines = [worker.deadline for worker in self._workers if worker.deadline is not None]
        until = max(0.0, min(deadlines) - time.monotonic()) if deadlines else None
        for key, _ in self._selector.select(until if wait else 0):
            worker: WorkerProcess = key.data
            if worker not in self._workers:  # its end was noticed a moment ago
                continue
            if key.fileobj is worker.channel:
                self._receive(worker, batch)
            elif not worker.drain_output():
                self._selector.unregister(worker.output)
        now = time.monotonic()
        for worker in [w for w in self._workers if w.deadline is not None and w.deadline <= now]:
            self._hangs(worker, batch)

    def _receive(self, worker: WorkerProcess, batch: _Batch | None) -> None:
        messages = worker.read()
        if messages is None:
            self._died(worker, batch)
            return
        for message in messages:
            if isinstance(message, list):
                batch.settle(worker.take_first(), self._reward(*message))
            elif "failed" in message:
                raise UserError(message["failed"])
            else:
                worker.ready, worker.deadline = True, None
                self._failed_starts = 0

    def _reward(
        self, score: float | None, feedback: str | None, well_formed: bool | None, prediction: str | None,
        error: str | None,
    ) -> Reward:  # fmt: skip
        if score is None:
            return Reward(self._config.failure_score, error=error)
        return Reward(score, feedback, well_formed, prediction=prediction)

    def _hangs(self, worker: WorkerProcess, batch: _Batch | None) -> None:
        self._forget(worker).kill()
        if not worker.ready:
            raise UserError("a reward worker did not start: importing the reward functions takes too long")
        first, *rest = worker.pending
        error = f"time-out after {self._config.timeout_seconds:g} s (reward.timeout_seconds)"
        batch.settle(first, Reward(self._config.failure_score, error=error))
        self._replace(rest, batch)

    def _died(self, worker: WorkerProcess, batch: _Batch | None) -> None:
        how = self._forget(worker).end()
        if not worker.ready:
            self._failed_starts += 1
            if self._failed_starts == STARTS:
                raise UserError(f"a reward worker ended while it imported the reward functions ({how})")
            self._start()
            return
        rest = worker.pending
        if rest:
            first, *rest = rest
            if first in batch.retried:
                batch.settle(first, Reward(self._config.failure_score, error=f"crash: {how}"))
            else:
                batch.retried.add(first)
                batch.waiting.append([first])
        self._replace(rest, batch)

    def _replace(self, rest: list[int], batch: _Batch | None) -> None:
        if rest:
            batch.waiting.appendleft(rest)
        self._start()

    def _start(self) -> None:
        worker = WorkerProcess(self._setup)
        self._workers.append(worker)
        self._selector.register(worker.channel, selectors.EVENT_READ, worker)
        self._selector.register(worker.output, selectors.EVENT_READ, worker)

    def _forget(self, worker: WorkerProcess) -> WorkerProcess:
        self._workers.remove(worker)
        self._selector.unregister(worker.channel)
        if worker.output.fileno() in self._selector.get_map():
            self._selector.unregister(worker.output)
        return worker


def _end_all(workers: list[WorkerProcess], owner: int) -> None:
    if os.getpid() != owner:  # a fork of the driver exits: the workers are not its own
        return
    for worker in workers:
        worker.hang_up()
    limit = time.monotonic() + STOP_SECONDS
    while workers:
        worker = workers.pop()
        if not worker.pending:
            worker.wait(max(0.0, limit - time.monotonic()))
        worker.kill()
