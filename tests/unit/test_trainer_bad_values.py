"""Values that are not finite: named, skipped, counted, and the end of a run that meets nothing else."""

import math
from array import array
from types import SimpleNamespace

import pytest
import torch

from megatron_srpo.algorithms.routing import route
from megatron_srpo.algorithms.section import algorithm
from megatron_srpo.batching import plan_batch, share_of
from megatron_srpo.batching.collapse import CollapseAlarm
from megatron_srpo.batching.diagnosis import SkippedSteps, consecutive_skips, explain_skip
from megatron_srpo.batching.handover import Handover
from megatron_srpo.batching.passes import BatchPasses
from megatron_srpo.batching.teacher_refresh import TeacherRefresh
from megatron_srpo.config import Config
from megatron_srpo.core.errors import UserError
from megatron_srpo.core.records import Batch, BatchPlan, Prompt, Reward, Rollout
from megatron_srpo.core.tensors import Scores
from megatron_srpo.run.timer import PhaseTimer
from megatron_srpo.run.watchdog import Watchdog
from megatron_srpo.trainer import Components, Trainer
from tests.made_samples import make_groups
from tests.unit.test_trainer_passes import CountingPolicy, ZeroObjective, Zeros, sample


class OneNaN(Zeros):
    """The log-prob of the third response token in a row is NaN."""

    def __call__(self, positions):
        found = super().__call__(positions)
        found["logprob"][2] = math.nan
        return found


def config_of(**sections):
    return Config(model={"path": "unused"}, data={"train": "unused"}, **sections)


def explain(function, scores=None):
    samples = [sample(0, 0), sample(0, 1)]  # two response tokens, three response tokens
    samples, plan = share_of(samples, plan_batch([samples], dp_size=1, max_tokens=40), 0)
    warnings, objective = [], ZeroObjective(config_of())
    objective.function = function
    passes = BatchPasses(Batch(samples, plan, {}), CountingPolicy(), objective)
    passes.scores = scores or passes.scores
    control, log = SimpleNamespace(collect=lambda mine: [mine]), SimpleNamespace(warn=warnings.append)
    explain_skip(passes, plan.mini_batches[0], control, log, 1)
    return warnings


def test_a_skipped_step_names_iteration_sample_and_component():
    order = [s.sample for s in (sample(0, 1), sample(0, 0))]  # longest first in the row: the third token is sample 1's
    assert explain(OneNaN) == [
        "iteration 1: the gradient is not finite, the optimizer step was skipped. "
        f"Not finite: log-probs of train:0 sample {order[0]}"
    ]


def test_what_was_scored_before_is_named_too():
    scores = [Scores(reference_logprob=torch.zeros(2)), Scores(reference_logprob=torch.full((3,), math.inf))]
    assert explain(Zeros, scores)[0].endswith("Not finite: reference_logprob (scored) of train:0 sample 1")


def test_without_a_culprit_among_the_scores_the_backward_pass_is_named():
    assert explain(Zeros)[0].endswith("All scores are finite: it arose in the backward pass")


class Run:
    """A trainer whose iterations only have `metrics`, one after the other; `saved` has its checkpoints."""

    def __init__(self, *metrics, **sections):
        self.saved, self.warned, self.metrics, self.ended = [], [], iter(metrics), 0
        config = config_of(checkpoint={"every": 0}, **sections)
        self.trainer = Trainer(
            Components(
                config=config, policy=SimpleNamespace(steps=0, end_iteration=self._end), weights=[], evaluate=None,
                should_stop=lambda: False,
                control=SimpleNamespace(any=bool, share=lambda compute: compute()),
                log=SimpleNamespace(log=lambda *values: None, state_dict=dict, warn=self.warned.append),
                source=SimpleNamespace(next_batch=self._next_batch, state_dict=dict),
                objective=SimpleNamespace(passes=list), engine=SimpleNamespace(publish=lambda *values: None),
                store=SimpleNamespace(poll=lambda: None, save=self._save), timer=PhaseTimer(Watchdog(0).phase),
                meter=lambda *values: {}, skipped=SkippedSteps(config.train.max_skipped_steps),
                refresh=TeacherRefresh(config, {}), handover=Handover(config, {}), collapse=CollapseAlarm(config, {}),
            )
        )  # fmt: skip

    def _next_batch(self, iteration, timer):
        usual = {"rollout/nonfinite_samples": 0, "rollout/responses": 1, "perf/sequences": 2, "perf/total_tokens": 1}
        return Batch([], BatchPlan([], 1, 0), usual | next(self.metrics))

    def _end(self, *, refresh_teacher):
        assert not refresh_teacher
        self.ended += 1

    def _save(self, policy, iteration, state, metrics, *, last):
        self.saved.append((iteration, last, state["skipped_in_a_row"]))


def test_every_iteration_ends_once_for_the_policy_so_that_a_teacher_can_be_updated_then():
    run = Run(*[{}] * 3, run={"iterations": 3})
    assert run.trainer.run() and run.ended == 3


def test_engines_keep_their_weights_over_an_evaluation_but_not_over_a_training():
    run, slept = Run({}, {}, run={"iterations": 2}, rollout={"sleep_while_training": True}, eval={"every": 1}), []
    run.trainer.parts.evaluate = lambda timer: {}
    run.trainer.parts.engine.sleep = lambda *, publish_next: slept.append(publish_next)
    run.trainer.run()
    assert slept == [False, True, False, True, False]  # an evaluation, then two iterations with one each


def test_many_skipped_steps_in_a_row_end_the_run_with_a_checkpoint():
    nothing_finite = {"rollout/nonfinite_samples": 1}  # which counts as a skipped step
    run = Run(*[nothing_finite] * 9, train={"max_skipped_steps": 3}, run={"iterations": 9})
    with pytest.raises(UserError, match="stopped after iteration 3: 3 optimizer steps in a row had nothing finite"):
        run.trainer.run()
    assert run.saved == [(3, True, 3)]


def test_a_run_of_which_no_reward_can_be_had_ends_with_a_checkpoint_and_one_of_which_some_can_goes_on():
    run = Run(*[{"reward/error_fraction": share} for share in (0.0, 0.75, 1.0, 0.0)], run={"iterations": 9})
    with pytest.raises(UserError, match="stopped after iteration 3: not one of its rewards could be had"):
        run.trainer.run()
    assert run.saved == [(3, True, 0)]


def test_a_kind_of_which_no_reward_can_be_had_ends_the_run_though_other_kinds_are_fine():
    def iteration(share, prompts):
        return {
            "reward/error_fraction": share / 2, "kind/a/b/error_fraction": share, "kind/a/b/prompts": prompts,
            "kind/exact/error_fraction": 0.0, "kind/exact/prompts": 4,
        }  # fmt: skip

    run = Run(*[iteration(1.0, 1), iteration(0.9, 1), iteration(1.0, 1), {}, iteration(1.0, 1)], run={"iterations": 9})
    with pytest.raises(UserError, match="after iteration 5: not one reward of kind 'a/b' could be had for 2 prompts"):
        run.trainer.run()  # a single prompt may be a bad row
    assert run.saved == [(5, True, 0)]
    at_once = Run(iteration(1.0, 2), run={"iterations": 9})
    with pytest.raises(UserError, match="after iteration 1"):
        at_once.trainer.run()


def test_a_good_step_starts_the_count_again():
    skip, good = SimpleNamespace(skipped=True), SimpleNamespace(skipped=False)
    assert consecutive_skips(2, [skip, None, skip]) == 4
    assert consecutive_skips(2, [skip, good, skip]) == 1
    assert consecutive_skips(2, [None]) == 2


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_rollout_whose_engine_log_probs_are_not_finite_is_left_out_and_named(bad):
    prompt = Prompt("train:5", (), [1, 2], "", "exact")
    rollouts = [Rollout(0, i, [3, 4], [-1.0, bad if i == 1 else -1.0], "", "stop", 0) for i in range(3)]
    groups = make_groups([prompt], rollouts, [Reward(1.0), Reward(0.0), Reward(0.0)])
    report = route(
        groups, algorithm(), seed=0, iteration=0,
        teacher_prompt=lambda *parts, **known: SimpleNamespace(ids=array("i", [1, 2, 3]), truncated=False),
    )  # fmt: skip
    assert [s.counted for s in groups[0].samples] == [True, False, True]
    assert report.nonfinite == ["train:5 sample 1"] and report.metrics()["rollout/nonfinite_samples"] == 1


@pytest.mark.parametrize("stops", [False, True])
def test_a_collapse_is_told_and_by_choice_ends_the_run_with_a_checkpoint(stops):
    lengths = [100.0] * 10 + [5.0] * 10
    run = Run(
        *({"response_length/mean": length, "srpo/response_length_correct": length} for length in lengths),
        run={"iterations": 20},
        train={"stop_on_collapse": stops},
    )
    if stops:
        with pytest.raises(UserError, match="stopped after iteration 16: its responses collapse"):
            run.trainer.run()
        assert run.saved == [(16, True, 0)]
    else:
        assert run.trainer.run()
    assert run.warned[0].startswith("iteration 16: responses collapse.")
