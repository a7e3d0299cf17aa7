"""The policy on real gloo ranks: Hugging Face logits matched, parallel equals serial, swaps and checkpoints exact."""

import itertools
import weakref
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from tests.distributed_harness import run_distributed
from tests.saved_policy import write_snapshot
from tests.tiny_models import make_tiny_model

LAYOUTS = {  # on two ranks
    "tp2_sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2},
    "pp2_interleaved": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    "cp2": {"context_parallel_size": 2},
    "dp2": {},
    "dp2_overlapped": {"overlap_grad_reduce": True},
}
VOCAB = 101  # odd: padded for TP 2


def _rows(dp_rank: int, dp_size: int) -> list:
    """Four packed rows of 24 tokens in three sequences; each data-parallel rank takes its part."""
    from megatron_srpo.core.tensors import PackedBatch

    rows = []
    for number in range(4):
        ids = torch.randint(0, VOCAB, (24,), generator=torch.Generator().manual_seed(number))
        zeros = torch.zeros(24)
        bounds = torch.tensor([0, 8, 20, 24], dtype=torch.int32)  # lengths of which context parallelism makes 4 chunks
        rows.append(PackedBatch(ids, ids.roll(-1), torch.arange(24), bounds, torch.ones(24), zeros, zeros, zeros))
    return rows[dp_rank::dp_size]


def _policy(model: Path, parallel: dict, dtype: str = "float32", **sections: dict):
    from megatron_srpo.bridge import load_hf_weights, read_config
    from megatron_srpo.config import Config
    from megatron_srpo.mcore import groups, optimizer
    from megatron_srpo.mcore.device import choose_device
    from megatron_srpo.mcore.policy import Policy

    config = Config(
        model={"path": str(model), "dtype": dtype}, data={"train": "unused"}, parallel=parallel,
        algorithm={"kl_loss_coef": 0.1}, **{"optimizer": {"lr": 1e-3}, **sections},
    )  # fmt: skip
    path = choose_device("auto", 0)
    topology = groups.initialize(config.parallel, path, seed=1, timeout_minutes=2)
    load = partial(load_hf_weights, hf_dir=model)
    small = partial(optimizer.DistributedDataParallelConfig, bucket_size=20_000)  # Megatron's would hold it all
    with patch.object(optimizer, "DistributedDataParallelConfig", small):
        policy = Policy(config, read_config(model), topology, path, load, total_steps=10)
    buckets = [len(piece.bucket_groups) for piece in policy.model]  # a tied embedding's is one of its own
    assert (max(buckets) > 2) == config.parallel.overlap_grad_reduce  # one reduction, or several during the last pass
    return policy


def logprobs(given, row):
    """Log-probs of a row's targets [T]."""
    from megatron_srpo.losses import LinearHead

    return LinearHead(**vars(given)).gather_logprobs(row.targets[:, None])[0][:, 0]


def scored(policy, rows):
    """The log-probs of whole rows; [] before the last pipeline stage."""
    return [result["logprob"] for result in policy.score(rows, lambda *given: {"logprob": logprobs(*given)})]


def swaps_hold(policy):
    """The student is back bit for bit from the teacher's pass, from a failure in it, and from one on the way there."""
    held = {name: value.detach().clone() for name, value in policy.shards.parameters.items()}
    main = [shard.main.detach().clone() for shard in policy.optimizer.shards()]

    def is_back():
        assert all(torch.equal(held[name], value) for name, value in policy.shards.parameters.items())
        assert all(torch.equal(a, b.main) for a, b in zip(main, policy.optimizer.shards(), strict=True))

    with policy.weights("teacher"):
        assert any(not torch.equal(held[name], value) for name, value in policy.shards.parameters.items())
    is_back()
    with pytest.raises(RuntimeError, match="in the teacher pass"), policy.weights("teacher"):
        raise RuntimeError("in the teacher pass")
    is_back()
    gather = policy.optimizer.gather_model

    def fails_once():
        policy.optimizer.gather_model = gather
        raise RuntimeError("on the way there")

    policy.optimizer.gather_model = fails_once
    with pytest.raises(RuntimeError, match="on the way there"), policy.weights("teacher"):
        pass
    is_back()


def returns_from_the_host(policy):
    """Nothing has memory inside the block; everything is back bit for bit, views of one memory included."""

    def everything():
        state = [value for shard in policy.optimizer.shards() for value in (shard.main, *shard.state.values())]
        shadows = [piece for shadow in policy.shadows.values() for piece in shadow.slices]
        return [*policy.shards.parameters.values(), *state, *shadows]

    device, held = policy.topology.device.type, [tensor.detach().clone() for tensor in everything()]
    for fails in (False, True):
        with pytest.raises(RuntimeError, match="while generating") if fails else nullcontext(), policy.on_host():
            here = [*everything(), *policy.optimizer.gradients()]
            assert not any(tensor.untyped_storage().nbytes() for tensor in here if tensor.device.type == device)
            if fails:
                raise RuntimeError("while generating")
        assert all(torch.equal(a, b) for a, b in zip(held, everything(), strict=True))
        assert not any(gradients.any() for gradients in policy.optimizer.gradients())


def load_watched(policy, folder):
    """Load a checkpoint; whole fp32 tensors of one kind of state are in memory at a time, and on the host, and only of
    parameters of which this rank has a slice."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    from megatron_srpo.mcore import checkpoint

    real, kinds, previous = dist_checkpointing.load, [], []

    own = {id(shard.parameter) for shard in policy.optimizer.shards()}

    def watched(state, *where, **how):
        (kind,) = state
        assert not any(tensor() is not None for tensor in previous), f"{kinds[-1]} is still in memory beside {kind}"
        kinds.append(kind)
        if kind != "model":
            tensors = [entry.data for entry in nested_values(state)]
            assert all(tensor.device.type == "cpu" for tensor in tensors) and len(tensors) == len(own)
            previous[:] = [weakref.ref(tensor) for tensor in tensors]
        return real(state, *where, **how)

    with patch.object(dist_checkpointing, "load", watched):
        checkpoint.load(policy, folder)
    assert kinds == ["model", "main", "exp_avg", "exp_avg_sq", "teacher", "reference"]


def train_and_report(model: Path, parallel: dict, scratch: Path, other: Path | None = None) -> dict:
    """`other`: a checkpoint of another layout at the same point of training, to go on from at the end."""
    from megatron_srpo.bridge import Exporter, read_config
    from megatron_srpo.core.metrics import Mean
    from megatron_srpo.mcore import checkpoint

    policy = _policy(model, parallel)
    rows = _rows(policy.topology.dp_rank, policy.topology.dp_size)

    def loss(given, row):
        value = -logprobs(given, row).sum() / 96
        return value, {"loss": Mean(value.detach() * 96, value.new_tensor(float(row.targets.numel())))}

    before = scored(policy, rows)
    norms, losses = [], []
    average = {name: value.detach().double() for name, value in policy.shards.parameters.items()}
    for _ in range(3):
        stats = policy.train_step(rows, loss)
        norms.append(stats.grad_norm)
        losses.append(float(stats.metrics["loss"]))
        for name, value in policy.shards.parameters.items():  # the recurrence of the EMA teacher, at the default rate
            average[name] = 0.95 * average[name] + 0.05 * value.detach().double()
    with policy.weights("teacher"):
        for name, value in policy.shards.parameters.items():
            torch.testing.assert_close(value.detach().double(), average[name], rtol=0, atol=1e-6, msg=name)
    swaps_hold(policy)
    returns_from_the_host(policy)
    held = {name: value.detach().clone() for name, value in policy.shards.parameters.items()}

    def bad_on_one_rank(given, row):
        value, metrics = loss(given, row)
        return (value * float("nan") if policy.topology.dp_rank == 0 else value), metrics

    with policy.weights("teacher"):
        taught = {name: value.detach().clone() for name, value in policy.shards.parameters.items()}
    assert policy.train_step(rows, bad_on_one_rank).skipped
    assert all(torch.equal(held[name], value) for name, value in policy.shards.parameters.items())
    with policy.weights("teacher"):
        assert all(torch.equal(taught[name], value) for name, value in policy.shards.parameters.items())
    with policy.weights("reference"):
        reference = scored(policy, rows)
    scratch.mkdir(exist_ok=True)
    snapshot = checkpoint.snapshot(policy, scratch)
    policy.train_step(rows, loss)  # what comes after the snapshot is not in it
    write_snapshot(policy, snapshot)
    with policy.weights("teacher"):
        straight = {name: value.detach().clone() for name, value in policy.shards.parameters.items()}
    final = {name: value.detach().clone() for name, value in policy.shards.parameters.items()}
    assert checkpoint.stored(scratch) == {"main", "exp_avg", "exp_avg_sq", "teacher", "reference"}
    load_watched(policy, scratch)
    steps = [shard.state["step"] for shard in policy.optimizer.shards() if "step" in shard.state]
    assert len({step.data_ptr() for step in steps}) == len(steps)  # one shared tensor is counted once a parameter
    assert (policy.optimizer.adam_steps(), policy.steps) == (3, 4)
    policy.train_step(rows, loss)
    assert policy.optimizer.adam_steps() == 4
    assert all(torch.equal(final[name], value) for name, value in policy.shards.parameters.items())
    with policy.weights("teacher"):
        assert all(torch.equal(straight[name], value) for name, value in policy.shards.parameters.items())
    assert all(torch.equal(a, b) for a, b in zip(reference, before, strict=True))

    def exported() -> dict:
        return {name: value.to("cpu", copy=True) for name, value in Exporter(policy.shards, read_config(model)).items()}

    report = {"before": [value.cpu() for value in before], "norms": norms, "losses": losses, "exported": exported()}
    with policy.weights("teacher"):
        report["teacher"] = exported()
    if other is not None:
        checkpoint.load(policy, other)
        policy.train_step(rows, loss)
        report["resharded"] = exported()
        with policy.weights("teacher"):
            report["resharded_teacher"] = exported()
    return report


@pytest.fixture(scope="module", params=["qwen3", "qwen2"])  # tied, and untied with biases
def serial(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    layers = 5 if request.param == "qwen2" else 4  # five do not come out even over stages, nor over their pieces
    model = make_tiny_model(folder / "model", request.param, tied=request.param == "qwen3", vocab=VOCAB, layers=layers)
    return model, run_distributed(train_and_report, 1, model, {}, folder / "checkpoint")[0], folder / "checkpoint"


def test_logprobs_equal_transformers_on_each_sequence_of_a_packed_row(serial):
    from transformers import AutoModelForCausalLM

    model, report, _ = serial
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for row, found in zip(_rows(0, 1), report["before"], strict=True):
        bounds = row.cu_seqlens.tolist()
        parts = [reference(row.input_ids[None, a:b]).logits[0] for a, b in itertools.pairwise(bounds)]
        expected = torch.cat(parts).log_softmax(-1).gather(1, row.targets[:, None])[:, 0]
        torch.testing.assert_close(found, expected.detach(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_on_two_ranks_equals_one_process(serial, layout, tmp_path):
    model, expected, checkpoint = serial
    for found in run_distributed(train_and_report, 2, model, LAYOUTS[layout], tmp_path / "checkpoint", checkpoint):
        check_close(found, expected)
        for name, value in expected["exported"].items():
            # From the one process's checkpoint the same step differs by rounding alone.
            torch.testing.assert_close(found["resharded"][name], value, rtol=0, atol=2e-5, msg=name)
            torch.testing.assert_close(
                found["resharded_teacher"][name], expected["teacher"][name], rtol=0, atol=1e-6, msg=name
            )


def check_close(found, expected):
    """Two reports of the same training are equal but for rounding."""
    assert found["norms"] == pytest.approx(expected["norms"], rel=4e-5)
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert found["exported"].keys() == expected["exported"].keys()
    for name, value in expected["exported"].items():
        # Adam divides a gradient by its own size: where that is nearly zero, rounding decides where a weight goes.
        difference = (found["exported"][name] - value).abs()
        assert difference.max() <= 1e-3 and (difference > 1e-4).float().mean() <= 1e-3, name


def swap_bf16(model, parallel):
    policy = _policy(model, parallel, "bfloat16")
    rows = _rows(policy.topology.dp_rank, policy.topology.dp_size)

    def loss(given, row):
        return -logprobs(given, row).sum() / 96, {}

    for _ in range(2):
        policy.train_step(rows, loss)
    swaps_hold(policy)
    returns_from_the_host(policy)
    policy.train_step(rows, loss)
    swaps_hold(policy)


@pytest.mark.parametrize("layout", ["tp2_sp", "dp2"])
def test_a_bf16_student_is_back_bit_for_bit(tmp_path, layout):
    model = make_tiny_model(tmp_path / "model", "qwen3", tied=True, vocab=VOCAB, layers=2, dtype=torch.bfloat16)
    run_distributed(swap_bf16, 2, model, LAYOUTS[layout])
