"""The arithmetic of the bridge: what a shard holds, and that splitting is undone bit for bit."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from megatron_srpo.bridge.errors import BridgeError
from megatron_srpo.bridge.rules import QKV, Column, GatedMLP, Replicated, Row, Vocab

HEADS, GROUPS, HEAD_DIM, HIDDEN = 12, 4, 3, 7  # 3 query heads a group; nothing is a power of two
Q, KV = (HEADS * HEAD_DIM, HIDDEN), (GROUPS * HEAD_DIM, HIDDEN)

CASES = {
    "replicated": (Replicated(), [(13,)]),
    "column": (Column(), [(20, 7)]),
    "column bias": (Column(), [(20,)]),
    "row": (Row(), [(7, 20)]),
    "vocab": (Vocab(8, 8), [(8, 5)]),
    "padded vocab": (Vocab(9, 12), [(9, 5)]),
    "vocab with a rank of padding": (Vocab(5, 8), [(5, 3)]),
    "qkv": (QKV(HEADS, GROUPS, HEAD_DIM), [Q, KV, KV]),
    "qkv bias": (QKV(HEADS, GROUPS, HEAD_DIM), [Q[:1], KV[:1], KV[:1]]),
    "one query head a group": (QKV(4, 4, 2), [(8, 3), (8, 3), (8, 3)]),
    "gated mlp": (GatedMLP(), [(12, 7), (12, 7)]),
}


def random_tensors(shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("case", CASES)
def test_shards_of_all_ranks_give_back_the_tensors(case, tp):
    rule, shapes = CASES[case]
    tensors = random_tensors(shapes, torch.bfloat16)
    shards = [rule.to_shard(tensors, rank, tp) for rank in range(tp)]
    assert all(shard.shape == shards[0].shape for shard in shards)
    assert rule.hf_shapes(tuple(shards[0].shape), tp) == shapes
    back = rule.from_shards(shards)
    assert all(torch.equal(a, b) for a, b in zip(back, tensors, strict=True))


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_safetensors_slices_give_the_same_shards_as_tensors(case, tp, tmp_path):
    rule, shapes = CASES[case]
    tensors = random_tensors(shapes)
    save_file({str(i): tensor for i, tensor in enumerate(tensors)}, tmp_path / "t.safetensors")
    with safe_open(tmp_path / "t.safetensors", "pt") as file:
        for rank in range(tp):
            slices = [file.get_slice(str(i)) for i in range(len(tensors))]
            assert torch.equal(rule.to_shard(slices, rank, tp), rule.to_shard(tensors, rank, tp))


def test_qkv_lies_group_by_group_as_queries_key_value():
    rule = QKV(heads=4, groups=2, head_dim=1)
    q, k, v = torch.tensor([0, 1, 2, 3]), torch.tensor([10, 11]), torch.tensor([20, 21])
    assert rule.to_shard([q, k, v], 0, 1).tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    assert rule.to_shard([q, k, v], 1, 2).tolist() == [2, 3, 11, 21]


def test_a_gated_mlp_shard_is_its_gate_rows_then_its_up_rows():
    gate, up = torch.arange(4), torch.arange(10, 14)
    assert GatedMLP().to_shard([gate, up], 0, 2).tolist() == [0, 1, 10, 11]
    assert GatedMLP().to_shard([gate, up], 1, 2).tolist() == [2, 3, 12, 13]


def test_row_splits_input_features():
    assert Row().to_shard([torch.arange(8).view(2, 4)], 1, 2).tolist() == [[2, 3], [6, 7]]


def test_vocabulary_padding_is_zero_going_in_and_absent_coming_out():
    rule = Vocab(5, 8)
    shards = [rule.to_shard([torch.ones(5, 3)], rank, 4) for rank in range(4)]
    assert [shard.sum().item() for shard in shards] == [6, 6, 3, 0]
    polluted = [shard + 7 for shard in shards]  # what an optimizer may do to rows without a meaning
    assert torch.equal(rule.from_shards(polluted)[0], torch.full((5, 3), 8.0))


def test_groups_that_do_not_divide_are_refused():
    with pytest.raises(BridgeError, match="2 key-value heads cannot be split over tensor parallel size 4"):
        QKV(4, 2, 2).to_shard(random_tensors([(8, 3), (4, 3), (4, 3)]), 0, 4)


class Recorder:
    """A slice handle that counts the elements that are read."""

    def __init__(self, tensor):
        self.tensor, self.read = tensor, 0

    def get_shape(self):
        return list(self.tensor.shape)

    def __getitem__(self, index):
        part = self.tensor[index]
        self.read += part.numel()
        return part


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("replicated", "vocab with a rank of padding")])
def test_a_rank_reads_only_its_part(case):
    rule, shapes = CASES[case]
    sources = [Recorder(tensor) for tensor in random_tensors(shapes)]
    rule.to_shard(sources, 1, 4)
    for source in sources:
        assert source.read <= -(-source.tensor.shape[0] // 4) * (source.tensor.numel() // source.tensor.shape[0])
