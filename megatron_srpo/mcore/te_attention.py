"""Transformer Engine's core attention, for packed rows whose samples may share a prompt (mcore/attention.py).

Transformer Engine computes all sequences of a row in one call. For a sequence behind a prefix it gets the sequence's
own queries, and the keys and values of all that it sees. Its mask "padding_causal_bottom_right" lets the last query see
all keys, the one before it all but the last, and so on, which is right for sequences with and without a prefix. So keys
and values of a prefix are copied per sample, as they are in a row that shares nothing, and nothing else is.
"""

from __future__ import annotations

import torch
from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megatron_srpo.core.errors import UserError
from megatron_srpo.mcore.attention import SharedSeqParams

MASK = "padding_causal_bottom_right"


class SharedPromptAttention(TEDotProductAttention):
    """Megatron's wrapper of Transformer Engine's attention, and rows with shared prompts."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType = AttnMaskType.padding_causal, attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None, **more: object,
    ) -> Tensor:  # fmt: skip
        """query [T, heads, d], key and value [T, groups, d] of one packed row; returns [T, heads·d]."""
        row = packed_seq_params
        if not isinstance(row, SharedSeqParams):
            return super().forward(
                query, key, value, attention_mask, attn_mask_type, attention_bias, packed_seq_params=row, **more
            )
        assert row.keys is not None and row.key_bounds is not None, "SharedSeqParams.of makes both"
        # The class above Megatron's: its wrapper takes the same boundaries for queries and keys from the rotary
        # embedding's description of the row.
        return super(TEDotProductAttention, self).forward(
            query, key[row.keys], value[row.keys], None, qkv_format="thd", attn_mask_type=MASK,
            cu_seqlens_q=row.cu_seqlens_q, cu_seqlens_kv=row.key_bounds, max_seqlen_q=row.max_seqlen_q,
            max_seqlen_kv=row.max_seqlen_kv,
        )  # fmt: skip


def verify(attention: SharedPromptAttention, device: torch.device) -> None:
    """Compute a small row with a shared prompt, and the same sequences alone, forward and backward. UserError if they
    differ by more than rounding: which kernel Transformer Engine takes depends on the GPU and on cuDNN."""
    config = attention.config
    ranks, generator = config.tensor_model_parallel_size, torch.Generator(device).manual_seed(0)
    heads, groups = config.num_attention_heads // ranks, max(1, config.num_query_groups // ranks)
    lengths, prefixes = (70, 5, 40, 9, 20, 3), (-1, 0, 0, -1, 0, 4)
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=device)
    row = SharedSeqParams.of(bounds, prefixes)
    total, longest = sum(lengths), row.max_seqlen_kv
    assert row.keys is not None and row.key_bounds is not None
    query, key, value, weight = (
        torch.randn(total, number, config.kv_channels, generator=generator, device=device, dtype=config.params_dtype)
        for number in (heads, groups, groups, heads)
    )
    # In the row that shares nothing, a sequence's own tokens are the last of its keys.
    ends = row.key_bounds[1:].tolist()
    own = torch.cat([torch.arange(end - length, end) for end, length in zip(ends, lengths, strict=True)]).to(device)
    alone = PackedSeqParams("thd", row.key_bounds, row.key_bounds, None, None, longest, longest)
    found = []
    for shared in (True, False):
        given = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
        q, k, v = given if shared else [tensor[row.keys] for tensor in given]
        result = attention(q, k, v, None, AttnMaskType.causal, packed_seq_params=row if shared else alone)
        result = result.view(-1, heads, config.kv_channels)
        result = result if shared else result[own]
        found.append([result, *torch.autograd.grad((result * weight).sum(), given)])
    off = max(
        float((mine.detach() - theirs.detach()).abs().max() / theirs.detach().abs().max())
        for mine, theirs in zip(*found, strict=True)
    )
    if not off <= 16 * torch.finfo(config.params_dtype).eps:
        raise UserError(
            f"train.share_prompts = true: on this machine Transformer Engine computes responses behind a shared prompt "
            f"otherwise than alone (off by {off:.1e}). Set train.share_prompts = false"
        )
