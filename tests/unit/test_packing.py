"""Packing: no budget is exceeded, nothing is lost, and a row says what its samples say."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from array import array
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_srpo.batching import prefixes as prefixes_module
from megatron_srpo.batching.passes import BatchPasses
from megatron_srpo.batching.plan import cost, plan_batch, share_of
from megatron_srpo.batching.rows import NO_PADDING, pack_rows, padded_length, predicting_positions, row_lengths
from megatron_srpo.core.errors import UserError
from megatron_srpo.core.records import Batch, Padding, Row, Sample, Stream
from megatron_srpo.core.tensors import PackedBatch, Scores, chain_of
from tests.made_samples import make_sample


def make(group=0, sample=0, prompt=3, response=2, *, policy=1.0, distill=0.0, advantage=0.5, teacher=5) -> Sample:
    """A sample whose token ids tell where they come from."""
    base = 1000 * (group + 1) + 100 * sample
    return make_sample(
        f"train:{group}", sample, [base + i for i in range(prompt)], [base + 50 + i for i in range(response)],
        [-(i + 1) / 8 for i in range(response)], advantage=advantage,
        weights={name: weight for name, weight in (("policy", policy), ("distill", distill)) if weight},
        teacher_ids=[base + 30 + i for i in range(teacher)] if distill > 0 else None,
    )  # fmt: skip


def plan_of(samples, **arguments):
    """The plan of samples that are sorted by group."""
    groups = [list(group) for _, group in itertools.groupby(samples, key=lambda sample: sample.uid)]
    return plan_batch(groups, **arguments)


def pack_student(row, samples, scores=None, *, padding=NO_PADDING):
    return pack_rows([row], samples, scores, padding=padding)[0]


def pack_teacher(row, samples, scores=None, *, padding=NO_PADDING):
    return pack_rows([row], samples, scores, padding=padding, stream="teacher")[0]


@st.composite
def iterations(draw):
    """(samples, arguments of plan_batch): mixed routing, a budget that every sample fits, any number of ranks."""
    samples = []
    for group in range(draw(st.integers(1, 6))):
        for sample in range(draw(st.integers(1, 5))):
            policy, distill = draw(st.sampled_from([(1.0, 0.0), (0.0, 1.0), (0.9, 0.1), (0.0, 0.0)]))
            lengths = {name: draw(st.integers(1, 20)) for name in ("prompt", "teacher")}
            samples.append(
                make(group, sample, response=draw(st.integers(0, 20)), policy=policy, distill=distill,
                     advantage=draw(st.sampled_from([0.0, 0.5])), **lengths)
            )  # fmt: skip
    longest = max(max(s.student_length, s.teacher_length) for s in samples)
    padding = draw(st.sampled_from([Padding(), Padding(1, 2), Padding(1, 8), Padding(4, 4), Padding(4, 12)]))
    budget = padded_length(longest, padding.row) + draw(st.integers(0, 50))
    plan = {
        "dp_size": draw(st.integers(1, 4)), "max_tokens": budget, "padding": padding,
        "prompts_per_mini_batch": draw(st.integers(0, 3)), "seed": draw(st.integers(0, 3)),
    }  # fmt: skip
    return samples, plan


@st.composite
def families(draw):
    """Samples that share prompts, as a group's do: one student's prompt a group, or a history that grows, and teachers'
    prompts that begin alike or not."""
    samples = []
    for group in range(draw(st.integers(1, 5))):
        prompt, *taught = (
            array("i", [1000 * (group + 1) + 100 * kind + i for i in range(draw(st.integers(1, 30)))])
            for kind in range(3)
        )
        history = [prompt]
        for turn in range(draw(st.integers(0, 2))):
            kept = draw(st.integers(1, len(history[-1])))
            history.append(history[-1][:kept] + array("i", [90_000 + 100 * turn + i for i in range(5)]))
        if draw(st.booleans()):
            taught.append(taught[0][: draw(st.integers(1, len(taught[0])))] + array("i", [80_000, 80_001]))
        for number in range(draw(st.integers(1, 6))):
            answer = array("i", [500 + 10 * number + i for i in range(draw(st.integers(1, 9)))])
            trained = np.ones(len(answer), dtype=bool)
            teacher = draw(st.sampled_from([None, *taught]))
            samples.append(
                Sample(
                    f"train:{group}", number, Stream(draw(st.sampled_from(history)), answer, trained),
                    np.zeros(len(answer), np.float32), 0.5,
                    {"policy": 1.0} if teacher is None else {"distill": 1.0},
                    teacher=None if teacher is None else Stream(max(teacher, *history, key=len), answer, trained),
                )
            )  # fmt: skip
    longest = max(max(s.student_length, s.teacher_length) for s in samples)
    padding = draw(st.sampled_from([Padding(shares=True), Padding(1, 4, shares=True), Padding(1, 4, 2, shares=True)]))
    budget = padded_length(longest, padding.row) + draw(st.integers(0, 100))
    return samples, {"dp_size": draw(st.integers(1, 3)), "max_tokens": budget, "padding": padding}


@settings(max_examples=150, deadline=None)
@given(families())
def test_samples_that_share_a_prompt_read_it_once_and_lose_nothing(case):
    samples, arguments = case
    with patch.object(prefixes_module, "SHORTEST_SHARED", 1):
        plan = plan_of(samples, **arguments)
        (mini,) = plan.mini_batches
        for kind, streams in (("student", ["student"]), ("teacher", ["teacher", "student"])):
            for stream in streams:
                for row in itertools.chain(*getattr(mini, kind)):
                    (packed,) = pack_rows([row], samples, padding=arguments["padding"], stream=stream)
                    assert packed.input_ids.numel() <= arguments["max_tokens"]
                    check_shared_row(packed, row, samples, stream, arguments["padding"])
        taught = [i for i, sample in enumerate(samples) if sample.teacher is not None]
        for kind, wanted in (("student", list(range(len(samples)))), ("teacher", taught)):
            assert sorted(i for row in rows_of(plan, kind) for i in row.samples) == wanted
            full = [row for row in rows_of(plan, kind) if row.samples]
            assert mini.forwarded[kind] == (len(full), sum(row.tokens for row in full))


@settings(max_examples=100, deadline=None)
@given(families(), st.integers(1, 60))
def test_rows_fit_where_sharing_does_not_always_pay(case, attention_length):
    """Two parts of a group that meet in a row may share less than each of them alone."""
    samples, arguments = case
    padding = dataclasses.replace(arguments["padding"], attention_length=attention_length)
    with patch.object(prefixes_module, "SHORTEST_SHARED", 1):
        (mini,) = plan_of(samples, **{**arguments, "padding": padding}).mini_batches
        for row in itertools.chain(*mini.student):
            (packed,) = pack_rows([row], samples, padding=padding)
            assert packed.input_ids.numel() <= arguments["max_tokens"]


def check_shared_row(packed, row, samples, stream, padding):
    """Every sample's sequence, put together from its prefixes and its own tokens, is its stream; no two sequences of a
    group begin alike behind the same prefix, but for the last tokens of prompts; and the trained tokens are predicted
    from the tokens before them."""
    bounds = packed.cu_seqlens.tolist()
    parts = [packed.input_ids[start:end].tolist() for start, end in itertools.pairwise(bounds)]
    places = [packed.position_ids[start:end].tolist() for start, end in itertools.pairwise(bounds)]
    prefixes = packed.prefixes or (-1,) * len(parts)
    shared = set(prefixes) - {-1}
    assert all(prefix < number for number, prefix in enumerate(prefixes))
    left = [i for i in range(len(parts)) if i not in shared]
    begins = set()
    for index, number in zip(row.samples, left, strict=False):
        before = [token for i in chain_of(number, prefixes)[:-1] for token in parts[i]]
        whole = samples[index].stream(stream)
        assert before + parts[number] == whole.token_ids.tolist()
        assert places[number] == list(range(len(before), len(whole)))
        if len(before) < len(whole.prompt_ids) - 1:
            begin = samples[index].uid, prefixes[number], parts[number][0]
            assert begin not in begins
            begins.add(begin)
    assert all(prefixes.count(prefix) > 1 for prefix in shared)
    for index, at in predicting_positions(row, samples, padding=padding, stream=stream):
        whole = samples[index].stream(stream)
        assert packed.input_ids[at].tolist() == whole.token_ids[whole.targets - 1].tolist()
        assert packed.targets[at].tolist() == whole.trained_ids.tolist()


def test_a_prompts_samples_are_split_up_where_that_balances_the_ranks():
    prompt = array("i", range(100))
    answers = [Stream(prompt, array("i", [7] * 400), np.ones(400, dtype=bool)) for _ in range(8)]
    samples = [Sample("train:0", i, s, np.zeros(400, np.float32), 0.5, {"policy": 1.0}) for i, s in enumerate(answers)]
    plan = plan_batch([samples], dp_size=4, max_tokens=10_000, padding=Padding(shares=True))
    (mini,) = plan.mini_batches
    assert [row.tokens for rank in mini.student for row in rank] == [99 + 2 * 401] * 4 and plan.imbalance == 0
    alone = plan_batch([samples], dp_size=1, max_tokens=10_000, padding=Padding(shares=True))
    assert [row.tokens for row in alone.mini_batches[0].student[0]] == [99 + 8 * 401]


@pytest.mark.parametrize(("responses", "rows"), [(8, [8]), (64, [32, 32])])
def test_the_budget_also_limits_the_keys_that_attention_copies(responses, rows):
    """Short answers to one long prompt: 64 of them would fit, and would keep its keys and values 64 times."""
    prompt, budget = array("i", range(2048)), 10_000
    answers = [Stream(prompt, array("i", [7] * 20), np.ones(20, dtype=bool)) for _ in range(responses)]
    samples = [Sample("train:0", i, s, np.zeros(20, np.float32), 0.5, {"policy": 1.0}) for i, s in enumerate(answers)]
    plan = plan_batch([samples], dp_size=1, max_tokens=budget, padding=Padding(shares=True))
    (mini,) = plan.mini_batches
    assert [len(row.samples) for row in mini.student[0]] == rows
    for packed in pack_rows(mini.student[0], samples, padding=Padding(shares=True)):
        lengths = packed.cu_seqlens.diff().tolist()
        keys = sum(lengths[i] for own in range(len(lengths)) for i in chain_of(own, packed.prefixes))
        assert keys <= 8 * budget


def row_length(row, samples, padding, *, teacher=False):
    """Positions of the packed row."""
    each = [samples[i].teacher_length if teacher else samples[i].student_length for i in row.samples]
    return padded_length(sum(padded_length(n, padding.sequence) for n in each), padding.row)


def test_an_interleaved_pipeline_gets_rows_of_one_length_in_multiples():
    samples = [make(0, i, response=3 + 5 * i, distill=float(i < 2)) for i in range(5)]
    padding = Padding(1, 4, rows=2)
    plan = plan_of(samples, dp_size=1, max_tokens=28, padding=padding)
    mini = plan.mini_batches[0]
    assert len(mini.student[0]) == 4 and len(mini.teacher[0]) == 2
    packed = pack_rows(mini.student[0], samples, padding=padding)
    assert (
        [row.input_ids.numel() for row in packed] == row_lengths(mini.student[0], samples, padding=padding) == [28] * 4
    )
    assert sum(float(row.loss_mask.sum()) for row in packed) == mini.loss_tokens
    useful = sum(s.student_length for s in samples) + sum(s.teacher_length for s in samples)
    teacher = row_lengths(mini.teacher[0], samples, padding=padding, stream="teacher")
    assert plan.efficiency == pytest.approx(useful / (4 * 28 + sum(teacher)))


def rows_of(plan, kind: str) -> list[Row]:
    return [row for mini in plan.mini_batches for rank in getattr(mini, kind) for row in rank]


# ---- the plan --------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(iterations())
def test_no_row_exceeds_the_budget_in_any_pass(case):
    samples, arguments = case
    plan = plan_of(samples, **arguments)
    for row in rows_of(plan, "student"):
        assert row.tokens == sum(samples[i].student_length for i in row.samples)
        assert row_length(row, samples, arguments["padding"]) <= arguments["max_tokens"]
    for row in rows_of(plan, "teacher"):
        assert row.tokens == sum(samples[i].teacher_length for i in row.samples)
        for scored in (pack_teacher, pack_student):  # the top-k pass packs the teacher's rows as student rows
            packed = scored(row, samples, padding=arguments["padding"])
            assert packed.input_ids.numel() <= arguments["max_tokens"]


@settings(max_examples=150, deadline=None)
@given(iterations())
def test_every_counted_sample_is_placed_once_and_its_teacher_row_is_on_the_same_rank(case):
    samples, arguments = case
    plan = plan_of(samples, **arguments)
    placed = sorted(i for row in rows_of(plan, "student") for i in row.samples)
    assert placed == [i for i, s in enumerate(samples) if s.counted]
    distilled = sorted(i for row in rows_of(plan, "teacher") for i in row.samples)
    assert distilled == [i for i, s in enumerate(samples) if s.teacher is not None]
    for mini in plan.mini_batches:
        assert len(mini.student) == len(mini.teacher) == arguments["dp_size"]
        assert len({len(rank) for rank in mini.student}) == len({len(rank) for rank in mini.teacher}) == 1
        for student, teacher in zip(mini.student, mini.teacher, strict=True):
            home = {i for row in student for i in row.samples}
            assert {i for row in teacher for i in row.samples} <= home


@settings(max_examples=100, deadline=None)
@given(iterations())
def test_the_ranks_shares_are_the_iteration_and_pack_the_same_rows(case):
    samples, arguments = case
    plan = plan_of(samples, **arguments)
    shares = [share_of(samples, plan, rank) for rank in range(arguments["dp_size"])]
    assert sorted(id(s) for mine, _ in shares for s in mine) == sorted(
        id(samples[i]) for row in rows_of(plan, "student") for i in row.samples
    )
    for rank, (mine, share) in enumerate(shares):
        for whole, mini in zip(plan.mini_batches, share.mini_batches, strict=True):
            assert (mini.loss_tokens, mini.distill_tokens) == (whole.loss_tokens, whole.distill_tokens)
            passes = ("student", whole.student, mini.student), ("teacher", whole.teacher, mini.teacher)
            for stream, rows, [found] in passes:
                settings = {"padding": arguments["padding"], "stream": stream}
                expected = pack_rows(rows[rank], samples, **settings)
                packed = pack_rows(found, mine, **settings)
                assert [r.input_ids.tolist() for r in packed] == [r.input_ids.tolist() for r in expected]


@settings(max_examples=100, deadline=None)
@given(iterations())
def test_groups_stay_whole_and_mini_batches_have_the_asked_number_of_them(case):
    samples, arguments = case
    plan = plan_of(samples, **arguments)
    seen = [
        {samples[i].uid for rank in mini.student for row in rank for i in row.samples} for mini in plan.mini_batches
    ]
    assert sum(len(groups) for groups in seen) == len(set().union(*seen))
    groups = len({s.uid for s in samples})
    size = arguments["prompts_per_mini_batch"] or groups
    assert len(plan.mini_batches) == math.ceil(groups / size)
    assert all(len(some) <= size for some in seen)


@settings(max_examples=100, deadline=None)
@given(iterations())
def test_the_loss_masks_of_all_rows_add_up_to_the_denominators(case):
    samples, arguments = case
    for mini in plan_of(samples, **arguments).mini_batches:
        packed = [pack_student(row, samples, padding=Padding(1, 8)) for rank in mini.student for row in rank]
        assert sum(row.loss_mask.sum().item() for row in packed) == mini.loss_tokens
        distilled = sum(int((row.weights["distill"] > 0).sum()) for row in packed if "distill" in row.weights)
        assert distilled == mini.distill_tokens


@settings(max_examples=100, deadline=None)
@given(iterations())
def test_efficiency_and_imbalance_are_what_they_say(case):
    samples, arguments = case
    plan = plan_of(samples, **arguments)
    rows = rows_of(plan, "student") + rows_of(plan, "teacher")
    computed = sum(row_length(row, samples, arguments["padding"]) for row in rows_of(plan, "student"))
    computed += sum(row_length(row, samples, arguments["padding"], teacher=True) for row in rows_of(plan, "teacher"))
    assert plan.efficiency == pytest.approx(sum(row.tokens for row in rows) / computed if computed else 1)
    costs = [
        [sum(cost([i], samples, Padding()) for row in rank for i in row.samples) for rank in mini.student]
        for mini in plan.mini_batches
    ]
    mean = sum(sum(ranks) / len(ranks) for ranks in costs)
    assert plan.imbalance == pytest.approx(sum(max(ranks) for ranks in costs) / mean - 1 if mean else 0, abs=1e-9)


def test_realistic_lengths_are_balanced_and_packed_tightly():
    generator = random.Random(0)
    samples = [
        make(g, s, 200, min(8000, int(generator.lognormvariate(6.5, 0.8))), distill=float(s < 3), teacher=900)
        for g in range(32)
        for s in range(8)
    ]
    plan = plan_of(samples, dp_size=8, max_tokens=16384, padding=Padding(1, 8))
    assert plan.imbalance < 0.02
    assert plan.efficiency > 0.99
    rows = rows_of(plan, "student")
    needed = sum(s.student_length for s in samples) / 16384
    assert len(rows) <= 8 * math.ceil(needed / 8 + 1)


def test_ten_thousand_samples_need_few_steps():
    """Not a timing: the number of length look-ups grows like n log n, so planning stays far below a second."""
    looked = 0

    class Counting(Sample):
        @property
        def student_length(self) -> int:
            nonlocal looked
            looked += 1
            return 40 + self.sample

    samples = [Counting(**vars(make(i // 8, i % 8))) for i in range(10_000)]
    plan_of(samples, dp_size=8, max_tokens=1000)
    assert looked < 20 * len(samples)


def test_samples_without_any_gradient_can_be_dropped_but_stay_in_the_denominator():
    samples = [make(0, 0, advantage=0.0), make(0, 1, advantage=1.0), make(0, 2, advantage=0.0, policy=0.0, distill=1.0)]
    kept = plan_of(samples, dp_size=1, max_tokens=100, drop_zero_gradient=False)
    dropped = plan_of(samples, dp_size=1, max_tokens=100, drop_zero_gradient=True)
    assert sorted(i for row in rows_of(kept, "student") for i in row.samples) == [0, 1, 2]
    assert sorted(i for row in rows_of(dropped, "student") for i in row.samples) == [1, 2]
    assert kept.mini_batches[0].loss_tokens == dropped.mini_batches[0].loss_tokens == 6


def test_a_step_whose_samples_could_all_be_dropped_keeps_the_shortest_and_a_row_on_every_rank():
    samples = [make(advantage=0.0, response=4), make(advantage=0.0)]
    plan = plan_of(samples, dp_size=2, max_tokens=100, drop_zero_gradient=True)
    assert plan.mini_batches[0].student == [[Row((1,), samples[1].student_length)], [Row((), 0)]]


def test_a_mini_batch_in_which_nothing_counts_has_no_rows():
    plan = plan_of([make(policy=0.0), make(1, policy=0.0)], dp_size=2, max_tokens=100)
    assert plan.mini_batches[0].student == plan.mini_batches[0].teacher == [[], []]
    assert (plan.mini_batches[0].loss_tokens, plan.efficiency, plan.imbalance) == (0, 1.0, 0.0)


def test_mini_batches_are_drawn_from_the_seed():
    samples = [make(group) for group in range(8)]

    def groups(seed, size=2):
        plan = plan_of(samples, dp_size=1, max_tokens=100, prompts_per_mini_batch=size, seed=seed)
        return [sorted(i for row in mini.student[0] for i in row.samples) for mini in plan.mini_batches]

    assert groups(0) == groups(0) != groups(1)
    assert groups(0, size=0) == groups(1, size=0) == [list(range(8))]


@pytest.mark.parametrize(
    ("sample", "budget", "multiple", "words"),
    [
        (make(prompt=8, response=9), 16, 1, ["train:0", "17 tokens", "is 16", "at least 17"]),
        (make(distill=1.0, teacher=15), 16, 1, ["5 tokens", "17 tokens with the teacher's prompt", "at least 17"]),
        (make(prompt=8, response=9), 18, 8, ["17 tokens", "16 usable", "at least 19"]),
    ],
)
def test_a_sample_over_the_budget_is_refused_with_the_key_to_raise(sample, budget, multiple, words):
    with pytest.raises(UserError, match=r"1 of 2 samples.*train\.max_tokens_per_gpu") as refusal:
        plan_of([make(1), sample], dp_size=1, max_tokens=budget, padding=Padding(1, multiple))
    for word in words:
        assert word in str(refusal.value)


def test_a_sample_that_does_not_count_may_have_any_length():
    plan = plan_of([make(response=500, policy=0.0), make(1)], dp_size=1, max_tokens=16)
    assert [row.samples for row in rows_of(plan, "student")] == [(1,)]


# ---- the rows --------------------------------------------------------------------------------------------------------


def test_a_row_is_aligned_to_the_next_token():
    samples = [make(0, 0, prompt=3, response=2, advantage=0.25), make(1, 0, prompt=2, response=3, advantage=-1.0)]
    row = pack_student(Row((0, 1), 10), samples, padding=Padding(1, 4))
    assert row.input_ids.tolist() == [1000, 1001, 1002, 1050, 1051, 2000, 2001, 2050, 2051, 2052, 0, 0]
    assert row.targets.tolist() == [0, 0, 1050, 1051, 0, 0, 2050, 2051, 2052, 0, 0, 0]
    assert row.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]
    assert row.cu_seqlens.tolist() == [0, 5, 10, 12] and row.cu_seqlens.dtype == torch.int32
    assert row.loss_mask.tolist() == [0, 0, 1, 1, 0, 0, 1, 1, 1, 0, 0, 0]
    assert row.advantages.tolist() == [0, 0, 0.25, 0.25, 0, 0, -1, -1, -1, 0, 0, 0]
    assert row.rollout_logprobs.tolist() == [0, 0, -0.125, -0.25, 0, 0, -0.125, -0.25, -0.375, 0, 0, 0]
    found = predicting_positions(Row((0, 1), 10), samples)
    assert [(index, at.tolist()) for index, at in found] == [(0, [2, 3]), (1, [6, 7, 8])]
    assert {row.input_ids.dtype, row.targets.dtype, row.position_ids.dtype} == {torch.int64}
    assert {row.loss_mask.dtype, row.advantages.dtype, row.weights["policy"].dtype} == {torch.float32}
    assert row.scores == Scores()


def test_untrained_tokens_in_a_response_are_context_and_nothing_else():
    tool = make_sample("train:0", 0, [7, 8], [11, 12, 13, 14], [-0.5, -0.25], trained=[True, False, False, True])
    tool.advantage = np.array([1.0, 2.0], dtype=np.float32)
    tool.weights = {"policy": np.array([0.5, 0.0], dtype=np.float32)}
    row = pack_student(Row((0,), 6), [tool], [Scores(logprob=torch.tensor([-3.0, -4.0]))])
    assert row.input_ids.tolist() == [7, 8, 11, 12, 13, 14]
    assert row.targets.tolist() == [0, 11, 0, 0, 14, 0]
    assert row.loss_mask.tolist() == [0, 1, 0, 0, 1, 0] and row.first_token.tolist() == [0, 1, 0, 0, 0, 0]
    assert row.advantages.tolist() == [0, 1, 0, 0, 2, 0] and row.weights["policy"].tolist() == [0, 0.5, 0, 0, 0, 0]
    assert row.rollout_logprobs.tolist() == [0, -0.5, 0, 0, -0.25, 0]
    assert row.scores.logprob.tolist() == [0, -3, 0, 0, -4, 0]
    assert plan_of([tool], dp_size=1, max_tokens=6).mini_batches[0].loss_tokens == 2


def test_a_full_row_has_no_padding_sequence():
    row = pack_student(Row((0,), 5), [make()], padding=Padding(1, 5))
    assert row.cu_seqlens.tolist() == [0, 5]


@pytest.mark.parametrize("multiple", [1, 8])
def test_an_empty_row_is_one_sequence_that_contributes_nothing(multiple):
    for row in (pack_student(Row((), 0), [], [], padding=Padding(1, multiple)), pack_teacher(Row((), 0), [])):
        assert row.cu_seqlens.tolist() == [0, row.input_ids.numel()]
        assert row.loss_mask.sum() == 0 and row.input_ids.sum() == 0
    assert pack_student(Row((), 0), [], padding=Padding(1, multiple)).input_ids.numel() == multiple
    scored = pack_student(Row((), 0), [], [], padding=Padding(1, multiple))
    assert scored.scores.reference_logprob.tolist() == [0.0] * multiple  # the loss asks every row, if it has a KL term


def test_the_teachers_row_has_the_same_responses_after_other_prompts():
    samples = [make(0, 0, distill=1.0, policy=0.0, teacher=4), make(0, 1, distill=1.0, policy=0.0, response=3)]
    scores = [Scores(topk_ids=torch.tensor([[1, 2], [3, 4]])), Scores(topk_ids=torch.full((3, 2), 9))]
    student = pack_student(Row((0, 1), 0), samples, scores)
    teacher = pack_teacher(Row((0, 1), 0), samples, scores)
    assert teacher.input_ids[:6].tolist() == [1030, 1031, 1032, 1033, 1050, 1051]
    row = Row((0, 1), 0)
    places = zip(predicting_positions(row, samples), predicting_positions(row, samples, stream="teacher"), strict=True)
    for (_, mine), (_, theirs) in places:
        for name in ("targets", "rollout_logprobs"):
            assert torch.equal(getattr(student, name)[mine], getattr(teacher, name)[theirs])
        assert torch.equal(student.scores.topk_ids[mine], teacher.scores.topk_ids[theirs])
        assert torch.equal(student.weights["distill"][mine], teacher.weights["distill"][theirs])
    assert teacher.scores.topk_ids.shape == (len(teacher.input_ids), 2) and teacher.scores.topk_ids[0].tolist() == [
        0,
        0,
    ]


def test_a_sample_without_a_teacher_prompt_cannot_be_in_a_teachers_row():
    with pytest.raises(AssertionError, match="no teacher prompt"):
        pack_teacher(Row((0,), 5), [make()])


def scores_of(sample: Sample, seed: int) -> Scores:
    generator = torch.Generator().manual_seed(seed)
    n = sample.length
    scores = Scores(logprob=torch.randn(n, generator=generator), reference_logprob=torch.randn(n))
    if sample.teacher is not None:
        scores.topk_ids = torch.randint(1, 50, (n, 4), generator=generator)
        scores.teacher_logprobs = torch.randn(n, 4, generator=generator) - 5
        scores.teacher_entropy = torch.rand(n, generator=generator)
    return scores


@settings(max_examples=100, deadline=None)
@given(iterations())
def test_unpacking_gives_back_every_response_token_and_score_once(case):
    samples, arguments = case
    scores = [scores_of(sample, seed) for seed, sample in enumerate(samples)]
    seen = []
    for row in rows_of(plan_of(samples, **arguments), "student"):
        packed = pack_student(row, samples, scores, padding=arguments["padding"])
        outside = torch.ones_like(packed.loss_mask, dtype=torch.bool)
        for index, at in predicting_positions(row, samples, padding=arguments["padding"]):
            seen.append(index)
            outside[at] = False
            check_sample(packed, samples[index], scores[index], at)
        tensors = [packed.targets, packed.loss_mask, packed.advantages, packed.rollout_logprobs]
        for values in (*tensors, *packed.weights.values()):
            assert not values[outside].any()
    assert sorted(seen) == [i for i, s in enumerate(samples) if s.counted]


def check_sample(packed: PackedBatch, sample: Sample, scores: Scores, at: torch.Tensor) -> None:
    ids = sample.student.trained_ids.tolist()
    assert packed.targets[at].tolist() == ids and packed.input_ids[at + 1].tolist() == ids
    assert packed.rollout_logprobs[at].tolist() == sample.rollout_logprobs.tolist()
    assert packed.scores.logprob[at].equal(scores.logprob)
    assert packed.scores.reference_logprob[at].equal(scores.reference_logprob)
    for name, weight in sample.weights.items():
        assert (packed.weights[name][at] == torch.tensor(weight)).all()
    if sample.teacher is not None:
        assert packed.scores.topk_ids[at].equal(scores.topk_ids)
        assert packed.scores.teacher_logprobs[at].equal(scores.teacher_logprobs)
        assert packed.scores.teacher_entropy[at].equal(scores.teacher_entropy)


def test_samples_without_a_teacher_get_finite_teacher_values_that_leave_mass_for_the_tail():
    samples = [make(0, 0, distill=1.0, policy=0.0), make(0, 1)]
    row = pack_student(Row((0, 1), 10), samples, [scores_of(s, 0) for s in samples])
    filled = row.scores.teacher_logprobs[5:]
    assert torch.allclose(filled.exp().sum(-1), torch.tensor(4 / 5))
    alone = pack_student(Row((1,), 5), samples, [Scores(), Scores(logprob=torch.zeros(2))])
    assert alone.scores.topk_ids is alone.scores.teacher_logprobs is alone.scores.teacher_entropy is None
    assert alone.scores.logprob is not None


def test_full_vocabulary_teacher_logits_keep_their_dtype():
    samples = [make(distill=1.0, policy=0.0)]
    row = pack_student(Row((0,), 5), samples, [Scores(teacher_logits=torch.ones(2, 7, dtype=torch.bfloat16))])
    assert row.scores.teacher_logits.shape == (5, 7) and row.scores.teacher_logits.dtype == torch.bfloat16
    assert row.scores.teacher_logits.float().sum() == 14


def test_a_missing_or_misplaced_score_is_no_zero():
    samples = [make(0, 0), make(0, 1)]
    with pytest.raises(AssertionError, match="train:0 sample 1: no score"):
        pack_student(Row((0, 1), 10), samples, [Scores(logprob=torch.zeros(2)), Scores()])
    with pytest.raises(AssertionError, match="3 scores, 2 tokens"):
        pack_student(Row((0,), 5), samples, [Scores(logprob=torch.zeros(3)), Scores()])


def attempts_of_an_episode_and_others():
    """An attempt in two sequences of 2 and 3 tokens, a whole one of 2, and one that is left out."""
    begin, end = make(sample=0, response=2), make(sample=0, response=3)
    begin.attempt_length = end.attempt_length = 5
    end.part = 1
    return [begin, end, make(sample=1, distill=1.0, policy=0.0), make(sample=2, policy=0.0)]


def test_the_sequences_of_an_episode_are_one_response_with_one_first_token():
    samples = attempts_of_an_episode_and_others()
    empty = make(sample=3, response=0)  # counts as no response
    (mini,) = plan_of([*samples, empty], dp_size=1, max_tokens=100).mini_batches
    assert (mini.responses, mini.loss_tokens, mini.distill_tokens) == (2, 7, 2)
    row = pack_student(Row((0, 1, 2, 3), 0), samples)
    told = [(row.response_tokens[at].item(), row.first_token[at].item()) for at in row.targets.nonzero()[:, 0]]
    assert told == [(5, 1), (5, 0)] + [(5, 0)] * 3 + [(2, 1), (2, 0)] + [(2, 0)] * 2


def test_a_step_has_the_denominators_of_its_mini_batch():
    samples = attempts_of_an_episode_and_others()
    plan = plan_of(samples, dp_size=1, max_tokens=100)
    asked = []
    policy = SimpleNamespace(padding=NO_PADDING, sum_over_data=lambda value: 3 * value, train_step=lambda *_: "done")
    objective = SimpleNamespace(
        distill_weight_sum=lambda *_: torch.tensor(0.5), loss=lambda **keys: asked.append(keys), end_step=lambda: None
    )
    passes = BatchPasses(Batch(samples, plan, {}), policy, objective)
    assert passes.train_step(plan.mini_batches[0]) == "done"
    assert asked == [{"loss_tokens": 7, "responses": 2, "distill_weight_mean": 0.75}]  # 3 ranks' 0.5 over 2 tokens


def test_the_work_of_a_taught_sample_is_training_and_the_teachers_pass():
    plain, taught = make(0, 0, 10, 20), make(0, 1, 10, 20, distill=1.0, teacher=40)
    work = [cost([i], [plain, taught], Padding()) for i in (0, 1)]
    assert work[1] - work[0] == pytest.approx(60, rel=0.01)  # the student's top-k ids have no pass of their own
