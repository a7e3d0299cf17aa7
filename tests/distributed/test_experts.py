"""Mixtures of experts on real gloo ranks: transformers' logits, parallel equals serial, checkpoints, load balancing."""

import dataclasses
import itertools
from functools import partial

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from megatron_srpo.core.records import Padding, Row
from megatron_srpo.families import ModelShape
from megatron_srpo.mcore.experts import _expert_layers
from megatron_srpo.mcore.replay import FREE
from tests.distributed.test_policy import VOCAB, _policy, _rows, logprobs, scored, train_and_report
from tests.distributed_harness import run_distributed
from tests.made_samples import make_sample
from tests.routed_reference import count_choices, hub_names, load
from tests.tiny_models import make_tiny_model

SHARED = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
LAYOUTS = {  # on two ranks
    "ep2": {"expert_model_parallel_size": 2},
    "ep2 over tp2 sp": SHARED | {"expert_model_parallel_size": 2},
    "etp2, tp2 sp": SHARED | {"expert_tensor_parallel_size": 2},
    "tp2 sp, experts whole on both": SHARED,
    "ep2 over cp2": {"context_parallel_size": 2, "expert_model_parallel_size": 2},
}
STAGES = {
    "pp2": {"pipeline_model_parallel_size": 2},
    "pp2, interleaved": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
}
BALANCED = ("ep2", "ep2 over tp2 sp", "ep2 over cp2")
COEFFICIENT = 0.3


def _alone(policy) -> None:
    """Give the model-parallel groups up, for the next layout."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()


def balancing_gradients(model, parallel, rows_of=_rows):
    """Hugging Face name → gradient of the load-balancing loss alone, and the routers' metrics. `rows_of` gives the rows
    of a data-parallel rank."""
    from megatron_srpo.bridge import read_config
    from tests.distributed.test_routed_objective import gradients

    policy = _policy(model, parallel, train={"moe_aux_loss_coef": COEFFICIENT})
    seen = {}
    step = policy.optimizer.step

    def capture(lr):
        seen["gradients"] = gradients(policy, read_config(model))
        return step(lr)

    policy.optimizer.step = capture
    rows = rows_of(policy.topology.dp_rank, policy.topology.dp_size)
    stats = policy.train_step(rows, lambda given, row: (logprobs(given, row).sum() * 0, {}))
    _alone(policy)
    return seen["gradients"], {name: float(metric) for name, metric in stats.metrics.items()}


def uneven_rows(*rank_and_size, filled_up):
    """Three rows of different lengths. `filled_up`: as an interleaved pipeline takes them, with an empty one more."""
    from megatron_srpo.batching import pack_rows

    draw = torch.Generator().manual_seed(3)
    ids = [torch.randint(1, VOCAB, (length,), generator=draw).tolist() for length in (40, 16, 24)]
    samples = [make_sample("a", i, given[:4], given[4:], [0.0] * (len(given) - 4)) for i, given in enumerate(ids)]
    rows = [Row((i,), len(given)) for i, given in enumerate(ids)] + ([Row((), 0)] if filled_up else [])
    return pack_rows(rows, samples, padding=Padding(rows=2 if filled_up else 1))


def replayed(model, parallel):
    """For each row of this rank: the experts that it was told, and those that were used, in a pass of every kind."""
    policy, found = _policy(model, parallel), []
    config = policy.runner.config
    config.recompute_granularity, config.recompute_method, config.recompute_num_layers = "full", "uniform", 1
    rows = _rows(policy.topology.dp_rank, policy.topology.dp_size)
    for number, row in enumerate(rows):
        row.experts = drawn_choice(row.input_ids.numel(), 100 * policy.topology.dp_rank + number)
    used = []
    policy.score(rows, lambda *given: {"logprob": logprobs(*given)}, chosen=used)
    found += [(row.experts, chosen) for row, chosen in zip(rows, used, strict=True)]
    stats = policy.train_step(rows, lambda given, row: (logprobs(given, row).sum(), {}))
    metrics = {name: float(metric) for name, metric in stats.metrics.items()}
    replays = [layer.router.router_replay for piece in policy.model for layer in _expert_layers(piece)]
    assert all(not replay.recorded and not replay.compared for replay in replays)  # nothing stays behind
    free = []
    policy.score([dataclasses.replace(row, experts=None) for row in rows], _nothing, chosen=free)
    assert all(not replay.recorded and not replay.compared for replay in replays)
    assert all(not torch.equal(a, b) for a, b in zip(used, free, strict=True))
    _alone(policy)
    return found, metrics


def _nothing(given, row):
    return {}


def drawn_choice(tokens, seed):
    """[T, 3 layers with experts, 2] different ones of 4 experts; every fifth token chooses for itself."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(tokens, 3, 4, generator=generator).argsort(-1)[..., :2].to(torch.int16)
    chosen[::5] = FREE
    return chosen


def _on_two_ranks(model, scratch):
    """What training and balancing give in every layout, and what checkpoints of one layout are in the next."""
    from megatron_srpo.bridge import Exporter, read_config
    from megatron_srpo.mcore import checkpoint

    found = {}
    for layout, parallel in LAYOUTS.items():
        found[layout] = train_and_report(model, parallel, scratch / layout.replace(" ", "-"))
        _alone(None)
    found["replay"] = {layout: replayed(model, parallel) for layout, parallel in (LAYOUTS | STAGES).items()}
    found["balancing"] = {layout: balancing_gradients(model, LAYOUTS[layout]) for layout in BALANCED}
    for name, parallel in (("uneven", SHARED), ("filled up", STAGES["pp2, interleaved"])):
        rows_of = partial(uneven_rows, filled_up=name == "filled up")
        found[name] = balancing_gradients(model, parallel, rows_of)
    for writer, reader in itertools.pairwise([*LAYOUTS, "ep2"]):
        policy = _policy(model, LAYOUTS[reader])
        checkpoint.load(policy, scratch / writer.replace(" ", "-"))
        export = Exporter(policy.shards, read_config(model))
        student = {name: value.clone() for name, value in export.items()}
        with policy.weights("teacher"):
            found[f"{writer} in {reader}"] = student, {name: value.clone() for name, value in export.items()}
        _alone(policy)
    return found


def _serial(model, unweighted, scratch):
    report = train_and_report(model, {}, scratch)
    _alone(None)
    policy = _policy(unweighted, {})
    return report | {"unweighted": scored(policy, _rows(0, 1))}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """One dense layer among four; and a model whose routers do not renormalise."""
    make = partial(make_tiny_model, family="qwen3_moe", tied=False, vocab=VOCAB, layers=4, dense_layers=(1,))
    folder = tmp_path_factory.mktemp("moe")
    return make(folder / "model"), make(folder / "unweighted", renormalise=False, experts=6, experts_per_token=3)


@pytest.fixture(scope="module")
def serial(models, tmp_path_factory):
    return run_distributed(_serial, 1, *models, tmp_path_factory.mktemp("serial"))[0]


@pytest.fixture(scope="module")
def ranks(models, tmp_path_factory):
    return run_distributed(_on_two_ranks, 2, models[0], tmp_path_factory.mktemp("parallel"))


@pytest.mark.parametrize("which", ["before", "unweighted"])
def test_logprobs_equal_transformers(models, serial, which):
    reference = load(models[which == "unweighted"], torch.float32)
    for row, found in zip(_rows(0, 1), serial[which], strict=True):
        bounds = row.cu_seqlens.tolist()
        parts = [reference(row.input_ids[None, a:b]).logits[0] for a, b in itertools.pairwise(bounds)]
        expected = torch.cat(parts).log_softmax(-1).gather(1, row.targets[:, None])[:, 0]
        torch.testing.assert_close(found, expected.detach(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_on_two_ranks_equals_one_process(serial, ranks, layout):
    for rank in ranks:
        found = rank[layout]
        assert found["norms"] == pytest.approx(serial["norms"], rel=2e-5)
        assert found["losses"] == pytest.approx(serial["losses"], rel=1e-5)
        assert found["exported"].keys() == serial["exported"].keys()
        for name, value in serial["exported"].items():
            torch.testing.assert_close(found["exported"][name], value, rtol=0, atol=2e-4, msg=name)


def test_a_checkpoint_reads_at_any_other_layout_bit_for_bit(ranks):
    read = [name for name in ranks[0] if " in " in name]
    assert len(read) == len(LAYOUTS)
    for rank in ranks:
        for name in read:
            assert all(
                torch.equal(value, ranks[0][name][which][key])
                for which in (0, 1)
                for key, value in rank[name][which].items()
            )


@pytest.mark.parametrize("layout", LAYOUTS | STAGES)
def test_the_experts_that_a_pass_is_told_are_those_it_uses_on_every_token(ranks, layout):
    """Ranks of one stage have all its layers of a row; the layers of other stages are FREE there."""
    seen, metrics = zip(*(rank["replay"][layout] for rank in ranks), strict=True)
    stages = layout in STAGES
    for rows in zip(*seen, strict=True):
        used = torch.stack([chosen for _, chosen in rows])
        if stages:
            assert not ((used >= 0).all(0)).any() and torch.equal(rows[0][0], rows[1][0])
            used = used.amax(0, keepdim=True)
        for (told, _), chosen in zip(rows, used, strict=False):
            known = told >= 0
            assert torch.equal(chosen[known], told[known]) and 0.7 < float(known.float().mean()) < 0.85
            assert bool((chosen >= 0).all()) and bool((chosen[..., 0] != chosen[..., 1]).all())
    assert metrics[0] == metrics[1]
    assert 0.5 < metrics[0]["moe/choices_differ"] < metrics[0]["rollout_corr/experts_differ"] <= 1
    assert metrics[0]["moe/dropped_fraction"] == 0


def balancing_reference(model):
    """Gradients of coefficient · Σ rows (tokens of the row ÷ all tokens) · Σ layers E · Σ_e f_e · p_e in float64."""
    reference = load(model)
    logits = {name: [] for name, m in reference.named_modules() if name.endswith("mlp.gate")}
    for name, found in logits.items():
        module = reference.get_submodule(name)
        module.register_forward_hook(lambda _, given, out, found=found: found.append(out[0]))
    counts, total, everything = count_choices(reference), 0.0, {name: [] for name in logits}
    for row in _rows(0, 1):
        for found in logits.values():
            found.clear()
        for a, b in itertools.pairwise(row.cu_seqlens.tolist()):
            reference(row.input_ids[None, a:b])
        for name, found in logits.items():
            shares = torch.cat(found).softmax(-1)
            everything[name].append(shares.detach())
            chosen = torch.zeros_like(shares).scatter(1, shares.topk(2).indices, 1.0)
            total = total + shares.shape[1] * (chosen.mean(0) / 2 * shares.mean(0)).sum() / 4  # rows of one length
    (COEFFICIENT * total).backward()
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in reference.named_parameters()}
    loads = {name: sum(passes).double() for name, passes in counts.items()}
    shares = {name: torch.cat(found).mean(0) for name, found in everything.items()}
    balance = [len(load) * float((load / load.sum() * shares[name]).sum()) for name, load in loads.items()]
    return hub_names(grads), loads, sum(balance) / len(balance)


def test_the_load_balancing_loss_and_the_load_equal_float64_whatever_the_layout(models, ranks):
    expected, loads, balance = balancing_reference(models[0])
    largest = max(float(value.abs().max()) for value in expected.values())
    assert largest > 1e-3
    ratios = [float(load.max() / load.mean()) for load in loads.values()]
    for rank, layout in itertools.product(ranks, BALANCED):
        found, metrics = rank["balancing"][layout]
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert float((found[name].double() - value).abs().max()) <= 5e-5 * largest, f"{layout}, {name}"
        assert metrics["moe/load_max_over_mean"] == pytest.approx(sum(ratios) / len(ratios))
        assert metrics["moe/load_max_over_mean_max"] == pytest.approx(max(ratios))
        assert metrics["moe/dropped_fraction"] == 0
        assert metrics["moe/balance_loss"] == pytest.approx(balance, rel=1e-5)


def test_padding_is_neither_balanced_nor_counted(ranks):
    (expected, expected_metrics), (found, metrics) = ranks[0]["uneven"], ranks[0]["filled up"]
    largest = max(float(value.abs().max()) for value in expected.values())
    assert largest > 1e-3
    for name, value in expected.items():
        assert float((found[name] - value).abs().max()) <= 5e-5 * largest, name
    for name in (name for name in expected_metrics if name.startswith("moe/")):
        assert metrics[name] == pytest.approx(expected_metrics[name], rel=1e-5), name


@pytest.mark.parametrize(("step", "dense"), [(1, []), (2, []), (3, [5]), (1, [0, 6])])
def test_the_layers_with_experts_are_transformers(step, dense):
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 8}
    sizes |= {"num_hidden_layers": 7, "intermediate_size": 16, "moe_intermediate_size": 8, "num_experts": 4}
    config = Qwen3MoeConfig(**sizes, num_experts_per_tok=2, decoder_sparse_step=step, mlp_only_layers=dense)
    with torch.device("meta"):
        layers = Qwen3MoeForCausalLM(config).model.layers
    assert ModelShape.from_hf(config.to_dict()).expert_layers == [hasattr(layer.mlp, "experts") for layer in layers]
