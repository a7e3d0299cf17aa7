"""The loop.

    prompts ─► engine.generate ─► rewards ─► route ─► plan ─► score (student, teacher) ─► step ─► publish
       ▲                                                                                     │
       └────────────── metrics · eval · checkpoint · next iteration ◄────────────────────────┘

Every rank runs it. Rank 0 alone draws prompts, routes and plans, inside its `source`; every rank gets the samples and
rows of its data-parallel rank. `source.next_batch` waits for the slowest engine and for rank 0, `score` and
`train_step` wait for the slowest data-parallel rank, `publish` for the engines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

from megatron_srpo.batching.collapse import CollapseAlarm
from megatron_srpo.batching.diagnosis import SkippedSteps, explain_skip
from megatron_srpo.batching.handover import Handover
from megatron_srpo.batching.passes import BatchPasses
from megatron_srpo.batching.teacher_refresh import TeacherRefresh
from megatron_srpo.config import Config
from megatron_srpo.core.errors import UserError
from megatron_srpo.core.protocols import (
    Control,
    Engine,
    IterationTimer,
    Log,
    Objective,
    Policy,
    Source,
    State,
    Store,
    Weights,
)
from megatron_srpo.core.records import MiniBatchPlan
from megatron_srpo.core.tensors import StepStats
from megatron_srpo.observe.iteration import Meter, speed_metrics, step_metrics


@dataclass
class Components:
    """What the loop is made of, on this rank; run/assembly.py builds it."""

    config: Config
    control: Control
    source: Source
    policy: Policy
    objective: Objective
    engine: Engine
    weights: Weights  # the policy as it is, in Hugging Face names
    evaluate: Callable[[IterationTimer], dict[str, float]]  # held-out metrics on rank 0; every rank calls it
    store: Store
    log: Log
    timer: IterationTimer
    meter: Meter
    should_stop: Callable[[], bool]  # this rank was asked to stop
    skipped: SkippedSteps
    refresh: TeacherRefresh
    handover: Handover
    collapse: CollapseAlarm


class Trainer:
    """Runs iterations until the configured number, or until asked to stop."""

    def __init__(self, parts: Components, *, start_iteration: int = 0) -> None:
        self.parts, self.config = parts, parts.config
        self.iteration = start_iteration

    def run(self) -> bool:
        """Train. True when all iterations are done, False when stopped early; saved either way if one is done."""
        parts, total, evaluated = self.parts, self.config.run.iterations, self.config.eval.every
        if self.iteration == 0 and evaluated:
            if found := self._evaluate():
                parts.log.log(0, found)
            if parts.control.any(parts.should_stop()):
                return False
        while self.iteration < total:
            parts.timer.restart(self.iteration + 1)
            with self._engines_turn(publish_next=True):
                batch = parts.source.next_batch(self.iteration, parts.timer)
            passes = BatchPasses(batch, parts.policy, parts.objective)
            for scoring in parts.objective.passes():
                with parts.timer.phase("score" if scoring.weights == "student" else "teacher"):
                    passes.run(scoring)
            with parts.timer.phase("train"):
                steps = [self._step(passes, mini) for mini in batch.plan.mini_batches]
                parts.policy.end_iteration(refresh_teacher=parts.refresh.due(batch.metrics))
            with parts.timer.phase("publish"):
                parts.engine.publish(parts.weights, self.iteration + 1)
            metrics = batch.metrics | step_metrics(steps, parts.policy.steps) | parts.refresh.metrics()
            metrics |= parts.handover.watch(self.iteration, metrics)
            self.iteration += 1
            metrics |= speed_metrics(metrics, passes.forwarded, parts.timer.seconds(), parts.meter)
            parts.skipped.count(steps, metrics)
            if evaluated and (self.iteration % evaluated == 0 or self.iteration == total):
                with parts.timer.phase("eval"):
                    metrics |= self._evaluate()
            parts.log.log(self.iteration, metrics)
            problem = parts.collapse.watch(self.iteration, metrics, parts.log) or parts.skipped.reason_to_stop(metrics)
            stop = parts.control.any(parts.should_stop()) or bool(problem)
            self._save(metrics, last=stop or self.iteration == total)
            if problem:
                raise UserError(f"stopped after iteration {self.iteration}: {problem}")
            if stop and self.iteration < total:
                return False
        return True

    @contextmanager
    def _engines_turn(self, *, publish_next: bool = False) -> Iterator[None]:
        """Inside the block engines generate. By configuration the trainer's tensors are in host memory meanwhile, and
        engines sleep afterwards, so that one has the device's memory at a time."""
        offload = self.config.train.offload_while_generating
        with self.parts.policy.on_host() if offload else nullcontext():
            yield
            if self.config.rollout.sleep_while_training:
                self.parts.engine.sleep(publish_next=publish_next)

    def _evaluate(self) -> dict[str, float]:
        with self._engines_turn():
            return self.parts.evaluate(self.parts.timer)

    def _step(self, passes: BatchPasses, mini: MiniBatchPlan) -> StepStats | None:
        step = passes.train_step(mini)
        if step is not None and step.skipped:
            explain_skip(passes, mini, self.parts.control, self.parts.log, self.iteration + 1)
        return step

    def _save(self, metrics: dict[str, float], *, last: bool) -> None:
        """Finish the checkpoint that is being written, and begin one where one is due."""
        parts, every = self.parts, self.config.checkpoint.every
        parts.store.poll()
        if last or (every and self.iteration % every == 0):
            with parts.timer.phase("checkpoint"):
                parts.store.save(parts.policy, self.iteration, parts.control.share(self._state), metrics, last=last)

    def _state(self) -> State:
        """Rank 0: what a resumed run goes on with, besides the policy."""
        parts = self.parts
        return {
            "loader": parts.source.state_dict(),
            "observer": parts.log.state_dict(),
            "skipped_in_a_row": parts.skipped.in_a_row,
            "teacher": parts.refresh.state_dict(),
            "handover": parts.handover.state_dict(),
            "collapse": parts.collapse.state_dict(),
        }
