"""Rotary embedding of packed rows in one pass, used without Transformer Engine. With it, it is used for rows whose
samples share prompts: their sequences begin at other positions than 0, which Transformer Engine's kernel does not know.

Megatron's own one goes through the sequences of a row one after the other, in every layer, for queries and keys. Here
the cosines and sines of all tokens of a row are made once, and all layers use them. Values and gradients are the same
up to rounding.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.transformer import attention
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_srpo.mcore.few_passes import AutogradContext

_megatrons = rope_utils.apply_rotary_pos_emb


@dataclass(frozen=True)
class _Row:
    """Cosines and sines [T, 1, d] of a row's tokens on this rank, and what they were made from."""

    boundaries: weakref.ref[Tensor]  # of the row's cu_seqlens
    frequencies: Tensor
    scale: float
    cos: Tensor
    sin: Tensor

    def is_of(self, cu_seqlens: Tensor, frequencies: Tensor, scale: float, like: Tensor) -> bool:
        """Recomputation detaches the frequencies, so the same memory counts, not the same object."""
        return (
            self.boundaries() is cu_seqlens
            and (self.frequencies.data_ptr(), self.frequencies.shape) == (frequencies.data_ptr(), frequencies.shape)
            and (self.scale, self.cos.dtype, self.cos.size(0)) == (scale, like.dtype, like.size(0))
        )


_last: _Row | None = None  # the row that was embedded last; forgotten with it


def install() -> None:
    """Have Megatron's attention embed packed rows with `apply_rotary`."""
    attention.apply_rotary_pos_emb = apply_rotary


def apply_rotary(
    t: Tensor, freqs: Tensor, config: TransformerConfig, cu_seqlens: Tensor | None = None, mscale: float = 1.0,
    cp_group: torch.distributed.ProcessGroup | None = None, **more: Any,
) -> Tensor:  # fmt: skip
    """Megatron's `apply_rotary_pos_emb`. Packed rows take the one pass, all others Megatron's own.

    t [T, heads, d] of this rank, freqs [longest sequence, 1, 1, rotated part of d], cu_seqlens [S+1] of the whole row.
    """
    fused = config.apply_rope_fusion and (cu_seqlens is None or _starts(cu_seqlens) is None)
    ours = cu_seqlens is not None and not (fused or config.rotary_interleaved or any(more.values()))
    if not ours or config.multi_latent_attention or t.device.type == "meta":
        return _megatrons(t, freqs, config, cu_seqlens=cu_seqlens, mscale=mscale, cp_group=cp_group, **more)
    assert cu_seqlens is not None and cp_group is not None, "Megatron's attention gives both"
    working = t.float() if config.apply_rope_fusion else t  # Transformer Engine's kernel rotates in float32
    row = _row(working, freqs, cu_seqlens, mscale, cp_group.rank(), cp_group.size())
    rotated, rest = working[..., : row.cos.size(-1)], t[..., row.cos.size(-1) :]
    result = _Rotation.apply(rotated, row.cos, row.sin).to(t.dtype)
    return torch.cat((result, rest), dim=-1) if rest.size(-1) else result


class _Rotation(torch.autograd.Function):
    """t · cos + [−second half of t, first half of t] · sin. The backward pass turns the other way."""

    @staticmethod
    def forward(ctx: AutogradContext, t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(t, cos, sin, 1)

    @staticmethod
    def backward(ctx: AutogradContext, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, sin, -1), None, None


def _turned(t: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """Both halves of `cos` are equal, and of `sin`."""
    (first, second), (sin, _) = t.chunk(2, dim=-1), sin.chunk(2, dim=-1)
    result = t * cos
    one, other = result.chunk(2, dim=-1)
    one.addcmul_(second, sin, value=-sign)
    other.addcmul_(first, sin, value=sign)
    return result


@torch.no_grad()
def _row(t: Tensor, freqs: Tensor, cu_seqlens: Tensor, scale: float, cp_rank: int, cp_size: int) -> _Row:
    global _last
    if _last is None or not _last.is_of(cu_seqlens, freqs, scale, t):
        positions = positions_in_sequences(cu_seqlens, t.size(0), cp_rank, cp_size, starts=_starts(cu_seqlens))
        table = freqs[:, 0]  # [longest sequence, 1, d]
        cos, sin = ((function(table) * scale).to(t.dtype)[positions] for function in (torch.cos, torch.sin))
        _last = _Row(weakref.ref(cu_seqlens, _forget), freqs.detach(), scale, cos, sin)
    return _last


def _forget(boundaries: weakref.ref[Tensor]) -> None:
    global _last
    if _last is not None and _last.boundaries is boundaries:
        _last = None


def set_starts(cu_seqlens: Tensor, starts: Tensor) -> None:
    """Let the sequences of a row begin at other positions than 0: starts [S]. Megatron's attention gives the embedding
    nothing of a row but its `cu_seqlens`, so this is kept with the tensor."""
    cu_seqlens.starts = starts  # type: ignore[attr-defined]


def _starts(cu_seqlens: Tensor) -> Tensor | None:
    return getattr(cu_seqlens, "starts", None)


def positions_in_sequences(
    cu_seqlens: Tensor, tokens: int, cp_rank: int, cp_size: int, *, starts: Tensor | None = None
) -> Tensor:
    """[tokens] position of each token of this rank's part of a row inside its own sequence, from `starts` [S] on.
    Nothing waits for the device. The order of context-parallel ranks is that of mcore/context.py."""
    bounds = cu_seqlens // cp_size  # of the parts
    token = torch.arange(tokens, dtype=bounds.dtype, device=bounds.device)
    sequence = torch.searchsorted(bounds[1:].contiguous(), token, right=True)
    offset = token - bounds[sequence]
    half = (bounds[sequence + 1] - bounds[sequence]) // 2
    later = offset - half + (2 * cp_size - 1 - cp_rank) * half
    inside = torch.where(offset < half, offset + cp_rank * half, later)
    return inside if starts is None else inside + starts[sequence]
