"""A layer's elementwise work in few passes over memory, used without Transformer Engine.

On a CPU such work is as slow as memory is, and torch's own RMSNorm and SwiGLU are made of many operations there, each
of which reads and writes whole activations. Here every backward pass is written out: it makes few of them, and keeps
only the input. Values and gradients are those of torch up to rounding.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

_silu_backward = torch.ops.aten.silu_backward.grad_input


class AutogradContext(Protocol):
    """What torch gives the passes of an autograd function, as far as the functions of `mcore/` use it."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class RMSNorm(torch.autograd.Function):
    """y = x · r · w with r = (mean x² + ε)^(−1/2) over the last dimension, in the dtype of x: fp32 or fp64."""

    @staticmethod
    def forward(ctx: AutogradContext, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x […, H], weight [H]."""
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.size(-1)).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: AutogradContext, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        """∂w = Σ_t g·x·r        ∂x = r · (g·w − x · r² · mean(g·w·x))"""
        x, weight, scale = ctx.saved_tensors
        width = x.size(-1)
        products, scales = (grad * x).reshape(-1, width), scale.reshape(-1)
        for_weight = torch.mv(products.T, scales) if ctx.needs_input_grad[1] else None
        slope = torch.mv(products, weight).mul_(scales.pow(3)).div_(-width).view_as(scale)
        return torch.mul(grad, weight, out=products.view(x.shape)).mul_(scale).addcmul_(x, slope), for_weight, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: AutogradContext, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: AutogradContext, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, -1)
        result = torch.empty_like(x)
        for_gate, for_up = result.chunk(2, -1)
        torch.mul(F.silu(gate), grad, out=for_up)
        _silu_backward(grad * up, gate, grad_input=for_gate)
        return result


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) · up [T, …, F] of x = [gate, up], [T, …, 2·F]."""
    return _SwiGLU.apply(x)
