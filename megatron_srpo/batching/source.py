"""Where an iteration's work comes from. Rank 0 draws prompts, routes and plans; the other ranks generate with it and
receive their share. Rank 0 broadcasts prompts to generate for, once or several times, and then the metrics.

    rank 0         prompts ─► broadcast ─► generate, score ─► enough groups? ─► route ─► plan ─► metrics ─► shares
    other ranks               receive   ─► generate, score                                      receive ─► receive
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from megatron_srpo.algorithms.contrast import ContrastingGroups
from megatron_srpo.algorithms.history import Histories
from megatron_srpo.algorithms.report import RoutingReport
from megatron_srpo.algorithms.routing import route
from megatron_srpo.algorithms.teachers import TeacherPromptFunction
from megatron_srpo.batching.diagnosis import shortened
from megatron_srpo.batching.handover import Handover
from megatron_srpo.batching.plan import plan_batch, share_of
from megatron_srpo.config import Config
from megatron_srpo.core.errors import UserError
from megatron_srpo.core.output_log import printed_where
from megatron_srpo.core.protocols import Log, RoleControl, State, Timer
from megatron_srpo.core.records import Batch, BatchPlan, Group, Padding, Prompt, Sample
from megatron_srpo.core.text import causes


class Generator(Protocol):
    """Answers prompts and scores the answers. Collective."""

    def __call__(self, prompts: list[Prompt], iteration: int, refill: int, timer: Timer) -> list[Group]:
        """The groups on rank 0, by prompt; [] on the other ranks. A prompt that comes again in another `refill` of the
        same iteration gets other answers."""


class Loader(Protocol):
    """Draws prompts."""

    @property
    def epoch(self) -> int: ...

    def next_batch(self) -> list[Prompt]: ...

    def state_dict(self) -> State: ...


class DriverSource:
    """Rank 0's. `prepare` is called with the prompts of groups of which some attempts may be shown a solution.
    `engine_metrics`: what the engine tells of the last generation. `experts`: the trainer uses the engine's
    (rollout.routing_replay)."""

    def __init__(
        self, config: Config, control: RoleControl, generate: Generator, loader: Loader,
        teacher_prompt: TeacherPromptFunction, histories: Histories, log: Log, *, dp_size: int, padding: Padding,
        engine_metrics: Callable[[], dict[str, float]], experts: bool = False, handover: Handover | None = None,
        prepare: Callable[[Sequence[Prompt]], None] = lambda prompts: None,
    ) -> None:  # fmt: skip
        self._config, self._control, self._generate, self._loader = config, control, generate, loader
        self._teacher_prompt, self._histories, self._log = teacher_prompt, histories, log
        self._dp_size, self._padding, self._engine_metrics = dp_size, padding, engine_metrics
        self._experts, self._prepare = experts, prepare
        self._handover = handover or Handover(config, {})

    def next_batch(self, iteration: int, timer: Timer) -> Batch:
        """This rank's share of an iteration."""
        control = self._control
        groups = self._groups(iteration, timer)
        with without_cycle_collector():
            with control.failing_together():
                with timer.phase("route"):
                    report = self._route(groups.groups, iteration)
                    self._histories.observe(groups.generated, iteration)  # those that are not trained, too
                    plan = self._plan([group.samples for group in groups.groups], iteration)
                metrics = report.metrics() | groups.metrics() | self._engine_metrics()
                metrics |= self._batch_metrics(report, plan)
                self._log.record(iteration + 1, groups.groups)
            control.broadcast(metrics)
            with timer.phase("deal"):
                samples, share = control.deal(lambda rank: share_of(report.samples, plan, rank))
        return Batch(samples, share, metrics)

    def _groups(self, iteration: int, timer: Timer) -> ContrastingGroups:
        """One batch of prompts with scored answers. With rollout.max_refills, groups without a contrast make room for
        those of further batches."""
        limit = self._config.rollout.max_refills
        groups = ContrastingGroups(self._config.rollout.rollout_batch_size, self._config.algorithm, choose=limit > 0)
        for refill in range(limit + 1):
            with self._control.failing_together():
                prompts = self._loader.next_batch()
            self._control.broadcast(prompts)
            generated = self._generate(prompts, iteration, refill, timer)
            self._histories.give(generated, iteration)
            groups.add(generated)
            if groups.full:
                break
        return groups

    def _route(self, groups: list[Group], iteration: int) -> RoutingReport:
        if self._experts:
            require_experts(groups)
        for group in groups:
            group.handed_over = self._handover.since
        self._prepare([group.prompt for group in groups if self._may_be_taught(group)])
        report = route(
            groups, self._config.algorithm, seed=self._config.run.seed, iteration=iteration,
            teacher_prompt=self._teacher_prompt, feedback_with_solution=self._config.teacher.feedback_with_solution,
            feedback_at_turn=self._config.teacher.feedback_at == "turn",
        )  # fmt: skip
        if report.failed:
            self._log.warn(
                f"iteration {iteration + 1}: {len(report.failed)} of {len(report.attempts)} rewards failed, and count "
                f"as reward.failure_score: {causes(error for _, error in report.failed)}; the first is that of "
                f"{report.failed[0][0]}{printed_where(self._config.run.output_dir)}"
            )
        if report.nonfinite:
            self._log.warn(
                f"iteration {iteration + 1}: the rollout engine's log-probs are not finite: "
                f"{shortened(report.nonfinite)}. Left out of the loss"
            )
        return report

    def _may_be_taught(self, group: Group) -> bool:
        """Whether a wrong attempt may be shown a solution: that of a sibling needs a correct one."""
        teaching, outcomes = self._config.algorithm.teaching, {attempt.correct for attempt in group.attempts}
        return teaching is not None and False in outcomes and (True in outcomes or teaching.sources != ("sibling",))

    def _plan(self, groups: list[list[Sample]], iteration: int) -> BatchPlan:
        return plan_batch(
            groups, dp_size=self._dp_size, max_tokens=self._config.row_budget,
            prompts_per_mini_batch=self._config.train.prompts_per_mini_batch, padding=self._padding,
            seed=self._config.run.seed + iteration, drop_zero_gradient=self._config.drops_zero_gradient,
        )  # fmt: skip

    def _batch_metrics(self, report: RoutingReport, plan: BatchPlan) -> dict[str, float]:
        samples = report.samples
        return {
            "perf/packing_efficiency": plan.efficiency,
            "perf/imbalance": plan.imbalance,
            "perf/total_tokens": sum(sample.student_length for sample in samples),
            "perf/sequences": len(samples),
            "rollout/responses": len(report.attempts),
            "rollout/weight_version": max(attempt.rollout.newest_version for attempt in report.attempts),
            "data/epoch": self._loader.epoch,
        }

    def state_dict(self) -> State:
        """Where a resumed run goes on."""
        return {**self._loader.state_dict(), "histories": self._histories.state_dict()}


def require_experts(groups: Sequence[Group]) -> None:
    """Raise UserError for a response that would be trained without the experts that the trainer is to use again."""
    rollouts = [attempt.rollout for group in groups for attempt in group.attempts]
    without = [rollout for rollout in rollouts if rollout.experts is None and len(rollout.token_ids)]
    if without:
        raise UserError(
            f"{len(without)} of {len(rollouts)} responses came without the experts of their tokens, which "
            f"rollout.routing_replay needs; the first is sample {without[0].sample} of prompt {without[0].prompt} of "
            'the batch. Set rollout.routing_replay = "old" or "off"'
        )


@contextmanager
def without_cycle_collector() -> Iterator[None]:
    """Inside the block Python does not look for unreachable cycles. It would go through the whole batch again and again
    while its many small objects are made, none of which is in a cycle."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class FollowerSource:
    """The other ranks'."""

    def __init__(self, control: RoleControl, generate: Generator) -> None:
        self._control, self._generate = control, generate

    def next_batch(self, iteration: int, timer: Timer) -> Batch:
        """This rank's share of an iteration."""
        refill = 0
        while isinstance(message := self._control.receive(), list):
            self._generate(message, iteration, refill, timer)
            refill += 1
        assert isinstance(message, dict), f"rank 0 sent {type(message).__name__}"
        with timer.phase("deal"):
            samples, share = self._control.receive_share()
        return Batch(samples, share, message)

    def state_dict(self) -> State:
        """Rank 0 has it."""
        return {}
