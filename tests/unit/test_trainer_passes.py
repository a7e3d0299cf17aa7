"""Which forward passes an iteration makes: no more than the objective needs, and as many as the log says."""

from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from megatron_srpo.batching.packing import plan_batch, share_of
from megatron_srpo.config import Config
from megatron_srpo.core.records import Padding, RoutedSample
from megatron_srpo.trainer import Trainer

TEACHER_PROMPT = [1] * 9


class CountingPolicy:
    """Forwards nothing, and counts what it is asked to forward: tokens of packed rows, padding excluded."""

    def __init__(self, dp_rank, dp_size):
        self.topology = SimpleNamespace(dp_rank=dp_rank, dp_size=dp_size)
        self.padding = Padding()
        self.forwarded, self.swaps = Counter(), 0

    def teacher(self):
        self.swaps += 1
        return nullcontext()

    reference = teacher

    def score(self, rows, function):
        name = function.__name__
        self.forwarded[name] += sum(row.input_ids.numel() for row in rows if row.loss_mask.any())
        return [function(row) for row in rows]

    def train_step(self, rows, loss):
        self.forwarded["train"] += sum(row.input_ids.numel() for row in rows if row.loss_mask.any())
        return SimpleNamespace(metrics={}, grad_norm=0.0, skipped=False)

    def sum_over_data(self, values):
        return values


class Scores:
    """An objective whose scores are zeros of the right shape."""

    def __init__(self, config):
        self.needs_topk = config.algorithm.name != "grpo"
        self.needs_reference = config.algorithm.kl_loss_coef > 0
        self.needs_initial = config.teacher.mode == "trust_region"

    def score_old(self, row):
        return {"logprob": torch.zeros(row.input_ids.numel())}

    def score_reference(self, row):
        return {"reference_logprob": torch.zeros(row.input_ids.numel())}

    def score_topk(self, row):
        return {"topk_ids": torch.zeros(row.input_ids.numel(), 2, dtype=torch.long)}

    def score_initial(self, row):
        return {"initial_hidden": torch.zeros(row.input_ids.numel(), 4)}

    def score_teacher(self, row):
        n = row.input_ids.numel()
        return {"teacher_logprobs": torch.full((n, 2), -1.0), "teacher_entropy": torch.zeros(n)}

    def teacher_scores(self):
        return self.score_teacher

    def dynamic_weight_sum(self, scores):
        return torch.tensor(1.0)

    def loss(self, **denominators):
        return lambda *row: None


def sample(group, number, *, advantage=1.0, distilled=False):
    weights = (0.0, 1.0) if distilled else (1.0, 0.0)
    return RoutedSample(
        f"train:{group}", group, number, [1] * (3 + group), [2] * (2 + number), [-1.0] * (2 + number),
        advantage, *weights, teacher_ids=TEACHER_PROMPT if distilled else None,
    )  # fmt: skip


def passes(samples, *, ranks=1, **sections):
    """(tokens forwarded by all ranks together, what the log says of rank 0, teacher swaps of a rank)."""
    config = Config(model={"path": "unused"}, data={"train": "unused"}, **sections)
    plan = plan_batch(
        samples, dp_size=ranks, max_tokens=40, prompts_per_mini_batch=config.train.prompts_per_mini_batch,
        drop_zero_advantage=config.drops_zero_advantage,
    )  # fmt: skip
    total, logs = Counter(), []
    for rank in range(ranks):
        policy = CountingPolicy(rank, ranks)
        trainer = Trainer(SimpleNamespace(config=config, policy=policy, objective=Scores(config)))
        mine, share = share_of(samples, plan, rank)
        scores = trainer._score_students(mine, share)
        trainer._score_teacher(mine, share, scores)
        trainer._score_reference(mine, share, scores)
        for mini in share.mini_batches:
            trainer._train(mine, mini, scores)
        total.update(policy.forwarded)
        logs.append({name: value for name, value in trainer._forwarded.items() if name.endswith("_tokens")})
    assert all(log == logs[0] for log in logs)  # every rank knows what all do
    return total, logs[0], policy.swaps


def tokens(samples, prompt=None):
    return sum(len(prompt or s.prompt_ids) + len(s.response_ids) for s in samples)


POLICY = [sample(0, i) for i in range(4)]
DISTILLED = [sample(1, i, distilled=i > 1) for i in range(4)]
WRONG = [sample(2, i, advantage=0.0) for i in range(3)]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_without_distilled_samples_one_step_a_batch_is_exactly_one_forward(ranks):
    found, log, swaps = passes(POLICY, ranks=ranks)
    assert (found, swaps) == ({"train": tokens(POLICY)}, 0)
    assert log == {"forward/train_tokens": tokens(POLICY)}


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_only_distilled_samples_are_scored_by_teacher_and_top_k(ranks):
    found, log, swaps = passes(POLICY + DISTILLED, ranks=ranks)
    assert found == {
        "train": tokens(POLICY + DISTILLED),
        "score_topk": tokens(DISTILLED[2:]),
        "score_teacher": tokens(DISTILLED[2:], TEACHER_PROMPT),
    }
    assert swaps == 1
    assert log == {
        "forward/train_tokens": found["train"],
        "forward/topk_tokens": found["score_topk"],
        "forward/teacher_tokens": found["score_teacher"],
    }


def test_a_trust_region_forwards_the_distilled_samples_once_more_under_the_initial_weights():
    found, log, swaps = passes(POLICY + DISTILLED, ranks=2, teacher={"mode": "trust_region"})
    assert found["score_initial"] == found["score_teacher"] == tokens(DISTILLED[2:], TEACHER_PROMPT)
    assert (log["forward/initial_tokens"], swaps) == (found["score_initial"], 2)


def test_old_log_probs_are_scored_from_the_second_optimiser_step_on():
    found, log, _ = passes(POLICY + DISTILLED, train={"prompts_per_mini_batch": 1}, algorithm={"name": "grpo"})
    assert found["train"] == tokens(POLICY + DISTILLED)
    assert found["score_old"] in (tokens(POLICY), tokens(DISTILLED))
    assert log["forward/old_tokens"] == found["score_old"]


@pytest.mark.parametrize("keep", [{"train": {"skip_zero_advantage": False}}, {"algorithm": {"kl_loss_coef": 0.1}}])
def test_samples_without_a_gradient_are_forwarded_only_where_asked_or_another_term_gives_them_one(keep):
    assert passes(POLICY + WRONG)[0] == {"train": tokens(POLICY)}
    assert passes(POLICY + WRONG, **keep)[0]["train"] == tokens(POLICY + WRONG)


def test_a_step_on_which_nothing_has_a_gradient_forwards_one_sample_to_compare_trainer_and_engine():
    assert passes(WRONG, ranks=2)[0]["train"] == tokens(WRONG[:1])
