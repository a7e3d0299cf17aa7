"""RMSNorm and SwiGLU with backward passes of their own: value and gradient against torch in float64."""

import pytest
import torch
import torch.nn.functional as F

from megatron_srpo.mcore.few_passes import RMSNorm, swiglu


def _check(function, reference, *given):
    """In fp64 as torch in fp64; in fp32 within its rounding."""
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        expected, found = [], []
        for use, of, kind in ((reference, expected, torch.float64), (function, found, dtype)):
            inputs = [value.to(kind).requires_grad_() for value in given]
            value = use(*inputs)
            weight = torch.linspace(-1, 2, value.numel(), dtype=kind).view(value.shape)
            of += [value, *torch.autograd.grad((value * weight).sum(), inputs)]
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(
                ours.double(), theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max())
            )


@pytest.mark.parametrize("shape", [(7, 1, 12), (5, 3, 4), (1, 8)])
def test_the_norm_equals_torchs(shape):
    torch.manual_seed(0)
    x, weight = 3 * torch.randn(shape, dtype=torch.float64), torch.randn(shape[-1], dtype=torch.float64)
    _check(lambda x, w: RMSNorm.apply(x, w, 1e-6), lambda x, w: F.rms_norm(x, shape[-1:], w, 1e-6), x, weight)


def test_the_norm_of_a_part_of_a_tensor_equals_torchs():
    """Keys are a view of the product that makes queries, keys and values."""
    torch.manual_seed(0)
    x, weight = torch.randn(6, 1, 2, 12, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    _check(
        lambda x, w: RMSNorm.apply(x[..., 4:8], w, 1e-6), lambda x, w: F.rms_norm(x[..., 4:8], (4,), w, 1e-6), x, weight
    )


def test_a_frozen_weight_of_a_norm_gets_no_gradient():
    x, weight = torch.randn(3, 4, requires_grad=True), torch.ones(4)
    RMSNorm.apply(x, weight, 1e-6).sum().backward()
    assert x.grad is not None and weight.grad is None


def test_a_row_of_zeros_has_a_finite_gradient():
    x = torch.zeros(2, 4, requires_grad=True)
    RMSNorm.apply(x, torch.ones(4), 1e-6).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(7, 1, 12), (4, 6)])
def test_swiglu_equals_torchs(shape):
    torch.manual_seed(0)

    def reference(x):
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up

    _check(swiglu, reference, 4 * torch.randn(shape, dtype=torch.float64))
