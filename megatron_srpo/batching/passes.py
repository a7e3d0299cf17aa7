"""The forward passes of one iteration on this rank: scoring passes, whose results stay with the samples, and steps."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence

import torch

from megatron_srpo.batching.rows import is_scored, pack_rows, predicting_positions, token_positions
from megatron_srpo.core.protocols import Objective, Policy, ScoringPass
from megatron_srpo.core.records import Batch, Experts, MiniBatchPlan, Row, StreamName
from megatron_srpo.core.tensors import Scores, StepStats

# Which streams the rows of a pass hold. All but "student" rows are the plan's teacher rows.
STREAMS: Mapping[str, StreamName] = {
    "student": "student", "distilled": "student", "teacher": "teacher", "contrast": "contrast"
}  # fmt: skip


class BatchPasses:
    """What this rank's rows of one iteration go through. `forwarded` counts rows and tokens of all ranks, for the log;
    `scores` has what is known of each sample (on the last pipeline stage), and `experts` the experts that its student's
    tokens are to use again: the engine's, or what a scoring pass chose; None where the routers choose."""

    def __init__(self, batch: Batch, policy: Policy, objective: Objective) -> None:
        self.samples, self.plan = batch.samples, batch.plan
        self.scores = [Scores() for _ in batch.samples]
        self.experts: list[Experts | None] = [sample.experts for sample in batch.samples]
        self.forwarded: Counter[str] = Counter()
        self._policy, self._objective = policy, objective

    def run(self, scoring: ScoringPass) -> None:
        """One scoring pass over the iteration's rows, or over those of the first step if every step has its own."""
        self._run(scoring, self.plan.mini_batches[scoring.start : 1 if scoring.each_step else scoring.stop])

    def _run(self, scoring: ScoringPass, minis: Sequence[MiniBatchPlan]) -> None:
        """Nothing happens, on any rank, where these mini-batches have no rows for the pass."""
        if not any(rows for mini in minis for rows in self._ranks(scoring.rows, mini)):
            return
        with self._policy.weights(scoring.weights):
            for mini in minis:
                self.score(scoring, mini, self.scores)
        for score in self.scores:
            for name in scoring.frees:
                setattr(score, name, None)

    def score(self, scoring: ScoringPass, mini: MiniBatchPlan, into: list[Scores]) -> None:
        """One scoring pass over one mini-batch. What the function returns per position is kept per sample in `into`."""
        stream, padding = STREAMS[scoring.rows], self._policy.padding
        rows = self._count(scoring.name, scoring.rows, mini)
        experts = self.experts if scoring.replays else ()
        packed = pack_rows(rows, self.samples, into, padding=padding, stream=stream, experts=experts)
        places = [predicting_positions(row, self.samples, padding=padding, stream=stream) for row in rows]
        at = [torch.cat([torch.zeros(0, dtype=torch.long), *(own for _, own in place)]) for place in places]
        chosen: list[torch.Tensor] = []
        results = self._policy.score(packed, scoring.score, at=at, chosen=chosen if scoring.records else None)
        for row, found in zip(rows, chosen, strict=False):
            for index, positions in token_positions(row, self.samples, padding=padding, stream=stream):
                self.experts[index] = found[positions].numpy()
        for place, result in zip(places, results, strict=False):  # no results before the last pipeline stage
            for name, values in result.items():
                parts = values.split([len(positions) for _, positions in place]) if place else ()
                scored = [is_scored(name, self.samples[index]) for index, _ in place]
                for (index, _), own, keep in zip(place, parts, scored, strict=True):
                    if keep:  # a view would keep the memory of those that are not
                        setattr(into[index], name, own if all(scored) else own.clone())

    def train_step(self, mini: MiniBatchPlan) -> StepStats | None:
        """One optimizer step, after its own scoring passes, or None when nothing in the mini-batch counts."""
        if mini.loss_tokens == 0:
            self._objective.end_step()  # a teacher of empty responses was scored all the same
            return None
        if mini is not self.plan.mini_batches[0]:
            for scoring in self._objective.passes():
                if scoring.each_step:
                    self._run(scoring, [mini])
        rows = self._count("train", "student", mini)
        mine = [i for row in rows for i in row.samples]
        local = self._objective.distill_weight_sum([self.samples[i] for i in mine], [self.scores[i] for i in mine])
        weights = self._policy.sum_over_data(local)
        mean = float(weights) / mini.distill_tokens if mini.distill_tokens else 1.0
        loss = self._objective.loss(loss_tokens=mini.loss_tokens, responses=mini.responses, distill_weight_mean=mean)
        packed = pack_rows(rows, self.samples, self.scores, padding=self._policy.padding, experts=self.experts)
        step = self._policy.train_step(packed, loss)
        self._objective.end_step()
        for i in mine:  # larger than all other scores of a token together, and used up
            self.scores[i].teacher_hidden = self.scores[i].teacher_logits = None
        return step

    def _ranks(self, kind: str, mini: MiniBatchPlan) -> list[list[Row]]:
        return mini.student if kind == "student" else mini.teacher

    def _count(self, name: str, kind: str, mini: MiniBatchPlan) -> list[Row]:
        """This rank's rows of a pass; what all ranks forward in it is counted."""
        rows, tokens = mini.forwarded[kind]
        self.forwarded[f"forward/{name}_rows"] += rows
        self.forwarded[f"forward/{name}_tokens"] += tokens
        (mine,) = self._ranks(kind, mini)
        return mine

    def nonfinite(self, mini: MiniBatchPlan) -> list[str]:
        """Which of this rank's values in a skipped step are not finite. The parameters did not move: scoring the rows
        again shows what was seen."""
        found = [Scores() for _ in self.samples]
        self.score(self._objective.check_pass(), mini, found)
        bad = []
        for i in (i for rows in mini.student for row in rows for i in row.samples):
            seen = {"log-probs": found[i].logprob}
            seen |= {f"{f.name} (scored)": getattr(self.scores[i], f.name) for f in dataclasses.fields(Scores)}
            names = [name for name, value in seen.items() if value is not None and not bool(value.isfinite().all())]
            bad += [f"{name} of {self.samples[i].uid} sample {self.samples[i].sample}" for name in names]
        return bad
