"""Which forward passes an iteration makes: no more than the objective needs, and as many as the log says."""

import itertools
import math
import weakref
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from megatron_srpo.batching import plan_batch, share_of
from megatron_srpo.batching.passes import BatchPasses
from megatron_srpo.batching.rows import pack_rows
from megatron_srpo.config import Config
from megatron_srpo.core.records import Batch, Padding, Row
from megatron_srpo.core.tensors import HeadInput, Scores
from megatron_srpo.losses.objective import Objective, _TrustRegion, head_moves
from tests.made_samples import make_sample

TEACHER_PROMPT = [1] * 9
SCORES = {  # of a sample with two trained tokens
    "topk_ids": torch.tensor([[1, 2, 3, 4]] * 2),
    "teacher_logprobs": torch.full((2, 4), -2.0),
    "teacher_entropy": torch.ones(2),
}
WIDTHS = {"topk_ids": (2,), "teacher_logprobs": (2,), "initial_hidden": (4,)}
OWN_PASS = {"teacher_head_mib": 0}  # the student's top-k ids have a pass of their own
RESULTS = {  # of each pass
    "old": ["logprob", "topk_ids"], "check": ["logprob"], "topk": ["topk_ids"], "initial": ["initial_hidden"],
    "teacher": ["teacher_logprobs", "teacher_entropy"], "reference": ["reference_logprob"],
}  # fmt: skip


class CountingPolicy:
    """Forwards nothing, and counts what it is asked to forward: tokens of packed rows, padding excluded."""

    def __init__(self):
        self.padding = Padding()
        self.forwarded, self.swaps = Counter(), 0

    def weights(self, which):
        self.swaps += which != "student"
        return nullcontext()

    def score(self, rows, function, *, at, chosen):
        self.forwarded[function.name] += sum(row.input_ids.numel() for row in rows if row.loss_mask.any())
        assert all(positions.equal(row.loss_mask.nonzero()[:, 0]) for positions, row in zip(at, rows, strict=True))
        return [function(positions) for positions in at]

    def train_step(self, rows, loss):
        self.forwarded["train"] += sum(row.input_ids.numel() for row in rows if row.loss_mask.any())
        return SimpleNamespace(metrics={}, grad_norm=0.0, skipped=False)

    def sum_over_data(self, values):
        return values


class Zeros:
    """A score function whose results are zeros of the right shape."""

    def __init__(self, name):
        self.name = name

    def __call__(self, positions):
        n = len(positions)
        kinds = {"topk_ids": torch.int32}
        return {k: torch.zeros(n, *WIDTHS.get(k, ()), dtype=kinds.get(k)) for k in RESULTS[self.name]}


class ZeroObjective(Objective):
    """The passes of the real objective, with such scores."""

    function = Zeros

    def passes(self):
        return [replace(scoring, score=self.function(scoring.name)) for scoring in super().passes()]

    def check_pass(self):
        scoring = super().check_pass()
        return replace(scoring, score=self.function(scoring.name))

    def distill_weight_sum(self, samples, scores):
        return torch.tensor(1.0)


def sample(group, number, *, advantage=1.0, distilled=False):
    return make_sample(
        f"train:{group}", number, [1] * (3 + group), [2] * (2 + number), [-1.0] * (2 + number), advantage=advantage,
        weights={"distill": 1.0} if distilled else {"policy": 1.0}, teacher_ids=TEACHER_PROMPT if distilled else None,
    )  # fmt: skip


def passes(groups, *, ranks=1, **sections):
    """(tokens forwarded by all ranks together, what the log says of rank 0, teacher swaps of a rank)."""
    config = Config(model={"path": "unused"}, data={"train": "unused"}, **sections)
    if config.algorithm.kl_loss_coef:  # as routing does
        for one in itertools.chain(*groups):
            one.weights = {**one.weights, "kl": 0.1}
    plan = plan_batch(
        groups, dp_size=ranks, max_tokens=40, prompts_per_mini_batch=config.train.prompts_per_mini_batch,
        drop_zero_gradient=config.drops_zero_gradient,
    )  # fmt: skip
    total, logs = Counter(), []
    for rank in range(ranks):
        policy, objective = CountingPolicy(), ZeroObjective(config)
        mine, share = share_of(list(itertools.chain(*groups)), plan, rank)
        work = BatchPasses(Batch(mine, share, {}), policy, objective)
        for scoring in objective.passes():
            work.run(scoring)
        for mini in share.mini_batches:
            work.train_step(mini)
        total.update(policy.forwarded)
        logs.append({name: value for name, value in work.forwarded.items() if name.endswith("_tokens")})
    assert all(log == logs[0] for log in logs)  # every rank knows what all do
    return total, logs[0], policy.swaps


def tokens(samples, prompt=None):
    return sum((len(prompt) + s.length) if prompt else len(s.student) for s in samples)


def policy_group():
    return [sample(0, i) for i in range(4)]


def distilled_group():
    return [sample(1, i, distilled=i > 1) for i in range(4)]


def wrong_group():
    return [sample(2, i, advantage=0.0) for i in range(3)]


POLICY, DISTILLED, WRONG = policy_group(), distilled_group(), wrong_group()
OTHER = [sample(3, i, distilled=i > 1) for i in range(4)]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_without_distilled_samples_one_step_a_batch_is_exactly_one_forward(ranks):
    found, log, swaps = passes([POLICY], ranks=ranks)
    assert (found, swaps) == ({"train": tokens(POLICY)}, 0)
    assert log == {"forward/train_tokens": tokens(POLICY)}


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_only_distilled_samples_are_scored_by_teacher_and_top_k(ranks):
    for train, topk in ({}, {}), (OWN_PASS, {"topk": tokens(DISTILLED[2:])}):
        found, log, swaps = passes([POLICY, DISTILLED], ranks=ranks, train=train)
        assert found == {
            "train": tokens(POLICY + DISTILLED), "teacher": tokens(DISTILLED[2:], TEACHER_PROMPT), **topk
        }  # fmt: skip
        assert swaps == 1
        assert log == {f"forward/{name}_tokens": count for name, count in found.items()}


def test_a_trust_region_forwards_the_distilled_samples_once_more_under_the_initial_weights():
    found, log, swaps = passes([POLICY, DISTILLED], ranks=2, teacher={"mode": "trust_region"})
    assert found["initial"] == found["teacher"] == tokens(DISTILLED[2:], TEACHER_PROMPT)
    assert (log["forward/initial_tokens"], swaps) == (found["initial"], 2)


def test_an_algorithm_without_a_teacher_has_no_pass_for_one():
    config = Config(model={"path": "unused"}, data={"train": "unused"}, algorithm={"name": "rloo"})
    assert [scoring.name for scoring in Objective(config).passes()] == ["old"]


def test_old_log_probs_are_scored_from_the_second_optimizer_step_on():
    other = [sample(1, i) for i in range(4)]
    found, log, _ = passes([POLICY, other], train={"prompts_per_mini_batch": 1}, algorithm={"name": "grpo"})
    assert found["train"] == tokens(POLICY + other)
    assert found["old"] in (tokens(POLICY), tokens(other))
    assert log["forward/old_tokens"] == found["old"]


def test_every_step_scores_its_own_mini_batch_where_asked_and_no_token_twice():
    for every, swaps in (("iteration", 1), ("step", 2)):
        train = {"prompts_per_mini_batch": 1, "score_every": every}
        found, log, swapped = passes([DISTILLED, OTHER], train=train | OWN_PASS)
        every_ids = (tokens(DISTILLED[2:]), tokens(OTHER[2:]), tokens(DISTILLED[2:] + OTHER[2:]))
        assert found["topk"] == log["forward/topk_tokens"]
        assert found["topk"] in (every_ids[:2] if every == "iteration" else every_ids[2:])  # the old pass has the rest
        assert found["teacher"] == tokens(DISTILLED[2:] + OTHER[2:], TEACHER_PROMPT)
        assert swapped == swaps


@pytest.mark.parametrize("every", ["iteration", "step"])
def test_the_train_pass_and_the_pass_for_old_log_probs_find_all_top_k_ids(every):
    found = passes([DISTILLED, OTHER], train={"prompts_per_mini_batch": 1, "score_every": every})[0]
    assert found["topk"] == 0 and found["old"] in (tokens(DISTILLED), tokens(OTHER))  # those of the second step
    assert found["train"] == tokens(DISTILLED + OTHER)


def test_the_pass_for_old_log_probs_finds_the_ids_and_log_probs_of_passes_of_their_own():
    config = Config(model={"path": "m"}, data={"train": "d"}, algorithm={"distillation_topk": 4}, train=OWN_PASS)
    objective = Objective(config)
    old, topk, _ = objective.passes()
    samples = [*policy_group(), *distilled_group()]
    weight = torch.randn(31, 8)
    for rows in ((0, 1, 2, 3), (0, 6, 1), (6, 7)):
        (row,) = pack_rows([Row(rows, 60)], samples, [Scores() for _ in samples], padding=Padding(row=64))
        given = HeadInput(torch.randn(64, 8), weight, 31, 0, None)
        found, alone = old.score(given, row), topk.score(given, row)["topk_ids"]
        at = row.weights.get("distill", torch.zeros(64)) > 0
        assert int(at.sum()) == sum(samples[i].length for i in rows if i > 5)
        assert found["topk_ids"][at].equal(alone[at]) and found["topk_ids"].dtype == torch.int32
        torch.testing.assert_close(found["logprob"], objective.check_pass().score(given, row)["logprob"])


def test_the_ids_of_samples_without_a_teacher_are_not_kept():
    config = Config(model={"path": "unused"}, data={"train": "unused"}, train={"prompts_per_mini_batch": 1})
    plan = plan_batch([DISTILLED, OTHER], dp_size=1, max_tokens=40, prompts_per_mini_batch=1)
    objective, samples = ZeroObjective(config), DISTILLED + OTHER
    mine, share = share_of(samples, plan, 0)
    work = BatchPasses(Batch(mine, share, {}), CountingPolicy(), objective)
    work.run(objective.passes()[0])
    known = [(score.topk_ids is not None, score.logprob is not None) for score in work.scores]
    assert set(known) == {(False, False), (False, True), (True, True)}
    assert all(ids == (old and one.teacher is not None) for one, (ids, old) in zip(mine, known, strict=True))
    rows = [row.samples for mini in share.mini_batches[1:] for row in mini.student[0]]
    assert any({mine[i].teacher is None for i in row} == {True, False} for row in rows)
    for ids in (score.topk_ids for score in work.scores if score.topk_ids is not None):
        assert ids.untyped_storage().nbytes() == ids.nbytes  # no view of those of the row


@pytest.mark.parametrize(
    ("sections", "one_pass"),
    [
        ({}, True),
        ({"train": {"teacher_head_mib": 3}}, True),
        ({"train": {"teacher_head_mib": 2}}, False),  # the head's shard has 3 MiB
        ({"train": {"teacher_head_mib": 5}, "teacher": {"mode": "trust_region"}}, False),  # two heads
        ({"train": {"teacher_head_mib": 6}, "teacher": {"mode": "trust_region"}}, True),
        ({"train": {"teacher_head_mib": 1}, "teacher": {"mode": "live"}}, True),  # no copy
        ({"train": {"teacher_head_mib": 1}, "lora": {"rank": 4}}, True),
        ({"train": {"teacher_head_mib": 0}, "teacher": {"mode": "live"}}, False),
        ({"model": {"path": "unused", "hidden_dropout": 0.1}}, False),  # a pass that drops has other ids
        ({"model": {"path": "unused", "attention_dropout": 0.1}}, False),
        ({"lora": {"rank": 4, "dropout": 0.1}}, False),
    ],
)
def test_memory_and_dropout_decide_whether_the_train_pass_finds_the_top_k_ids(sections, one_pass):
    config = Config(**{"model": {"path": "unused"}, "data": {"train": "unused"}} | sections)
    found = {scoring.name: scoring.stop for scoring in Objective(config, head_bytes=3 * 2**20).passes()}
    assert found.get("topk") == (None if one_pass else 1)


def test_the_copy_of_the_teachers_head_is_freed_after_the_step_and_its_inputs_with_it():
    config = Config(model={"path": "m"}, data={"train": "d"}, algorithm={"distillation_topk": 4})
    objective = Objective(config)
    one = make_sample("a", 0, [1, 2], [4, 5], [-1.0, -1.0], weights={"distill": 1.0}, teacher_ids=TEACHER_PROMPT)
    (row,) = pack_rows([Row((0,), 11)], [one], [Scores()], stream="teacher")
    weight = torch.nn.Parameter(3 * torch.randn(11, 8))
    given = HeadInput(torch.randn(11, 8), weight, 11, 0, None)
    (scoring,) = [scoring for scoring in objective.passes() if scoring.name == "teacher"]
    with torch.no_grad():
        found = scoring.score(given, row)
        weight.zero_()  # the student's weights come back
    assert set(found) == {"teacher_entropy", "teacher_hidden", "teacher_normaliser"}
    scores = Scores(**{name: values[row.loss_mask > 0] for name, values in found.items()})
    (row,) = pack_rows([Row((0,), 4)], [one], [scores])
    loss = objective.loss(loss_tokens=2, responses=1, distill_weight_mean=1.0)
    student = HeadInput(torch.randn(4, 8), weight, 11, 0, None)
    assert float(loss(student, row)[0]) > 0.01  # the teacher is not the student, which is uniform now
    objective.end_step()
    with pytest.raises(AssertionError, match="the teacher's head was kept"):
        loss(student, row)


def test_the_joined_heads_of_a_trust_region_are_freed_after_the_step():
    trust = _TrustRegion(0.5)
    weight = torch.nn.Parameter(torch.randn(11, 8))
    given = HeadInput(torch.randn(4, 8), weight, 11, 0, None)
    row = SimpleNamespace(scores=Scores(initial_hidden=torch.randn(4, 8)))
    trust.score_initial(given, row)
    first = trust.joined(given, row)
    kept, expected = weakref.ref(first.weight), first.hidden @ first.weight.T
    del first
    assert kept() is not None
    trust.free()
    assert kept() is None
    again = trust.joined(given, row)
    assert expected.equal(again.hidden @ again.weight.T)
    trust.score_initial(given, row)  # the next teacher pass, whose student has moved
    moved = HeadInput(given.hidden, 2 * weight.detach(), 11, 0, None)
    assert trust.joined(moved, row).weight.equal(torch.cat([weight.detach(), 2 * weight.detach()], -1))


@pytest.mark.parametrize("keep", [{"train": {"skip_zero_advantage": False}}, {"algorithm": {"kl_loss_coef": 0.1}}])
def test_samples_without_a_gradient_are_forwarded_only_where_asked_or_another_term_gives_them_one(keep):
    assert passes([policy_group(), wrong_group()])[0] == {"train": tokens(POLICY)}
    assert passes([policy_group(), wrong_group()], **keep)[0]["train"] == tokens(POLICY + WRONG)


def test_a_step_on_which_nothing_has_a_gradient_forwards_one_sample_to_compare_trainer_and_engine():
    assert passes([WRONG], ranks=2)[0]["train"] == tokens(WRONG[:1])


def test_the_head_runs_on_positions_that_predict_trained_tokens_and_no_others(monkeypatch):
    config = Config(model={"path": "m"}, data={"train": "d"}, algorithm={"distillation_topk": 4})
    objective, seen = Objective(config), []
    head = objective._head

    def counting(given):
        seen.append(len(given.hidden))
        return head(given)

    monkeypatch.setattr(objective, "_head", counting)
    samples = [
        make_sample("a", 0, [1, 2, 3], [4, 5], [-1.0, -1.0], weights={"distill": 1.0}, teacher_ids=TEACHER_PROMPT),
        make_sample("b", 0, [1, 2], [4, 5, 6], [-1.0, -1.0], teacher_ids=None, trained=[True, False, True]),
    ]
    (row,) = pack_rows([Row((0, 1), 10)], samples, [Scores(**SCORES), Scores()], padding=Padding(row=16))
    given = HeadInput(torch.randn(16, 8, requires_grad=True), torch.randn(11, 8), 11, 0, None)
    every = head(given).gather_logprobs(row.targets[:, None])[0][:, 0]
    found = objective.check_pass().score(given, row)["logprob"]
    at = torch.tensor([2, 3, 6, 8])
    assert row.loss_mask.nonzero()[:, 0].equal(at)
    torch.testing.assert_close(found[at], every[at])
    assert seen == [4] and found.count_nonzero() == 4
    objective.loss(loss_tokens=4, responses=2, distill_weight_mean=1.0)(given, row)[0].backward()
    assert seen == [4, 4] and sorted(given.hidden.grad.abs().sum(1).nonzero()[:, 0].tolist()) == at.tolist()


def test_a_step_that_nothing_counts_in_keeps_no_teachers_head():
    """Every response is empty: its teacher was scored, and the next iteration's teacher is another one."""
    config = Config(model={"path": "unused"}, data={"train": "unused"}, algorithm={"name": "sdpo"})
    empty = make_sample(
        "train:0", 0, [1] * 3, [], [], advantage=1.0, weights={"distill": 1.0}, teacher_ids=TEACHER_PROMPT
    )
    plan = plan_batch([[empty]], dp_size=1, max_tokens=40)
    objective, ended = ZeroObjective(config), []
    objective.end_step = lambda: ended.append(True)
    mine, share = share_of([empty], plan, 0)
    assert BatchPasses(Batch(mine, share, {}), CountingPolicy(), objective).train_step(share.mini_batches[0]) is None
    assert plan.mini_batches[0].teacher[0] and ended


def test_what_no_later_pass_needs_is_freed():
    """Hidden states and logits are larger than all other scores of a token together."""
    config = Config(model={"path": "unused"}, data={"train": "unused"}, teacher={"mode": "trust_region"})
    plan, objective = plan_batch([POLICY, DISTILLED], dp_size=1, max_tokens=40), ZeroObjective(config)
    mine, share = share_of(POLICY + DISTILLED, plan, 0)
    work = BatchPasses(Batch(mine, share, {}), CountingPolicy(), objective)
    taught = [(one, score) for one, score in zip(mine, work.scores, strict=True) if one.teacher is not None]
    for scoring in objective.passes():
        work.run(scoring)
        if scoring.name in ("initial", "teacher"):
            assert all((score.initial_hidden is None) is (scoring.name == "teacher") for _, score in taught)
    for one, score in taught:  # as if the train pass found the ids, and as with a divergence over the full vocabulary
        score.teacher_hidden, score.teacher_logits = torch.zeros(one.length, 8), torch.zeros(one.length, 5)
    work.train_step(share.mini_batches[0])
    assert taught and all(score.teacher_hidden is None and score.teacher_logits is None for _, score in taught)
    assert all(score.teacher_entropy is not None for _, score in taught)


def test_the_teachers_head_is_copied_once_however_many_rows_it_reads():
    config = Config(model={"path": "m"}, data={"train": "d"}, algorithm={"distillation_topk": 4})
    objective, samples = Objective(config), distilled_group()[2:]
    (scoring,) = [scoring for scoring in objective.passes() if scoring.name == "teacher"]
    given, kept = HeadInput(torch.randn(16, 8), torch.randn(11, 8), 11, 0, None), []
    (empty,) = pack_rows([Row((), 0)], samples, [Scores() for _ in samples], stream="teacher")
    scoring.score(HeadInput(given.hidden[: len(empty.targets)], given.weight, 11, 0, None), empty)
    assert objective._teacher_head is None  # a row that only keeps the ranks in step may have another head
    for row in pack_rows([Row((0,), 16), Row((1,), 16)], samples, [Scores() for _ in samples], stream="teacher"):
        size = len(row.targets)
        scoring.score(HeadInput(given.hidden[:size], given.weight, 11, 0, None), row)
        kept.append(objective._teacher_head)
    assert kept[0] is not None and kept[1] is kept[0] and kept[0].weight.data_ptr() != given.weight.data_ptr()


@pytest.mark.parametrize(
    ("sections", "moves"),
    [
        ({}, True),
        ({"teacher": {"mode": "frozen"}}, True),
        ({"teacher": {"mode": "live"}}, False),
        ({"teacher": {"mode": "trust_region"}}, False),  # its joined head is a copy already
        ({"lora": {"rank": 4}}, False),
    ],
)
def test_the_teachers_head_is_copied_only_where_the_students_takes_its_place(sections, moves):
    assert head_moves(Config(model={"path": "unused"}, data={"train": "unused"}, **sections)) is moves


def test_the_sum_of_dynamic_weights_is_not_zero_where_fp32_has_no_exponential():
    config = Config(model={"path": "m"}, data={"train": "d"}, algorithm={"entropy_beta": 10.0})
    one = make_sample("a", 0, [1, 2], [4, 5], [-1.0, -1.0], weights={"distill": 1.0}, teacher_ids=TEACHER_PROMPT)
    found = Objective(config).distill_weight_sum([one], [Scores(teacher_entropy=torch.full((2,), 12.0))])
    assert float(found) == pytest.approx(2 * math.exp(-120.0), abs=0)
