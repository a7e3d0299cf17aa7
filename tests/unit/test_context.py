"""Which positions of a packed row each context-parallel rank has, and what it makes of the row."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_srpo.mcore import cpu_shim

cpu_shim.install()

from megatron_srpo.batching import pack_rows  # noqa: E402
from megatron_srpo.core.records import Padding, Row  # noqa: E402
from megatron_srpo.mcore.context import local_part, positions_by_rank  # noqa: E402
from tests.made_samples import make_sample  # noqa: E402


@given(size=st.integers(2, 4), chunks=st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(any))
def test_every_position_is_on_one_rank_and_each_rank_has_two_chunks_of_each_sequence(size, chunks):
    lengths = [2 * size * chunk for chunk in chunks]
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int()
    positions = positions_by_rank(bounds, size)
    assert positions.flatten().sort().values.tolist() == list(range(sum(lengths)))
    for rank, mine in enumerate(positions.tolist()):
        expected = []
        for start, chunk in zip(bounds.tolist(), chunks, strict=False):
            for number in (rank, 2 * size - 1 - rank):
                expected += range(start + number * chunk, start + (number + 1) * chunk)
        assert mine == expected


def test_a_part_of_a_row_has_the_tokens_and_targets_of_its_positions():
    samples = [make_sample("train:0", i, [5, 6, 7], list(range(10, 10 + n)), [-0.5] * n) for i, n in enumerate((2, 6))]
    row = pack_rows([Row((0, 1), 14)], samples, padding=Padding(4, 8))[0]
    assert row.cu_seqlens.tolist() == [0, 8, 20, 24]
    parts = [local_part(row, rank, 2, None) for rank in range(2)]
    assert parts[0].cu_seqlens.tolist() == [0, 4, 10, 12]
    assert parts[0].input_ids.tolist() == [5, 6, 0, 0, *[5, 6, 7], *[0, 0, 0], *[0, 0]]
    assert parts[1].input_ids.tolist() == [7, 10, 11, 0, *[10, 11, 12], *[13, 14, 15], *[0, 0]]
    assert sum(float(part.loss_mask.sum()) for part in parts) == 8
    assert sum(float(part.weights["policy"].sum()) for part in parts) == 8
