"""Values that are not finite: named, skipped, counted, and the end of a run that meets nothing else."""

import math
from types import SimpleNamespace

import pytest
import torch

from megatron_srpo.algorithms.routing import route
from megatron_srpo.batching.packing import plan_batch, share_of
from megatron_srpo.config import AlgorithmConfig, Config
from megatron_srpo.core.errors import UserError
from megatron_srpo.core.records import Prompt, Reward, Rollout, TokenScores
from megatron_srpo.trainer import Trainer, consecutive_skips
from tests.unit.test_trainer_passes import CountingPolicy, Scores, sample


class BrokenPolicy(CountingPolicy):
    """No step of it has a finite gradient."""

    def train_step(self, rows, loss):
        return SimpleNamespace(metrics={}, grad_norm=math.nan, skipped=True)


class BrokenScores(Scores):
    """The log-prob of the third response token in a row is NaN."""

    def score_old(self, row):
        values = torch.zeros(row.input_ids.numel())
        values[row.loss_mask.nonzero()[2]] = math.nan
        return {"logprob": values}


def trainer_of(objective, warnings, **sections):
    config = Config(model={"path": "unused"}, data={"train": "unused"}, **sections)
    return Trainer(
        SimpleNamespace(
            config=config,
            policy=BrokenPolicy(0, 1),
            objective=objective(config),
            control=SimpleNamespace(collect=lambda mine: [mine], any=bool),
            observer=SimpleNamespace(warn=warnings.append, log=lambda *values: None),
            should_stop=lambda: False,
            checkpoints=SimpleNamespace(poll=lambda: None),
        )
    )


def explain(objective, scores=None):
    samples = [sample(0, 0), sample(0, 1)]  # two response tokens, three response tokens
    samples, plan = share_of(samples, plan_batch(samples, dp_size=1, max_tokens=40), 0)
    warnings = []
    trainer = trainer_of(objective, warnings)
    trainer._train(samples, plan.mini_batches[0], scores or [TokenScores() for _ in samples])
    return warnings


def test_a_skipped_step_names_iteration_sample_and_component():
    order = [s.sample for s in (sample(0, 1), sample(0, 0))]  # longest first in the row: the third token is sample 1's
    assert explain(BrokenScores) == [
        "iteration 1: the gradient is not finite, the optimiser step was skipped. "
        f"Not finite: log-probs of train:0 sample {order[0]}"
    ]


def test_what_was_scored_before_is_named_too():
    scores = [TokenScores(reference_logprob=torch.zeros(2)), TokenScores(reference_logprob=torch.full((3,), math.inf))]
    assert explain(Scores, scores)[0].endswith("Not finite: reference_logprob (scored) of train:0 sample 1")


def test_without_a_culprit_among_the_scores_the_backward_pass_is_named():
    assert explain(Scores)[0].endswith("All scores are finite: it arose in the backward pass")


def test_many_skipped_steps_in_a_row_end_the_run_with_a_checkpoint():
    saved = []
    trainer = trainer_of(Scores, [], train={"max_skipped_steps": 3}, run={"iterations": 9}, checkpoint={"every": 0})
    skipped = SimpleNamespace(skipped=True)

    def iterate():
        trainer._skipped_in_a_row = consecutive_skips(trainer._skipped_in_a_row, [skipped])
        return {}

    trainer._iterate, trainer._save = iterate, lambda metrics, last: saved.append((trainer.iteration, last))
    with pytest.raises(UserError, match="stopped after iteration 3: 3 optimiser steps in a row had nothing finite"):
        trainer.run()
    assert saved == [(3, True)]


def test_a_run_of_which_no_reward_can_be_had_ends_with_a_checkpoint_and_one_of_which_some_can_goes_on():
    saved, shares = [], iter([0.0, 0.75, 1.0, 0.0])
    trainer = trainer_of(Scores, [], run={"iterations": 9}, checkpoint={"every": 0})
    trainer._iterate = lambda: {"reward/error_fraction": next(shares)}
    trainer._save = lambda metrics, last: saved.append((trainer.iteration, last))
    with pytest.raises(UserError, match="stopped after iteration 3: not one of its rewards could be had"):
        trainer.run()
    assert saved == [(3, True)]


def test_a_good_step_starts_the_count_again():
    skip, good = SimpleNamespace(skipped=True), SimpleNamespace(skipped=False)
    assert consecutive_skips(2, [skip, None, skip]) == 4
    assert consecutive_skips(2, [skip, good, skip]) == 1
    assert consecutive_skips(2, [None]) == 2


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_rollout_whose_engine_log_probs_are_not_finite_is_left_out_and_named(bad):
    prompt = Prompt("train:5", (), [1, 2], "", "exact")
    rollouts = [Rollout(0, i, [3, 4], [-1.0, bad if i == 1 else -1.0], "", "stop", 0) for i in range(3)]
    samples, report = route(
        [prompt], rollouts, [Reward(1.0), Reward(0.0), Reward(0.0)], AlgorithmConfig(), seed=0, iteration=0,
        teacher_prompt=lambda *parts: SimpleNamespace(ids=[1, 2, 3], truncated=False),
    )  # fmt: skip
    assert [s.counted for s in samples] == [True, False, True]
    assert report.nonfinite == ["train:5 sample 1"] and report.metrics()["rollout/nonfinite_samples"] == 1
