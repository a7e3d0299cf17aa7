"""Packed attention against a plain per-sequence reference in float64, value and gradient."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from megatron_srpo.config import Config
from megatron_srpo.mcore import cpu_shim

cpu_shim.install()

from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402

from megatron_srpo.mcore import attention  # noqa: E402
from megatron_srpo.mcore.attention import (  # noqa: E402
    _Batches,
    context_parallel_attention,
    length_groups,
    packed_causal_attention,
)
from megatron_srpo.mcore.policy import may_share_prompts  # noqa: E402
from megatron_srpo.mcore.rotary import positions_in_sequences  # noqa: E402
from megatron_srpo.mcore.step import packed_params  # noqa: E402


def reference(query, key, value, bounds, scale):
    """Softmax attention inside each sequence, one query at a time."""
    groups = query.size(1) // key.size(1)
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    rows = []
    for start, stop in itertools.pairwise(bounds):
        for t in range(start, stop):
            scores = torch.einsum("hd,shd->hs", query[t], key[start : t + 1]) * scale
            rows.append(torch.einsum("hs,shd->hd", scores.softmax(-1), value[start : t + 1]))
    return torch.stack(rows)


@pytest.mark.parametrize(
    "lengths", [[7], [1, 1, 1], [33, 33], [6, 5, 6], [5, 90, 3, 88, 64, 1], [70, 100, 130], [4, 0, 6]]
)
def test_packed_attention_equals_attention_inside_each_sequence(lengths):
    torch.manual_seed(0)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    total = int(bounds[-1])
    query = torch.randn(total, 4, 8, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(total, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(total, 4, 8, dtype=torch.float64)

    expected = reference(query, key, value, bounds.tolist(), 8**-0.5)
    expected_gradients = torch.autograd.grad((expected * weight).sum(), (query, key, value))
    actual = packed_causal_attention(query, key, value, bounds.int(), scale=None, dropout=0.0)
    gradients = torch.autograd.grad((actual * weight).sum(), (query, key, value))

    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    for mine, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("lengths", "copied"), [([7], False), ([9, 9, 9], False), ([9, 8, 9], True), ([3, 70], True)])
def test_rows_whose_sequences_have_one_length_are_not_copied(lengths, copied):
    values = torch.randn(sum(lengths), 2, 8)
    batches = _Batches.of(torch.tensor([0, *lengths]).cumsum(0).int(), ())
    first, *_ = batches.pad(values)
    assert (first.data_ptr() != values.data_ptr()) is copied
    assert batches.unpad(batches.pad(values)).equal(values)


@pytest.mark.parametrize(
    ("lengths", "prefixes"),
    [
        ([5, 3, 4, 1], (-1, 0, 0, 0)),
        ([7, 90, 2, 100, 64, 88, 3], (-1, 0, 0, -1, 3, 3, -1)),  # two families, and a sequence of its own
        ([3, 2, 2, 2], (-1, -1, 0, 0)),  # a sequence between a prefix and those behind it
        ([4, 3, 2, 70, 5, 1, 6], (-1, 0, 1, 1, 0, 4, -1)),  # a tree: prefixes that have one themselves
    ],
)
def test_sequences_behind_a_shared_prefix_see_it_and_themselves(lengths, prefixes):
    torch.manual_seed(0)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    query = torch.randn(int(bounds[-1]), 4, 8, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(int(bounds[-1]), 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(query.shape, dtype=torch.float64)

    expected = []
    for number, prefix in enumerate(prefixes):
        own = torch.arange(int(bounds[number]), int(bounds[number + 1]))
        before = own[:0]
        while prefix >= 0:
            before = torch.cat([torch.arange(int(bounds[prefix]), int(bounds[prefix + 1])), before])
            prefix = prefixes[prefix]
        whole = torch.cat([before, own])  # as if the sequence stood alone
        expected.append(reference(query[whole], key[whole], value[whole], [0, len(whole)], 8**-0.5)[len(before) :])
    expected = torch.cat(expected)
    expected_gradients = torch.autograd.grad((expected * weight).sum(), (query, key, value))
    actual = packed_causal_attention(query, key, value, bounds.int(), scale=None, dropout=0.0, prefixes=prefixes)
    gradients = torch.autograd.grad((actual * weight).sum(), (query, key, value))

    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    for mine, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11)


def test_a_sequence_behind_a_tree_of_prefixes_begins_where_the_last_of_them_ends():
    bounds = torch.tensor([0, 4, 7, 9, 15]).int()
    row = SimpleNamespace(cu_seqlens=bounds, prefixes=(-1, 0, 1, 0))
    params = packed_params(row)
    positions = positions_in_sequences(bounds, 15, 0, 1, starts=bounds.starts)
    assert positions.tolist() == [*range(4), *range(4, 7), *range(7, 9), *range(4, 10)]
    assert params.max_seqlen_q == params.max_seqlen_kv == 10
    seen = [*range(4), *range(7), *range(9), *range(4), *range(9, 15)]
    assert params.keys.tolist() == seen and params.key_bounds.tolist() == [0, 4, 11, 20, 30]
    row.prefixes = ()
    assert packed_params(row).max_seqlen_q == 6


def test_a_row_is_cut_into_batches_once_for_all_layers_and_scores_are_scaled_as_asked():
    torch.manual_seed(0)
    bounds = torch.tensor([0, 4, 9, 15]).int()
    query, key, value = (torch.randn(15, 2, 8, dtype=torch.float64) for _ in range(3))
    for prefixes in ((), (-1, 0, 0)):
        cut = bounds.clone()
        found = packed_causal_attention(query, key, value, cut, scale=0.7, dropout=0.0, prefixes=prefixes)
        assert _Batches.of(cut, prefixes) is _Batches.of(cut, prefixes)
        spans = [[*range(4), *range(*span)] for span in ((4, 9), (9, 15))] if prefixes else [range(4, 9), range(9, 15)]
        for span in (range(4), *spans):
            at, own = torch.tensor(list(span)), span[4:] if prefixes and len(span) > 4 else span
            alone = reference(query[at], key[at], value[at], [0, len(at)], 0.7)[-len(own) :]
            torch.testing.assert_close(found[torch.tensor(list(own))], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("prefixes", [(), (-1, 0, 0)])
def test_context_parallel_attention_of_one_rank_is_that_without_and_both_drop_units(prefixes, monkeypatch):
    monkeypatch.setattr(attention, "gather_from_sequence_parallel_region", lambda values, group: values)
    torch.manual_seed(0)
    alone = SimpleNamespace(rank=lambda: 0, size=lambda: 1)
    bounds = torch.tensor([0, 4, 10, 16]).int()
    given = [torch.randn(16, 2, 8, dtype=torch.float64) for _ in range(3)]
    for scale in (None, 0.7):
        found = context_parallel_attention(*given, bounds, alone, scale=scale, dropout=0.0, prefixes=prefixes)
        expected = packed_causal_attention(*given, bounds, scale=scale, dropout=0.0, prefixes=prefixes)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for function, group in ((context_parallel_attention, (alone,)), (packed_causal_attention, ())):
        dropped = function(*given, bounds, *group, scale=0.7, dropout=0.5, prefixes=prefixes)
        for start, stop in itertools.pairwise(bounds.tolist()):
            assert not torch.allclose(dropped[start:stop], expected[start:stop])


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_layer_drops_while_it_is_trained_and_scales_as_it_was_told(ranks, monkeypatch):
    seen = []
    for name in ("packed_causal_attention", "context_parallel_attention"):
        monkeypatch.setattr(
            attention, name, lambda *given, **how: seen.append((len(given), how)) or torch.zeros(5, 2, 4)
        )
    monkeypatch.setattr(attention.parallel_state, "get_context_parallel_group", lambda: None)
    settings = SimpleNamespace(attention_dropout=0.2, sequence_parallel=True, context_parallel_size=ranks)
    layers = [attention.PackedAttention(settings, 1, None, "self", softmax_scale=0.3),
              attention.PackedAttention(settings, 1, None, "self", 0.4)]  # fmt: skip
    for layer in layers:
        for training in (True, False):
            layer.train(training)
            assert layer(None, None, None, None, packed_seq_params=PackedSeqParams("thd")).shape == (5, 8)
    assert {count for count, _ in seen} == {3 + ranks}
    assert [how["dropout"] for _, how in seen] == [0.2, 0.0, 0.4, 0.0]
    assert [how["scale"] for _, how in seen] == [0.3, 0.3, None, None]


def test_length_groups_bound_the_padding_and_lose_no_sequence():
    lengths = [1000, 900, 799, 500, 64, 63, 2, 1, 0]
    groups = length_groups(lengths)
    assert sorted(i for group in groups for i in group) == [0, 1, 2, 3, 4, 5, 6, 7]
    for group in groups:
        longest, shortest = max(lengths[i] for i in group), min(lengths[i] for i in group)
        assert longest <= 64 or longest <= 1.25 * shortest


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({"model": {"hidden_dropout": 0.1}}, {}),
        ({"model": {"attention_dropout": 0.1}}, {}),
        ({"lora": {"rank": 4, "dropout": 0.1}}, {}),
        ({"train": {"share_prompts": False}}, {}),
        ({"train": {"moe_aux_loss_coef": 0.001}}, {}),
        ({"parallel": {"context_parallel_size": 2}}, {"transformer_engine": True}),
    ],
)
def test_prompts_are_shared_only_where_it_changes_nothing(changes, options):
    tree = {"model": {"path": "m"}, "data": {"train": "t"}}
    assert may_share_prompts(Config(**tree), transformer_engine=False)
    assert may_share_prompts(Config(**tree), transformer_engine=True)
    for section, keys in changes.items():
        tree[section] = {**tree.get(section, {}), **keys}
    assert not may_share_prompts(Config(**tree), **{"transformer_engine": False, **options})
