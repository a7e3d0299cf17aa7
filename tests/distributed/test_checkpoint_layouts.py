"""A checkpoint goes on at any other layout: the next step differs by rounding alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_srpo.core.metrics import Mean
from tests.distributed.test_policy import _policy, _rows, logprobs
from tests.distributed_harness import run_distributed
from tests.saved_policy import save_policy
from tests.tiny_models import make_tiny_model

TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
CHANGES = {  # (ranks, layout) before and after
    "tp2 to pp2": ((2, TP2), (2, PP2)),
    "pp2 to tp2": ((2, PP2), (2, TP2)),
    "dp2 to dp1": ((2, {}), (1, {})),
    "world 4 to 2": ((4, TP2), (2, PP2)),
    "world 2 to 4": ((2, {}), (4, {**TP2, **PP2})),
}


def loss(given, row):
    value = -logprobs(given, row).sum() / 96
    return value, {"loss": Mean(value.detach() * 96, torch.tensor(float(row.targets.numel())))}


def exported(policy, model) -> dict:
    from megatron_srpo.bridge import Exporter, read_config

    return {name: value.clone() for name, value in Exporter(policy.shards, read_config(model)).items()}


def _step_and_report(policy, model: Path) -> dict:
    policy.train_step(_rows(policy.topology.dp_rank, policy.topology.dp_size), loss)
    report = {"student": exported(policy, model)}
    with policy.weights("teacher"):
        return report | {"teacher": exported(policy, model)}


def _before(model: Path, parallel: dict, folder: Path) -> dict:
    """Three steps, a checkpoint, one more step."""

    policy = _policy(model, parallel)
    for _ in range(3):
        policy.train_step(_rows(policy.topology.dp_rank, policy.topology.dp_size), loss)
    save_policy(policy, folder)
    return _step_and_report(policy, model)


def _after(model: Path, parallel: dict, folder: Path) -> dict:
    from megatron_srpo.mcore import checkpoint

    policy = _policy(model, parallel)
    checkpoint.load(policy, folder)
    return _step_and_report(policy, model)


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_the_next_step_at_another_layout_differs_by_rounding_alone(change, tmp_path):
    model, folder = make_tiny_model(tmp_path / "model", vocab=101, layers=4), tmp_path / "checkpoint"
    folder.mkdir()
    (ranks, layout), (other_ranks, other_layout) = CHANGES[change]
    expected = run_distributed(_before, ranks, model, layout, folder)[0]
    for found in run_distributed(_after, other_ranks, model, other_layout, folder):
        for whose in ("student", "teacher"):
            for name, value in expected[whose].items():
                torch.testing.assert_close(found[whose][name], value, rtol=0, atol=2e-5, msg=f"{whose} {name}")
