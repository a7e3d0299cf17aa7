"""A publish into a real vLLM engine: as good as a fresh engine, and refused when it does not fit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_srpo.bridge import BridgeError
from megatron_srpo.rollout import ColocatedEngine, GenerateRequest
from megatron_srpo.rollout.vllm.layer_loading import PackedLayers, is_loaded_in_place, packed_layers
from megatron_srpo.rollout.vllm.weight_loader import LoadChecksums
from tests.tiny_engines import (
    LONG,
    SAMPLED,
    VOCAB,
    BitFlip,
    answers,
    largest_error,
    tiny_engine,
    tiny_requests,
    weights,
)
from tests.tiny_models import make_tiny_model

# The model with experts has a scaled rotary embedding; its 512 positions are 4 × 128.
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 128}
MODELS = {"tied": ("qwen3", True), "untied": ("qwen2", False)}  # the second with biases


@dataclass
class Running:
    """An engine that was started from `old`, and what a fresh engine answers on `new`."""

    engine: ColocatedEngine
    old: Path
    new: Path
    fresh: dict[str, Any]


def start(tmp_path_factory, family, tied, dtype, monkeypatch=None):
    """A Running, as a generator; two engines are started, one after the other. With `monkeypatch` vLLM finds no oneDNN
    and computes with weights as they were loaded."""
    if monkeypatch is not None:
        monkeypatch.setattr("vllm._custom_ops._supports_onednn", False)
    rope = YARN if family == "qwen3_moe" else None
    old, new = (
        make_tiny_model(folder, family, tied=tied, vocab=VOCAB, seed=seed, dtype=getattr(torch, dtype), rope=rope)
        for seed, folder in ((seed, tmp_path_factory.mktemp("model")) for seed in (1, 2))
    )
    with tiny_engine(new, dtype) as engine:
        fresh = answers(engine)
    assert not torch.distributed.is_initialized()  # a closed engine leaves nothing behind
    engine.close()  # and may be closed twice
    with tiny_engine(old, dtype) as engine:
        assert (packed(engine) == []) == (monkeypatch is not None) or dtype == "bfloat16"
        yield Running(engine, old, new, fresh)


def engine_model(engine):
    return engine._llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.get_model()


def packed(engine):
    return list(packed_layers(engine_model(engine)).values())


def publish(running, items, version=5):
    running.engine.publish(iter(items), version)
    assert running.engine._verifier.unplaced == []


def check_against_fresh(running):
    before = answers(running.engine)
    for name in ("greedy", "sampled"):
        assert all(ours != theirs for ours, theirs in zip(before[name], running.fresh[name], strict=True))
    publish(running, weights(running.new).items())
    assert answers(running.engine) == running.fresh
    publish(running, weights(running.old).items())  # again and again, and back
    assert answers(running.engine) == before
    publish(running, reversed(weights(running.new).items()))  # in any order
    assert answers(running.engine) == running.fresh


@pytest.mark.parametrize("model", MODELS)
def test_an_updated_engine_in_bf16_equals_a_fresh_one_bit_for_bit(tmp_path_factory, model):
    for running in start(tmp_path_factory, *MODELS[model], "bfloat16"):
        check_against_fresh(running)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_an_updated_engine_with_experts_equals_a_fresh_one_bit_for_bit(tmp_path_factory, dtype):
    for running in start(tmp_path_factory, "qwen3_moe", False, dtype):
        check_against_fresh(running)
        if dtype == "float32":
            assert largest_error(running.new, running.engine.generate(tiny_requests(), SAMPLED)) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(("model", "in_place"), [("untied", True), ("tied", False)])
def test_an_updated_engine_in_the_other_form_equals_a_fresh_one(tmp_path_factory, monkeypatch, model, in_place):
    for running in start(tmp_path_factory, *MODELS[model], "float32", monkeypatch if in_place else None):
        check_against_fresh(running)


@pytest.fixture(scope="module", params=[("untied", False), ("tied", True)], ids=["untied, packed", "tied, in place"])
def running(tmp_path_factory, request):
    model, in_place = request.param
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield from start(tmp_path_factory, *MODELS[model], "float32", monkeypatch if in_place else None)


@pytest.fixture
def whole(running):
    """After the test the engine takes a publish, and is then as good as a fresh one, whatever the test did to it."""
    yield list(weights(running.new).items())
    publish(running, weights(running.new).items())
    assert answers(running.engine) == running.fresh


def test_an_updated_engine_equals_a_fresh_one_bit_for_bit(running):
    check_against_fresh(running)


def test_a_published_engines_log_probs_are_those_of_transformers(running, whole):
    publish(running, whole)
    assert largest_error(running.new, running.engine.generate(tiny_requests(), SAMPLED)) < 1e-4


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_bit_that_flips_on_the_way_is_found_and_its_tensor_named(running, whole, monkeypatch, name):
    monkeypatch.setattr(running.engine, "_verifier", BitFlip(name))
    with pytest.raises(BridgeError, match=f"verification: '{name}' arrived at engine 0 with other values"):
        publish(running, whole)
    with pytest.raises(RuntimeError, match="Publish again first"):
        running.engine.generate(tiny_requests(), SAMPLED)


def test_a_parameter_that_the_engine_loads_wrongly_is_found(running, whole, monkeypatch):
    """vLLM's loader mixes up two layers: everything has arrived, and is in the wrong place."""
    first, second = (f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1))
    receive = LoadChecksums.receive

    def swapped(checksums, name, tensor):
        receive(checksums, name, tensor)
        if name in (first, second):
            other = dict(whole)[second if name == first else first]
            tensor.copy_(other.clone())

    items = [(name, tensor.clone()) for name, tensor in whole]
    monkeypatch.setattr(LoadChecksums, "receive", swapped)
    with pytest.raises(BridgeError, match=r"engine 0 does not hold in 'model.layers.0.mlp.down_proj.weight' what it"):
        publish(running, items)


def test_layers_are_packed_one_by_one_and_no_embedding_is(running, whole, monkeypatch):
    publish(running, weights(running.old).items())
    model, pack, layers = engine_model(running.engine), PackedLayers._pack, packed(running.engine)
    assert model.model.embed_tokens not in layers
    loaded = []

    def counting(self, layer):
        loaded.append(sum(other.weight.numel() > 0 for other in layers if other is not model.lm_head))
        pack(self, layer)

    monkeypatch.setattr(PackedLayers, "_pack", counting)
    publish(running, whole)
    assert len(loaded) == len(layers)
    assert not layers or (max(loaded), loaded[-1]) == (2, 0)  # by name o_proj comes amid q, k and v; the head is last
    assert all(layer.weight.numel() == 0 for layer in layers if layer is not model.lm_head)


def test_the_published_tensors_are_copied_and_belong_to_the_trainer_again(running, whole):
    publish(running, whole)
    for _, tensor in whole:
        tensor.fill_(float("nan"))
    assert answers(running.engine) == running.fresh


def test_a_publish_in_another_dtype_is_converted(running, whole):
    publish(running, [(name, tensor.double()) for name, tensor in whole])
    assert answers(running.engine) == running.fresh


def test_the_prefix_cache_forgets_the_old_weights(running, whole):
    asked = [GenerateRequest(0, sample, LONG, seed=sample) for sample in range(2)]
    publish(running, weights(running.old).items())
    running.engine.generate(asked, SAMPLED)
    publish(running, whole)
    assert largest_error(running.new, running.engine.generate(asked, SAMPLED), prompts=[LONG]) < 1e-4


def resized(items, wanted, change):
    """The items, with the tensor of `wanted` put through `change`."""
    return [(name, change(tensor) if name == wanted else tensor) for name, tensor in items]


QUERY, KEY, DOWN = (f"model.layers.1.{part}_proj.weight" for part in ("self_attn.q", "self_attn.k", "mlp.down"))
EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"


def taller(tensor):
    return torch.cat([tensor, tensor[:2]])


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (QUERY, taller),  # vLLM would take its first rows
        (KEY, lambda tensor: tensor[:-1]),
        (DOWN, lambda tensor: tensor.T),
        (EMBEDDING, taller),
        (EMBEDDING, lambda tensor: tensor[:-1]),
        (NORM, lambda tensor: tensor[None]),
    ],
    ids=["query-taller", "key-shorter", "down-transposed", "embedding-taller", "embedding-shorter", "norm-deeper"],
)
def test_a_shape_that_does_not_fit_is_refused(running, whole, name, change):
    got = list(change(dict(whole)[name]).shape)
    expected = list(dict(whole)[name].shape)
    with pytest.raises(BridgeError) as refused:
        publish(running, resized(whole, name, change))
    assert f"{name!r} was published with shape {got}: expected {expected}." in str(refused.value)
    assert "start both from the same folder" in str(refused.value)


@pytest.mark.parametrize("wrong", ["model.layers.1.self_attn.kv_proj.weight", "model.layers.2.mlp.down_proj.weight"])
def test_an_unknown_name_is_refused_and_the_nearest_known_is_named(running, whole, wrong):
    with pytest.raises(BridgeError, match=f"{wrong}', which is not in its folder. The nearest known name is 'model"):
        publish(running, [*whole[:4], (wrong, torch.zeros(2, 2)), *whole[4:]])


def test_a_name_that_comes_twice_is_refused(running, whole):
    with pytest.raises(BridgeError, match=f"{whole[3][0]}', which came before"):
        publish(running, [*whole[:4], whole[3]])


def test_a_tied_head_is_published_once_and_an_untied_one_must_come(running, whole):
    head = dict(whole)[EMBEDDING]
    if "lm_head.weight" in dict(whole):
        with pytest.raises(BridgeError, match=r"left 1 tensor.s. of the engine on old weights, .*'lm_head.weight'"):
            publish(running, [item for item in whole if item[0] != "lm_head.weight"])
    else:
        with pytest.raises(BridgeError, match=r"'lm_head.weight', which is not in its folder"):
            publish(running, [*whole, ("lm_head.weight", head)])


@pytest.mark.parametrize("name", [QUERY, KEY, DOWN, EMBEDDING, NORM])
def test_a_tensor_that_does_not_come_is_named(running, whole, name):
    with pytest.raises(BridgeError, match=f"left 1 tensor.s. of the engine on old weights, the first is '{name}'"):
        publish(running, [item for item in whole if item[0] != name])


def test_an_empty_publish_is_refused(running, whole):
    with pytest.raises(BridgeError, match=f"left {len(whole)} tensor.s. of the engine on old weights"):
        publish(running, [])


def test_after_a_failed_publish_nothing_is_generated_until_a_whole_one(running, whole):
    def failing():
        yield from whole[:7]
        raise OSError("the trainer lost a rank")

    publish(running, weights(running.old).items(), version=8)
    before = answers(running.engine)
    with pytest.raises(OSError, match=r"the trainer lost a rank"):
        publish(running, failing(), version=9)
    assert running.engine.weight_version == 8
    with pytest.raises(RuntimeError, match=r"the last publish failed: .* Publish again first"):
        running.engine.generate(tiny_requests(1), SAMPLED)
    publish(running, weights(running.old).items(), version=10)
    assert answers(running.engine) == before
    assert running.engine.weight_version == 10


def test_a_failed_publish_leaves_every_tensor_either_old_or_new(running, whole):
    """No layer is left in the memory that a layer with only some of its tensors was given to load them."""
    publish(running, weights(running.old).items())
    with pytest.raises(BridgeError):
        publish(running, [item for item in whole if item[0] != KEY])
    model = engine_model(running.engine)
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    old, new = weights(running.old), weights(running.new)
    layer = model.model.layers[1].self_attn.qkv_proj
    in_place = is_loaded_in_place(layer)

    def held(kind):
        names = [KEY.replace("k_proj", f"{part}_proj").replace("weight", kind) for part in "qkv"]
        loaded = in_place or kind == "bias"  # a packed layer's weight is complete or not
        return torch.cat([(new if loaded and name != KEY else old)[name] for name in names])

    qkv, _ = layer(torch.eye(old[KEY].shape[1]))
    if layer.bias is not None:
        assert torch.equal(layer.bias, held("bias"))
    assert torch.equal(qkv, held("weight").T + (0 if layer.bias is None else layer.bias))
    assert torch.equal(model.model.norm.weight, new[NORM])
