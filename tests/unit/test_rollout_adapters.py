"""Publishes of LoRA adapters alone, to a real engine: as good as loading peft's folder, and as merged weights."""

from __future__ import annotations

import pytest
import torch
from vllm.lora.request import LoRARequest

from megatron_srpo.bridge import BridgeError
from megatron_srpo.config import LoraConfig, RolloutConfig
from megatron_srpo.rollout import ColocatedEngine, RolloutError
from tests.lora_reference import load_adapted, make_adapter, read_folder
from tests.tiny_engines import SAMPLED, VOCAB, BitFlip, answers, largest_error, tiny_engine, tiny_requests
from tests.tiny_models import make_tiny_model

TARGETS = ["attention", "mlp"]
LORA = LoraConfig(rank=4, alpha=12.0, targets=TARGETS)  # vLLM's buffers have rank 8
EXACT = 1e-5  # nats


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("base"), vocab=VOCAB)


@pytest.fixture(scope="module")
def folders(base, tmp_path_factory):
    """Two adapters of the same settings."""
    places = [tmp_path_factory.mktemp(f"adapter-{seed}") for seed in (1, 2)]
    return [
        make_adapter(base, place, targets=TARGETS, rank=LORA.rank, alpha=12, seed=seed)
        for seed, place in enumerate(places)
    ]


def factors(folder):
    """What a trainer with this adapter publishes."""
    _, tensors = read_folder(folder)
    return [(name.removeprefix("base_model.model."), tensor) for name, tensor in tensors.items()]


@pytest.fixture(scope="class")
def engine(base):
    with tiny_engine(base, adapters=LORA) as engine:
        yield engine


class TestPublishes:
    """One engine for all, which is closed behind them: a process has one at a time."""

    def test_a_publish_equals_an_engine_that_loads_the_folder_and_the_merged_model(
        self, engine, base, folders, tmp_path
    ):
        found = []
        for version, folder in enumerate([*folders, folders[0]], 1):
            engine.publish(factors(folder), version)
            assert engine.weight_version == version
            found.append(answers(engine))
        assert found[0] == found[2] != found[1]
        ours, engine._adapter = engine._adapter, LoRARequest("folder", 7, str(folders[0]))
        assert answers(engine) == found[0], "vLLM has read the folder itself"
        engine._adapter = ours
        engine.publish(factors(folders[0]), 4)
        rollouts = engine.generate(tiny_requests(), SAMPLED)
        merged = load_adapted(base, folders[0]).merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
        assert largest_error(tmp_path / "merged", rollouts) < EXACT
        assert largest_error(base, rollouts) > 100 * EXACT, "the adapter matters"

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            (lambda items: items[1:], r"the publish lacks 1 factor\(s\), the first is"),
            (lambda items: [*items, items[0]], "which came before"),
            (lambda items: [(items[0][0], items[0][1][:1]), *items[1:]], r"was published with shape \[1, "),
            (lambda items: [("model.norm.weight", items[0][1]), *items], "which is no factor of the run's adapters"),
        ],
    )
    def test_a_wrong_publish_is_refused_and_the_next_one_heals(self, engine, folders, change, expected):
        engine.publish(factors(folders[0]), 1)
        before = answers(engine)
        with pytest.raises(BridgeError, match=expected):
            engine.publish(change(factors(folders[1])), 2)
        with pytest.raises(RuntimeError, match="the last publish failed"):
            engine.generate(tiny_requests(), SAMPLED)
        engine.publish(factors(folders[0]), 3)
        assert answers(engine) == before

    @pytest.mark.parametrize("factor", ["self_attn.v_proj.lora_A", "mlp.down_proj.lora_B"])
    def test_a_changed_bit_is_found(self, engine, folders, factor):
        engine._verifier, good = BitFlip(f"model.layers.1.{factor}.weight"), engine._verifier
        try:
            with pytest.raises(BridgeError, match=r"verification: .* arrived at engine 0 with other values"):
                engine.publish(factors(folders[0]), 1)
        finally:
            engine._verifier = good

    @pytest.mark.parametrize("layer", ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"])
    def test_a_changed_buffer_of_the_engine_is_found(self, engine, folders, layer, monkeypatch):
        loader = engine._llm.llm_engine.model_executor.driver_worker.worker._weight_loader
        activate = type(loader)._activate

        def spoil(self):
            activate(self)
            self._manager.modules[f"model.layers.0.{layer}"].lora_b_stacked[-1][0].view(-1)[0] += 1

        monkeypatch.setattr(type(loader), "_activate", spoil)
        with pytest.raises(BridgeError, match=f"engine 0 does not hold in 'model.layers.0.{layer}.lora_B"):
            engine.publish(factors(folders[0]), 1)

    def test_new_adapters_answer_as_the_base(self, engine, base, folders):
        items = [
            (name, torch.zeros_like(tensor) if "lora_B" in name else tensor) for name, tensor in factors(folders[0])
        ]
        engine.publish(items, 1)
        assert largest_error(base, engine.generate(tiny_requests(), SAMPLED)) < EXACT


@pytest.mark.parametrize("drafts", [0, 3])
def test_some_projections_and_other_scales(base, tmp_path, drafts):
    """Layers without adapters stay vLLM's own. Drafts are verified with the adapters."""
    lora = LoraConfig(rank=2, alpha=3.0, targets=["q_proj", "v_proj"], rslora=True)
    folder = make_adapter(base, tmp_path / "adapter", targets=["q_proj", "v_proj"], rank=2, alpha=3, rslora=True)
    with tiny_engine(base, adapters=lora, speculative_tokens=drafts) as engine:
        engine.publish(factors(folder), 1)
        rollouts = engine.generate(tiny_requests(), SAMPLED)
        assert engine._verifier.unplaced == []
    assert bool(drafts) == any(rollout.accepted for rollout in rollouts)
    load_adapted(base, folder).merge_and_unload().save_pretrained(tmp_path / "merged")
    assert largest_error(tmp_path / "merged", rollouts) < EXACT


def test_a_model_with_experts_is_refused_on_a_cpu(tmp_path):
    base = make_tiny_model(tmp_path / "base", "qwen3_moe", vocab=VOCAB)
    lora = LoraConfig(rank=4, targets=["attention"])
    assert lora.published(experts=8) is None and lora.published(experts=0) is lora
    with pytest.raises(RolloutError, match="on a CPU, vLLM serves no adapters for models with experts"):
        ColocatedEngine(
            hf_dir=str(base), dtype="float32", rollout=RolloutConfig(), max_model_len=64, seed=0, adapters=lora
        )
