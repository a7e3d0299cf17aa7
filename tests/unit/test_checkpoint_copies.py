"""Copies of tensors to host memory through two pieces of bounded size, here of ordinary memory: no GPU is needed."""

from __future__ import annotations

import pytest
import torch

from megatron_srpo.mcore.checkpoint_copies import Staging

PIECE = 64  # bytes


@pytest.fixture
def staging():
    through = Staging(torch.device("cpu"))
    through._pieces = [torch.empty(PIECE, dtype=torch.uint8) for _ in range(2)]
    return through


@pytest.mark.parametrize("numbers", [0, 1, 15, 16, 17, 32, 33, 48, 160, 161])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copy_through_pieces_equals_its_source(staging, numbers, dtype):
    source = torch.randn(numbers).to(dtype)
    copy = staging.copy(source)
    assert torch.equal(copy, source) and copy.dtype == dtype
    source.zero_()
    assert not numbers or copy.abs().sum() > 0  # it has memory of its own


def test_a_view_is_copied_without_the_rest_of_its_storage(staging):
    whole = torch.arange(400.0).view(20, 20)
    for view in (whole[3:5], whole[:, 7], whole.t()[2:4]):
        copy = staging.copy(view)
        assert torch.equal(copy, view) and copy.untyped_storage().nbytes() == view.nbytes


def test_only_a_whole_tensor_that_nobody_else_owns_is_taken_without_a_copy():
    staging, source = Staging(torch.device("cpu")), torch.ones(40)
    assert staging.copy(source, owned=True) is source
    assert staging.copy(source) is not source
    half = staging.copy(source[:20], owned=True)
    assert half.untyped_storage().nbytes() == half.nbytes
