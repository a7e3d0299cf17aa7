"""The rotary embedding of packed rows equals Megatron's, and is made once for all layers."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_srpo.mcore import cpu_shim

cpu_shim.install()

from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb  # noqa: E402

from megatron_srpo.mcore import rotary  # noqa: E402
from megatron_srpo.mcore.context import positions_by_rank  # noqa: E402

CONFIG = SimpleNamespace(
    apply_rope_fusion=False, rotary_interleaved=False, multi_latent_attention=False, mrope_section=None
)


def _group(rank, size):
    return SimpleNamespace(rank=lambda: rank, size=lambda: size)


def _frequencies(longest, width):
    rates = 1.0 / 10000 ** (torch.arange(0, width, 2) / width)
    angles = torch.outer(torch.arange(longest).float(), rates)
    return torch.cat((angles, angles), dim=-1)[:, None, None, :]


def _bounds(lengths):
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int()


def _value_and_gradient(function, lengths, rank, size, dtype, width):
    cu_seqlens = _bounds(lengths)
    tokens = sum(lengths) // size
    draw = torch.Generator().manual_seed(1)
    t = torch.randn(tokens, 3, 16, generator=draw).to(dtype).requires_grad_()
    weight = torch.randn(tokens, 3, 16, generator=draw).to(dtype)
    value = function(t, _frequencies(max(lengths), width), CONFIG, cu_seqlens=cu_seqlens, cp_group=_group(rank, size))
    (value * weight).sum().backward()
    return value.detach(), t.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [16, 8], ids=["whole heads", "half of each head"])
@pytest.mark.parametrize(
    ("lengths", "size"), [([5, 1, 0, 9, 2], 1), ([7], 1), ([8, 16, 0, 4], 2), ([12, 24], 3)], ids=str
)
def test_value_and_gradient_are_megatrons_up_to_rounding(dtype, width, lengths, size):
    """Megatron rounds twice more: each half is a product and a sum here, and was two products and a sum."""
    close = {"rtol": 0, "atol": 1e-6 if dtype == torch.float32 else 0.04}
    for rank in range(size):
        expected = _value_and_gradient(apply_rotary_pos_emb, lengths, rank, size, dtype, width)
        found = _value_and_gradient(rotary.apply_rotary, lengths, rank, size, dtype, width)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, **close)


@settings(max_examples=50)
@given(size=st.integers(1, 4), chunks=st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(any))
def test_positions_are_those_of_the_tokens_that_a_rank_has(size, chunks):
    lengths = [2 * size * chunk for chunk in chunks]
    inside = torch.cat([torch.arange(length) for length in lengths])
    for rank, mine in enumerate(positions_by_rank(_bounds(lengths), size)):
        found = rotary.positions_in_sequences(_bounds(lengths), len(mine), rank, size)
        assert torch.equal(found.long(), inside[mine])


def test_all_layers_of_a_row_share_one_table_and_it_goes_with_the_row(monkeypatch):
    made, positions = [], rotary.positions_in_sequences
    monkeypatch.setattr(
        rotary, "positions_in_sequences", lambda *given, **more: made.append(1) or positions(*given, **more)
    )
    cu_seqlens, freqs = _bounds([3, 4]), _frequencies(4, 16)
    group = _group(0, 1)
    for t in (torch.randn(7, 4, 16), torch.randn(7, 2, 16), torch.randn(7, 4, 16)):  # queries, keys, the next layer
        rotary.apply_rotary(t, freqs.detach(), CONFIG, cu_seqlens=cu_seqlens, cp_group=group)
    assert made == [1]
    other = _bounds([4, 3])
    t = torch.randn(7, 4, 16)
    found = rotary.apply_rotary(t, freqs, CONFIG, cu_seqlens=other, cp_group=group)
    assert made == [1, 1]
    expected = apply_rotary_pos_emb(t, freqs, CONFIG, other, cp_group=group)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    del other
    assert rotary._last is None


def test_the_number_of_operations_does_not_grow_with_the_sequences_of_a_row():
    counts = []
    for lengths in ([36, 36], [1] * 72):
        t = torch.randn(72, 2, 16, requires_grad=True)
        given = (t, _frequencies(36, 16), CONFIG)
        with torch.profiler.profile() as profile:
            rotary.apply_rotary(*given, cu_seqlens=_bounds(lengths), cp_group=_group(0, 1)).sum().backward()
        counts.append(sum(1 for event in profile.events() if event.name.startswith("aten::")))
    assert counts[0] == counts[1]


def test_with_transformer_engine_megatrons_fused_operations_are_on(monkeypatch):
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.transformer.moe import moe_utils

    from megatron_srpo.config import ModelConfig, ParallelConfig
    from megatron_srpo.mcore.model import transformer_config

    given = []

    def fused(t, cu_seqlens, freqs, **more):
        given.append((cu_seqlens, more["cp_size"], more["cp_rank"]))
        return t

    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb_thd", fused)
    for name in ("fused_permute", "fused_permute_with_probs", "fused_sort_chunks_by_index",
                 "fused_sort_chunks_by_index_with_probs", "fused_unpermute"):  # fmt: skip
        monkeypatch.setattr(moe_utils, name, fused, raising=False)
    dense = {
        "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
        "num_key_value_heads": 2, "head_dim": 16, "model_type": "qwen3", "rms_norm_eps": 1e-6,
        "max_position_embeddings": 64, "tie_word_embeddings": False, "architectures": ["Qwen3ForCausalLM"],
    }  # fmt: skip
    choose = {"on_cuda": False}
    configs = [
        transformer_config(dense, ModelConfig(path="m"), ParallelConfig(), transformer_engine=there, **choose)
        for there in (True, False)
    ]
    for name in ("apply_rope_fusion", "bias_activation_fusion", "bias_dropout_fusion"):
        assert [getattr(config, name) for config in configs] == [True, False]
    cu_seqlens, t = _bounds([2, 3]), torch.randn(5, 2, 16)
    rotary.apply_rotary(t, _frequencies(3, 16), configs[0], cu_seqlens=cu_seqlens, cp_group=_group(1, 4))
    assert given == [(cu_seqlens, 4, 1)]
