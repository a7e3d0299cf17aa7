"""Dropout draws the same numbers again: in a second run, under recomputation, and on every rank that must agree."""

from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

from tests.distributed.test_policy import VOCAB, _rows, logprobs, scored
from tests.distributed_harness import run_distributed
from tests.tiny_models import make_tiny_model

LAYOUTS = {
    "tp2": {"tensor_model_parallel_size": 2},
    "tp2_sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
}


def _two_steps(path, topology, seed, **sections):
    """A policy after two steps."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_srpo.bridge import load_weights, read_config
    from megatron_srpo.config import Config
    from megatron_srpo.mcore.policy import Policy

    config = Config(data={"train": "unused"}, **sections)
    model = config.model.path
    load = partial(load_weights, hf_dir=model, lora=config.lora)
    policy = Policy(config, read_config(model), topology, path, load, total_steps=2)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)

    def loss(given, row):
        return -logprobs(given, row).sum() / 96, {}

    for _ in range(2):
        policy.train_step(_rows(0, 1), loss)
    return policy


def _copies(tensors):
    return {name: value.detach().clone() for name, value in tensors.items()}


def _train(model, parallel, path, topology, *, seed, dropout=0.2, recompute="none"):
    """This rank's parameters after two steps."""
    settings = {"hidden_dropout": dropout, "attention_dropout": dropout, "recompute": recompute}
    policy = _two_steps(
        path, topology, seed, model={"path": str(model), "dtype": "float32", **settings}, optimizer={"lr": 1e-3},
        parallel=parallel,
    )  # fmt: skip
    return _copies(policy.shards.parameters)


def _runs(model, parallel, train=_train):
    from megatron_srpo.config import ParallelConfig
    from megatron_srpo.mcore import groups
    from megatron_srpo.mcore.device import choose_device

    path = choose_device("cpu", 0)
    topology = groups.initialize(ParallelConfig(**parallel), path, seed=1, timeout_minutes=2)
    train = partial(train, model, parallel, path, topology)
    return {
        "first": train(seed=1),
        "again": train(seed=1),
        "recomputed": train(seed=1, recompute="full"),
        "another seed": train(seed=2),
        "none": train(seed=1, dropout=0.0),
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dropout_is_reproducible(tmp_path, layout):
    model = make_tiny_model(tmp_path / "model", tied=False, vocab=VOCAB)
    ranks = run_distributed(_runs, 2, model, LAYOUTS[layout])
    for found in ranks:
        for name, value in found["first"].items():
            assert torch.equal(value, found["again"][name]), name
            assert torch.equal(value, found["recomputed"][name]), name
            assert not torch.equal(value, found["none"][name]), name
            assert not torch.equal(value, found["another seed"][name]), name
    for name in (name for name in ranks[0]["first"] if "norm" in name):  # replicated: their gradients must agree
        assert torch.equal(ranks[0]["first"][name], ranks[1]["first"][name]), name


def _adapted(model, parallel, path, topology, *, seed, dropout=0.2, recompute="none"):
    """This rank's adapters after two steps."""
    policy = _two_steps(
        path, topology, seed, model={"path": str(model), "dtype": "float32", "recompute": recompute},
        lora={"rank": 4, "dropout": dropout}, optimizer={"lr": 1e-2}, parallel=parallel,
    )  # fmt: skip
    return _copies(policy.shards.adapters)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dropout_of_adapters_is_reproducible(tmp_path, layout):
    model = make_tiny_model(tmp_path / "model", tied=False, vocab=VOCAB)
    ranks = run_distributed(partial(_runs, train=_adapted), 2, model, LAYOUTS[layout])
    for found in ranks:
        for name, value in found["first"].items():
            assert torch.equal(value, found["again"][name]), name
            # The order of a sum may differ there; another mask would change a factor by the learning rate.
            torch.testing.assert_close(value, found["recomputed"][name], rtol=0, atol=1e-4, msg=name)
            assert not torch.equal(value, found["none"][name]), name
            assert not torch.equal(value, found["another seed"][name]), name
    for name, value in ranks[0]["first"].items():  # what is whole on every rank stays the same on every rank
        whole = name.endswith("lora_B" if ".linear_proj." in name or ".linear_fc2." in name else "lora_A")
        assert torch.equal(value, ranks[1]["first"][name]) == whole, name


def _drawn(parallel):
    """The first numbers of the generators that dropout takes: that of replicated activations, that of split ones, that
    of attention, whose heads are split."""
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    from megatron_srpo.config import ParallelConfig
    from megatron_srpo.mcore import attention, groups
    from megatron_srpo.mcore.device import choose_device

    groups.initialize(ParallelConfig(**parallel), choose_device("cpu", 0), seed=1, timeout_minutes=2)
    with get_cuda_rng_tracker().fork():
        split = torch.rand(4)
    settings = SimpleNamespace(attention_dropout=0.2, sequence_parallel=False, context_parallel_size=1)
    with patch.object(attention, "packed_causal_attention", lambda *given, **how: torch.rand(4, 1, 1)):
        layer = attention.PackedAttention(settings, 1, None, "self")
        of_heads = layer(None, None, None, None, packed_seq_params=PackedSeqParams("thd"))
    return torch.rand(4), split, of_heads


@pytest.mark.parametrize(
    ("parallel", "same"),
    [
        ({}, False),
        ({"pipeline_model_parallel_size": 2}, False),
        ({"context_parallel_size": 2}, False),
        ({"tensor_model_parallel_size": 2}, True),
    ],
)
def test_ranks_with_other_tokens_or_layers_drop_other_units(parallel, same):
    (whole, split, of_heads), (others_whole, others_split, others_heads) = run_distributed(_drawn, 2, parallel)
    assert torch.equal(whole, others_whole) == same
    assert not torch.equal(split, others_split) and not torch.equal(of_heads, others_heads)


def _scored_twice(model):
    """Log-probs of the same rows, right after a training step."""
    from megatron_srpo.config import ParallelConfig
    from megatron_srpo.mcore import groups
    from megatron_srpo.mcore.device import choose_device

    path = choose_device("cpu", 0)
    topology = groups.initialize(ParallelConfig(), path, seed=1, timeout_minutes=2)
    found = []
    for kind in ("hidden_dropout", "attention_dropout"):
        sections = {"model": {"path": str(model), "dtype": "float32", kind: 0.2}, "optimizer": {"lr": 1e-3}}
        policy = _two_steps(path, topology, 1, **sections)
        found.append([torch.cat(scored(policy, _rows(0, 1))) for _ in range(2)])
    return found


def test_a_scoring_pass_drops_nothing(tmp_path):
    (found,) = run_distributed(_scored_twice, 1, make_tiny_model(tmp_path / "model", tied=False, vocab=VOCAB))
    assert all(torch.equal(first, again) for first, again in found)
