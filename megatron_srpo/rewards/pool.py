"""Scores responses in worker processes: in order, with a time limit for each, whatever the reward functions do.

A worker reports each result as soon as it has it. When it hangs or dies, the driver therefore knows at which task: that
task fails, and the rest of its chunk goes to another worker. A task at which a worker died is tried once more, alone,
because an earlier task may have damaged the worker.
"""

from __future__ import annotations

import os
import selectors
import time
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from megatron_srpo.config import RewardConfig
from megatron_srpo.core.errors import UserError
from megatron_srpo.core.output_log import OutputLog
from megatron_srpo.core.records import Reward
from megatron_srpo.rewards.process import START_SECONDS, STOP_SECONDS, WorkerProcess
from megatron_srpo.rewards.registry import PREDICTION_IS_ANSWER
from megatron_srpo.rewards.worker import Result, Setup, Task

CHUNKS_PER_WORKER = 4  # more chunks balance the workers better, fewer chunks cost less
LARGEST_CHUNK = 64
FAILED_STARTS = 3  # in a row before the pool gives up: one process killed from outside is no reason to end a run
FORMATS: dict[str, dict[str, str]] = {  # by reward.mcq_format: functions in place of the built-in ones
    "strict": {},
    "lenient": {"mcq": "megatron_srpo.rewards.mcq:score_lenient"},
}


@dataclass(frozen=True)
class RewardTask:
    """One response to score: the row's kind, the response's text, the row's answer and its other fields.

    Example: RewardTask("mcq", "It is <answer>B</answer>", "B", {"topic": "algebra"})
    """

    kind: str
    response: str
    answer: object
    metadata: Mapping[str, object] = field(default_factory=dict)

    def as_tuple(self) -> Task:
        return self.kind, self.response, self.answer, dict(self.metadata)


@dataclass
class _Batch:
    """Tasks that were added and not yet returned. They are identified by their number, in the order of `add`."""

    tasks: list[RewardTask] = field(default_factory=list)
    rewards: dict[int, Reward] = field(default_factory=dict)  # by task
    waiting: deque[list[int]] = field(default_factory=deque)  # chunks that no worker has
    retried: set[int] = field(default_factory=set)  # tasks at which a worker died once

    def add(self, tasks: Sequence[RewardTask], chunk: int) -> None:
        numbers = range(len(self.tasks), len(self.tasks) + len(tasks))
        self.tasks += tasks
        self.waiting += [list(numbers[start : start + chunk]) for start in range(0, len(tasks), chunk)]

    @property
    def done(self) -> bool:
        return len(self.rewards) == len(self.tasks)


class RewardPool:
    """`reward.workers` processes that have imported the reward functions of `kinds`. A context manager, for one thread.

    `score` takes a whole batch; `add` and `finish` take a batch that arrives in parts.

    The constructor returns when every function is imported. It raises UserError if one cannot be: an unknown kind, or
    an error in the user's module. `log` gets what the functions print; by default it is discarded.
    """

    def __init__(self, config: RewardConfig, kinds: Iterable[str], log: OutputLog | None = None) -> None:
        self._config, self._log = config, log or OutputLog()
        functions = FORMATS[config.mcq_format] | config.functions
        self._setup = Setup(
            tuple(sorted(set(kinds))), functions, config.timeout_seconds, config.memory_mib, tuple(config.environment)
        )
        self._selector = selectors.DefaultSelector()
        self._workers: list[WorkerProcess] = []
        self._batch = _Batch()
        self._failed_starts = 0  # in a row
        self._was_up = False  # whether all workers have started once
        self._finalizer = weakref.finalize(self, _end_all, self._workers, os.getpid())  # also runs at exit
        try:
            for _ in range(config.workers):
                self._start()
            while not all(worker.ready for worker in self._workers):
                self._handle_events()
            self._was_up = True
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def score(self, tasks: Sequence[RewardTask]) -> list[Reward]:
        """The reward of each task, in order. A task that cannot be scored gets `reward.failure_score` and an `error`.

        Raises UserError only if workers cannot be started again.
        """
        self.add(tasks)
        return self.finish()

    def add(self, tasks: Sequence[RewardTask]) -> None:
        """Start scoring tasks and return at once. Workers get further chunks only during `add` and `finish`."""
        if not self._finalizer.alive:
            raise RuntimeError("the reward pool is closed")
        unknown = {task.kind for task in tasks} - set(self._setup.kinds)
        if unknown:
            raise UserError(f"reward kinds {sorted(unknown)} are not among those the pool was made for")
        self._batch.add(tasks, self._chunk_size(len(tasks)))
        with self._discard_batch_on_error():
            self._handle_events(wait=False)
            self._assign_chunks()

    def finish(self) -> list[Reward]:
        """The rewards of all tasks that were added since the last call, in order; see `score`."""
        with self._discard_batch_on_error():
            while not self._batch.done:
                self._assign_chunks()
                self._handle_events()
        done, self._batch = self._batch, _Batch()
        return [done.rewards[number] for number in range(len(done.tasks))]

    def can_compare(self, kind: str) -> bool:
        """Whether the function of `kind` can score a response against another response's prediction."""
        return kind in PREDICTION_IS_ANSWER and kind not in self._setup.functions

    def close(self) -> None:
        """End the workers. It may be called again."""
        self._finalizer()
        self._selector.close()
        self._log.close()

    @contextmanager
    def _discard_batch_on_error(self) -> Iterator[None]:
        """After an interruption, end the workers that still have tasks: their results belong to no later batch."""
        try:
            yield
        except BaseException:
            self._batch = _Batch()
            for worker in [worker for worker in self._workers if worker.pending]:
                self._remove(worker).kill()
            raise

    def _chunk_size(self, count: int) -> int:
        return min(LARGEST_CHUNK, max(1, -(-count // (CHUNKS_PER_WORKER * self._config.workers))))

    def _assign_chunks(self) -> None:
        """Give a waiting chunk to every idle worker."""
        while len(self._workers) < self._config.workers:  # after an interrupted batch
            self._start()
        for worker in [worker for worker in self._workers if worker.idle]:
            if not self._batch.waiting:
                return
            numbers = self._batch.waiting.popleft()
            try:
                worker.assign(numbers, [self._batch.tasks[number].as_tuple() for number in numbers])
            except OSError:
                self._on_exit(worker)

    def _handle_events(self, *, wait: bool = True) -> None:
        """Handle what workers have sent and whose time is over. With `wait`, wait for the first such event."""
        deadlines = [worker.deadline for worker in self._workers if worker.deadline is not None]
        until = max(0.0, min(deadlines) - time.monotonic()) if deadlines else None
        for key, _ in self._selector.select(until if wait else 0):
            worker: WorkerProcess = key.data
            if worker not in self._workers:  # it was removed during this loop
                continue
            if key.fileobj is worker.channel:
                self._receive(worker)
            elif not worker.drain_output():
                self._selector.unregister(worker.output)
        now = time.monotonic()
        for worker in [w for w in self._workers if w.deadline is not None and w.deadline <= now]:
            self._on_timeout(worker)

    def _receive(self, worker: WorkerProcess) -> None:
        messages = worker.read()
        if messages is None:
            self._on_exit(worker)
            return
        for message in messages:
            if isinstance(message, Result):
                self._settle(worker.take_first(), message)
            elif "failed" in message:
                self._remove(worker).kill()
                self._count_failed_start(message["failed"])
                self._start()
                return
            else:
                worker.ready, worker.deadline = True, None
                self._failed_starts = 0

    def _settle(self, number: int, result: Result) -> None:
        self._batch.rewards[number] = (
            Reward(self._config.failure_score, error=result.error)
            if result.score is None
            else Reward(result.score, result.feedback, result.well_formed, prediction=result.prediction)
        )

    def _on_timeout(self, worker: WorkerProcess) -> None:
        self._remove(worker).kill()
        if not worker.ready:
            self._count_failed_start(
                f"a reward worker did not start: importing the reward functions takes more than {START_SECONDS:g} s. "
                "Import less at the beginning of their module, or lower reward.workers, which import at the same time"
            )
            self._start()
            return
        first, *rest = worker.pending
        seconds = self._config.timeout_seconds
        self._settle(first, Result(error=f"time-out after {seconds:g} s (reward.timeout_seconds)"))
        self._replace(rest)

    def _count_failed_start(self, why: str) -> None:
        """UserError, unless workers have started before: the machine may be busy for a while, or a file system away,
        which is no reason to end a run."""
        self._failed_starts += 1
        if self._failed_starts == FAILED_STARTS or not self._was_up:
            raise UserError(why)

    def _on_exit(self, worker: WorkerProcess) -> None:
        how = self._remove(worker).end()
        if not worker.ready:
            self._failed_starts += 1
            if self._failed_starts == FAILED_STARTS:
                raise UserError(f"a reward worker ended while it imported the reward functions ({how})")
        rest = worker.pending
        if rest:
            first, *rest = rest
            if first in self._batch.retried:
                self._settle(first, Result(error=f"crash: {how}"))
            else:
                self._batch.retried.add(first)
                self._batch.waiting.append([first])
        self._replace(rest)

    def _replace(self, rest: list[int]) -> None:
        """Start another worker, and put the rest of a chunk first in the queue."""
        if rest:
            self._batch.waiting.appendleft(rest)
        self._start()

    def _start(self) -> None:
        worker = WorkerProcess(self._setup, self._log)
        self._workers.append(worker)
        self._selector.register(worker.channel, selectors.EVENT_READ, worker)
        self._selector.register(worker.output, selectors.EVENT_READ, worker)

    def _remove(self, worker: WorkerProcess) -> WorkerProcess:
        self._workers.remove(worker)
        self._selector.unregister(worker.channel)
        if worker.output.fileno() in self._selector.get_map():
            self._selector.unregister(worker.output)
        return worker


def _end_all(workers: list[WorkerProcess], owner: int) -> None:
    """End all workers. Does nothing in a fork of the process `owner`, to which they belong."""
    if os.getpid() != owner:
        return
    for worker in workers:
        worker.close_channel()
    limit = time.monotonic() + STOP_SECONDS
    while workers:
        worker = workers.pop()
        if not worker.pending:
            worker.wait(max(0.0, limit - time.monotonic()))
        worker.kill()
