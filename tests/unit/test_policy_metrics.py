"""How the policy adds up what its rows tell: the metrics of a step, and sums over data-parallel ranks."""

import math
from types import SimpleNamespace

import pytest
import torch

from megatron_srpo.core.metrics import Max, Mean, Total
from megatron_srpo.mcore import cpu_shim

cpu_shim.install()

from megatron_srpo.mcore.policy import Policy  # noqa: E402


def policy_of_one_process(*, is_last_stage=True):
    policy = object.__new__(Policy)
    policy.topology = SimpleNamespace(
        world_size=1, tp_rank=0, cp_rank=0, is_last_stage=is_last_stage, device=torch.device("cpu")
    )
    return policy


def test_means_and_totals_add_up_over_rows_and_of_maxima_the_largest_counts():
    rows = [
        {"mean": Mean(torch.tensor(3.0), torch.tensor(2.0)), "total": Total(1.0), "max": Max(torch.tensor(5.0))},
        {"mean": Mean(1.0, 2.0), "total": Total(torch.tensor(2.0)), "max": Max(-2.0), "rare": Mean(4.0)},
    ]
    found = policy_of_one_process()._reduce(rows)
    assert {name: (type(metric), float(metric)) for name, metric in found.items()} == {
        "mean": (Mean, 1.0), "total": (Total, 3.0), "max": (Max, 5.0), "rare": (Mean, 4.0)
    }  # fmt: skip


def test_what_no_row_has_is_left_out_of_the_metrics():
    rows = [{"mean": Mean(0.0, 0.0), "max": Max(-math.inf), "total": Total(0.0)}] * 2
    assert policy_of_one_process()._reduce(rows) == {"total": Total(0.0)}


@pytest.mark.parametrize("is_last_stage", [True, False])
def test_a_sum_over_ranks_leaves_the_callers_tensor_as_it_is(is_last_stage):
    mine = torch.tensor([1.5, 2.5], dtype=torch.float64)
    found = policy_of_one_process(is_last_stage=is_last_stage).sum_over_data(mine)
    assert mine.tolist() == [1.5, 2.5] and found.tolist() == ([1.5, 2.5] if is_last_stage else [0.0, 0.0])
