"""The loop.

    prompts ─► engine.generate ─► rewards ─► route ─► plan ─► score (student, teacher) ─► step ─► publish
       ▲                                                                                     │
       └────────────── metrics · eval · checkpoint · next iteration ◄────────────────────────┘

Every rank runs it. The driver (global rank 0) alone draws prompts, scores answers, routes and plans; the result goes to
the ranks through `control`: `share` gives all of them the same, `deal` each its own samples. Everything that computes
with the model is done by all ranks together.
What each line waits for: `generate` for the slowest engine; `share` for the driver; `score` and `train_step` for the
slowest data-parallel rank; `publish` for the engines.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from megatron_srpo.algorithms.routing import RewardedGroups, route
from megatron_srpo.batching.packing import pack_rows, plan_batch, response_spans, share_of
from megatron_srpo.config import Config
from megatron_srpo.core.errors import UserError
from megatron_srpo.core.records import BatchPlan, MiniBatchPlan, Prompt, RoutedSample, Row, TokenScores

# Which of a mini-batch's rows a pass forwards; "topk": the teacher's rows with the students' own prompts.
ROWS = {"topk": "topk", "teacher": "teacher", "initial": "teacher"}


@dataclass
class Parts:
    """What the loop is made of; `launch` builds it. Parts marked (driver) are None on the other ranks."""

    config: Config
    control: Any  # mcore.control.Control
    policy: Any  # mcore.policy.Policy
    objective: Any  # objective.Objective
    engine: Any  # rollout.engine.RolloutEngine
    weights: Iterable[tuple[str, torch.Tensor]]  # the policy as it is, in Hugging Face names; every rank iterates
    requests: Callable[[list[Prompt], int, int], list]  # prompts, iteration, refill number -> generate requests
    sampling: Any  # rollout.engine.SamplingSettings
    evaluate: Callable[[], dict[str, float] | None]  # held-out metrics; every rank calls it
    checkpoints: Any  # checkpoints.Checkpoints
    should_stop: Callable[[], bool]  # this rank was asked to stop
    watchdog: Any  # watchdog.Watchdog
    meter: Callable[[float, float, float, float], dict[str, float]]  # plan.Meter
    scorer: Any  # scoring.RewardScorer
    loader: Any  # (driver) data.PromptLoader
    teacher_prompt: Callable | None  # (driver) data.TeacherPromptBuilder
    observer: Any  # (driver) observe.Observer


class Trainer:
    """Runs iterations until the configured number, or until asked to stop."""

    def __init__(self, parts: Parts, *, start_iteration: int = 0, skipped_in_a_row: int = 0) -> None:
        self.parts = parts
        self.config = parts.config
        self.iteration = start_iteration
        self._timing: dict[str, float] = {}
        self._forwarded: Counter[str] = Counter()
        self._skipped_in_a_row = skipped_in_a_row

    def run(self) -> bool:
        """Train; True when all iterations are done, False when stopped early. A checkpoint is written either way,
        unless there is nothing to save: stopped before the first iteration."""
        parts, total = self.parts, self.config.run.iterations
        if self.iteration == 0 and self.config.eval.every:
            self._log(self._evaluate())
            if parts.control.any(parts.should_stop()):
                return False
        while self.iteration < total:
            metrics = self._iterate()
            self.iteration += 1
            every = self.config.eval.every
            if every and (self.iteration % every == 0 or self.iteration == total):
                with self._timed("eval"):
                    metrics.update(self._evaluate() or {})
            self._log(metrics)
            broken = self._broken(metrics)
            stop = parts.control.any(parts.should_stop()) or bool(broken)
            last = stop or self.iteration == total
            parts.checkpoints.poll()
            if last or (self.config.checkpoint.every and self.iteration % self.config.checkpoint.every == 0):
                self._save(metrics, last=last)
            if broken:
                raise UserError(f"stopped after iteration {self.iteration}: {broken}")
            if stop and self.iteration < total:
                return False
        return True

    @contextmanager
    def _engines_turn(self) -> Iterator[None]:
        """Inside the block engines generate. By configuration the trainer's tensors are in host memory meanwhile, and
        engines sleep afterwards, so that one has the device's memory at a time."""
        offload = self.config.train.offload_while_generating
        with self.parts.policy.on_host() if offload else nullcontext():
            yield
            if self.config.rollout.sleep_while_training:
                self.parts.engine.sleep()

    def _evaluate(self) -> dict[str, float] | None:
        with self._engines_turn():
            return self.parts.evaluate()

    def _broken(self, metrics: dict[str, float]) -> str:
        """Why going on would be a waste, or ""; the same on all ranks."""
        if 0 < self.config.train.max_skipped_steps <= self._skipped_in_a_row:
            return (
                f"{self._skipped_in_a_row} optimiser steps in a row had nothing finite (train.max_skipped_steps). "
                "The weights of the last good step are saved; the warnings above name what was not finite"
            )
        if metrics.get("reward/error_fraction") == 1:
            return (
                "not one of its rewards could be had, and a warning above says why. Mend the reward function "
                "(reward.functions, reward.timeout_seconds); the same command goes on from here"
            )
        return ""

    def _iterate(self) -> dict[str, float]:
        self._timing = {}
        self._forwarded = Counter()
        started = time.perf_counter()
        policy = self.parts.policy
        with self._engines_turn():
            samples, plan, metrics = self._collect()
        with self._timed("score"):
            scores = self._score_students(samples, plan)
        with self._timed("teacher"):
            self._score_teacher(samples, plan, scores)
            self._score_reference(samples, plan, scores)
        with self._timed("train"):
            steps = [self._train(samples, mini, scores) for mini in plan.mini_batches]
        self._skipped_in_a_row = consecutive_skips(self._skipped_in_a_row, steps)
        if metrics["rollout/nonfinite_samples"] == metrics["perf/sequences"]:
            self._skipped_in_a_row += 1  # there was no step to take
        with self._timed("publish"):
            self.parts.engine.publish(self.parts.weights, self.iteration + 1)
        steps = [step for step in steps if step is not None]
        for name in sorted({name for step in steps for name in step.metrics}):
            values = [step.metrics[name] for step in steps if name in step.metrics]
            metrics[name] = max(values) if name.endswith("_max") else sum(values) / len(values)
        metrics["actor/grad_norm"] = sum(step.grad_norm for step in steps) / max(1, len(steps))
        metrics["actor/optimizer_steps"] = policy.steps
        metrics["actor/skipped_steps"] = sum(step.skipped for step in steps)
        metrics.update(self._forwarded)
        elapsed = time.perf_counter() - started
        metrics.update({f"timing_s/{name}": seconds for name, seconds in self._timing.items()})
        metrics["timing_s/step"] = elapsed
        metrics["perf/tokens_per_second"] = metrics["perf/total_tokens"] / elapsed
        tokens = {name: count for name, count in self._forwarded.items() if name.endswith("_tokens")}
        trained = tokens.pop("forward/train_tokens", 0)
        seconds = sum(self._timing[name] for name in ("score", "teacher", "train"))
        length = metrics["perf/total_tokens"] / metrics["perf/sequences"]
        metrics.update(self.parts.meter(trained, sum(tokens.values()), length, seconds))
        return metrics

    def _collect(self) -> tuple[list[RoutedSample], BatchPlan, dict[str, float]]:
        """Rewarded groups → routed samples → plan: of each rank its own samples and rows, the metrics of all."""
        parts, config = self.parts, self.config
        groups = self._rewarded_groups()
        routed: list[tuple[list[RoutedSample], BatchPlan]] = []  # stays on the driver

        def route_and_plan() -> dict[str, float]:
            with self._timed("route"):
                samples, report = route(
                    groups.prompts, groups.rollouts, groups.rewards, config.algorithm,
                    seed=config.run.seed, iteration=self.iteration,
                    teacher_prompt=parts.teacher_prompt, feedback_with_solution=config.teacher.feedback_with_solution,
                )  # fmt: skip
                plan = plan_batch(
                    samples, dp_size=parts.policy.topology.dp_size, max_tokens=config.row_budget,
                    prompts_per_mini_batch=config.train.prompts_per_mini_batch,
                    padding=parts.policy.padding, seed=config.run.seed + self.iteration,
                    drop_zero_advantage=config.drops_zero_advantage,
                )  # fmt: skip
            if report.failed:
                parts.observer.warn(
                    f"iteration {self.iteration + 1}: {len(report.failed)} of {len(samples)} rewards failed, and count "
                    f"as reward.failure_score; the first: {report.failed[0]}"
                )
            if report.nonfinite:
                parts.observer.warn(
                    f"iteration {self.iteration + 1}: the rollout engine's log-probs are not finite: "
                    f"{shortened(report.nonfinite)}. Left out of the loss"
                )
            metrics = report.metrics() | groups.metrics() | parts.engine.metrics()
            metrics["perf/packing_efficiency"] = plan.efficiency
            metrics["perf/imbalance"] = plan.imbalance
            metrics["perf/total_tokens"] = sum(sample.student_length for sample in samples)
            metrics["perf/sequences"] = len(samples)
            metrics["rollout/weight_version"] = max(rollout.weight_version for rollout in groups.rollouts)
            metrics["data/epoch"] = parts.loader.epoch
            parts.observer.record(self.iteration + 1, groups.prompts, groups.rollouts, groups.rewards, samples)
            routed.append((samples, plan))
            return metrics

        metrics = parts.control.share(route_and_plan)
        with self._timed("deal"):
            samples, plan = parts.control.deal(lambda rank: share_of(*routed[0], rank))
        return samples, plan, metrics

    def _rewarded_groups(self) -> RewardedGroups:
        """One batch of prompts with its rollouts and rewards (filled on the driver). With rollout.max_refills, groups
        without a contrast make room for those of further batches."""
        parts, limit = self.parts, self.config.rollout.max_refills
        groups = RewardedGroups(self.config.rollout.rollout_batch_size, self.config.algorithm, choose=limit > 0)
        for attempt in range(limit + 1):
            prompts: list[Prompt] = parts.control.share(lambda: parts.loader.next_batch())
            with self._timed("gen"):
                requests = parts.requests(prompts, self.iteration, attempt)
                rollouts = parts.engine.generate(requests, parts.sampling, parts.scorer.start(prompts))
            with self._timed("reward"):
                rewards = parts.scorer.finish(rollouts)

            def add(prompts: list = prompts, rollouts: list | None = rollouts, rewards: list | None = rewards) -> bool:
                groups.add(prompts, rollouts, rewards)
                return groups.full

            if parts.control.share(add):
                break
        return groups

    def _rows(self, name: str, mini: MiniBatchPlan) -> list[Row]:
        """This rank's rows of a pass; what all ranks forward in it is counted for the log."""
        kind = ROWS.get(name, "student")
        rows, tokens = mini.forwarded[kind]
        self._forwarded[f"forward/{name}_rows"] += rows
        self._forwarded[f"forward/{name}_tokens"] += tokens
        (mine,) = mini.student if kind == "student" else mini.teacher
        return mine

    def _pack(self, rows: list[Row], samples: list[RoutedSample], scores: list[TokenScores], *, teacher: bool) -> list:
        return pack_rows(rows, samples, scores, padding=self.parts.policy.padding, teacher=teacher)

    def _score(
        self, rows: list[Row], samples: list[RoutedSample], scores: list[TokenScores], function: Callable,
        *, teacher: bool = False,
    ) -> None:  # fmt: skip
        """One scoring pass; what `function` returns per position is kept per sample in `scores`."""
        results = self.parts.policy.score(self._pack(rows, samples, scores, teacher=teacher), function)
        for row, result in zip(rows, results, strict=False):  # no results before the last pipeline stage
            for index, start, stop in response_spans(row, samples, padding=self.parts.policy.padding, teacher=teacher):
                for name, values in result.items():
                    setattr(scores[index], name, values[start:stop].cpu())

    def _score_students(self, samples: list[RoutedSample], plan: BatchPlan) -> list[TokenScores]:
        """Old log-probs where the policy will have moved (every mini-batch but the first), and the student's top-k
        for distilled samples, which are packed on their own where nothing else is needed."""
        objective = self.parts.objective
        scores = [TokenScores() for _ in samples]
        for number, mini in enumerate(plan.mini_batches):
            if number > 0:
                self._score(self._rows("old", mini), samples, scores, objective.score_old)
            if objective.needs_topk and any(mini.teacher):
                # A teacher row's samples fit as student rows: their own prompts are never longer.
                rows = self._rows("topk", mini)
                self._score(rows, samples, scores, objective.score_topk)
        return scores

    def _score_teacher(self, samples: list[RoutedSample], plan: BatchPlan, scores: list[TokenScores]) -> None:
        if not any(rows for mini in plan.mini_batches for rows in mini.teacher):
            return
        policy, objective = self.parts.policy, self.parts.objective
        if objective.needs_initial:
            with policy.reference():
                for mini in plan.mini_batches:
                    rows = self._rows("initial", mini)
                    self._score(rows, samples, scores, objective.score_initial, teacher=True)
        with policy.teacher():
            score_teacher = objective.teacher_scores()
            for mini in plan.mini_batches:
                rows = self._rows("teacher", mini)
                self._score(rows, samples, scores, score_teacher, teacher=True)
        for score in scores:
            score.initial_hidden = None  # the training rows need it no more

    def _score_reference(self, samples: list[RoutedSample], plan: BatchPlan, scores: list[TokenScores]) -> None:
        if not self.parts.objective.needs_reference:
            return
        with self.parts.policy.reference():
            for mini in plan.mini_batches:
                rows = self._rows("reference", mini)
                self._score(rows, samples, scores, self.parts.objective.score_reference)

    def _train(self, samples: list[RoutedSample], mini: MiniBatchPlan, scores: list[TokenScores]) -> Any:
        """One optimiser step, or None when nothing in the mini-batch counts."""
        if mini.loss_tokens == 0:
            return None
        rows = self._rows("train", mini)
        mine = [scores[i] for row in rows for i in row.samples]
        weights = self.parts.policy.sum_over_data(self.parts.objective.dynamic_weight_sum(mine))
        mean = float(weights) / mini.distill_tokens if mini.distill_tokens else 1.0
        loss = self.parts.objective.loss(loss_tokens=mini.loss_tokens, distill_weight_mean=mean)
        step = self.parts.policy.train_step(self._pack(rows, samples, scores, teacher=False), loss)
        if step.skipped:
            self._explain_skip(samples, mini, scores)
        return step

    def _explain_skip(self, samples: list[RoutedSample], mini: MiniBatchPlan, scores: list[TokenScores]) -> None:
        """Say which samples' scores are not finite. The parameters did not move: scoring again shows what was seen."""
        found = [TokenScores() for _ in samples]
        rows = self._rows("check", mini)
        self._score(rows, samples, found, self.parts.objective.score_old)
        mine = []
        for i in (i for row in rows for i in row.samples):
            seen = {"log-probs": found[i].logprob} | {
                f"{name} (scored)": value for name, value in vars(scores[i]).items()
            }
            bad = [name for name, value in seen.items() if value is not None and not bool(value.isfinite().all())]
            mine += [f"{name} of {samples[i].uid} sample {samples[i].sample}" for name in bad]
        everyone = sorted({text for part in self.parts.control.collect(mine) for text in part})
        if self.parts.observer is not None:
            self.parts.observer.warn(
                f"iteration {self.iteration + 1}: the gradient is not finite, the optimiser step was skipped. "
                + (
                    f"Not finite: {shortened(everyone)}"
                    if everyone
                    else "All scores are finite: it arose in the backward pass"
                )
            )

    def _save(self, metrics: dict[str, float], *, last: bool) -> None:
        parts = self.parts
        with self._timed("checkpoint"):
            state = parts.control.share(
                lambda: {"loader": parts.loader.state_dict(), "observer": parts.observer.state_dict()}
            )
            state["skipped_in_a_row"] = self._skipped_in_a_row
            parts.checkpoints.save(parts.policy, self.iteration, state, metrics, last=last)

    def _log(self, metrics: dict[str, float] | None) -> None:
        if self.parts.observer is not None and metrics:
            self.parts.observer.log(self.iteration, metrics)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            with self.parts.watchdog.phase(f"iteration {self.iteration + 1}, {name}"):
                yield
        finally:
            self._timing[name] = self._timing.get(name, 0.0) + time.perf_counter() - started


def consecutive_skips(before: int, steps: list[Any]) -> int:
    """How many of the newest optimiser steps were skipped one after the other; None stands for no step."""
    for step in steps:
        if step is not None:
            before = before + 1 if step.skipped else 0
    return before


def shortened(names: list[str], shown: int = 5) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
