"""peft's adapter folder: written and read bit for bit, loaded by peft itself, and what other adapters get."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_srpo.bridge import BridgeError, base_checksum, load_adapter, load_hf_weights, read_config, weight_table
from megatron_srpo.bridge.peft_folder import check_adapter, write_adapter_folder
from megatron_srpo.config import LoraConfig
from tests.lora_reference import adapter_tensors, load_adapted, make_adapter
from tests.tiny_models import make_tiny_model
from tests.tiny_shards import empty_shards

SETTINGS = LoraConfig(rank=4, alpha=8.0, targets=["attention", "up_proj"])
PARTS = {"linear_qkv": ("q_proj", "k_proj", "v_proj"), "linear_proj": ("o_proj",), "linear_fc1": ("up_proj",)}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"), "llama", tied=False)


@pytest.fixture
def adapter(model, tmp_path):
    """A folder that peft wrote."""
    return make_adapter(model, tmp_path / "adapter", targets=["attention", "up_proj"])


def adapted_shards(model, tp_rank=0, tp_size=1):
    """Shards with empty adapters, as a rank has them."""
    hf = read_config(model)
    shards, heads = empty_shards(hf, tp_rank=tp_rank, tp_size=tp_size), {"q_proj": hf["num_attention_heads"]}
    for name, weight in list(shards.parameters.items()):
        layer, _, kind = name.rpartition(".")
        for part in PARTS.get(layer.rpartition(".")[2], ()) if kind == "weight" else ():
            rows, columns = weight.shape
            if "linear_qkv" in layer:
                rows = heads.get(part, hf["num_key_value_heads"]) * hf["head_dim"] // tp_size
            if "linear_fc1" in layer:
                rows //= 2
            for factor, shape in (("lora_A", (4, columns)), ("lora_B", (rows, 4))):
                shards.adapters[f"{layer}.adapters.{part}.{factor}"] = torch.full(shape, float("nan"))
    return shards


def undone(model, ranks):
    table = weight_table(read_config(model), ranks[0].padded_vocab_size)
    full = {}
    for name in ranks[0].adapters:
        mapped = table.lookup(name)
        full.update(zip(mapped.hf_names, mapped.rule.from_shards([r.adapters[name] for r in ranks]), strict=True))
    return full


@pytest.mark.parametrize("tp_size", [1, 2])
def test_an_adapter_of_peft_is_read_and_written_again_bit_for_bit(model, adapter, tmp_path, tp_size):
    ranks = [adapted_shards(model, rank, tp_size) for rank in range(tp_size)]
    for shards in ranks:
        load_adapter(shards, read_config(model), adapter, SETTINGS)
    write_adapter_folder(undone(model, ranks).items(), tmp_path / "again", SETTINGS, str(model))
    theirs = load_file(adapter / "adapter_model.safetensors")
    ours = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], value) for name, value in theirs.items())
    expected, found = (
        json.loads((folder / "adapter_config.json").read_text()) for folder in (adapter, tmp_path / "again")
    )
    assert {key: expected[key] for key in found if key != "target_modules"} == {
        key: value for key, value in found.items() if key != "target_modules"
    } | {"base_model_name_or_path": expected["base_model_name_or_path"]}
    assert set(found["target_modules"]) == set(expected["target_modules"])
    loaded = adapter_tensors(load_adapted(model, tmp_path / "again"))
    assert {f"base_model.model.{name}" for name in loaded} == set(theirs)
    for name, value in loaded.items():
        assert torch.equal(value.float(), theirs[f"base_model.model.{name}"])


def changed(folder, **keys):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


REFUSED = {
    "DoRA": ({"use_dora": True}, "use_dora = True"),
    "trained biases": ({"bias": "lora_only"}, "bias = 'lora_only'"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, r"modules_to_save = \['lm_head'\]"),
    "ranks by module": ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
    "scales by module": ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
    "some layers": ({"layers_to_transform": [0]}, "layers_to_transform"),
    "another base": ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
    "what nobody knows yet": ({"use_newest": True}, "use_newest = True"),
    "another method": ({"peft_type": "IA3"}, "peft_type = 'IA3'; expected \"LORA\""),
    "another rank": ({"r": 8}, r"the adapter has lora.rank = 8 \(this run: 4\)"),
    "another alpha": ({"lora_alpha": 16}, "lora.alpha = 16"),
    "another scale": ({"use_rslora": True}, "lora.rslora = True"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_plain_adapter_is_not_is_refused(model, adapter, case):
    keys, message = REFUSED[case]
    changed(adapter, **keys)
    shards = adapted_shards(model)
    with pytest.raises(BridgeError, match=message):
        load_adapter(shards, read_config(model), adapter, SETTINGS)
    assert all(value.isnan().all() for value in shards.adapters.values()), "nothing is changed before"


def test_other_projections_and_other_models_are_refused(model, adapter):
    hf, file = read_config(model), adapter / "adapter_model.safetensors"
    other = SETTINGS.model_copy(update={"targets": ["attention"]})
    with pytest.raises(BridgeError, match=r"up_proj.lora_A.weight', which is no factor of the projections"):
        load_adapter(adapted_shards(model), hf, adapter, other)
    tensors = load_file(file)
    name = next(name for name in tensors if "q_proj.lora_A" in name)
    save_file(tensors | {name: torch.zeros(4, 8)}, file)
    with pytest.raises(BridgeError, match=r"has shape \[4, 8\], and \[4, 64\] fits"):
        load_adapter(adapted_shards(model), hf, adapter, SETTINGS)
    del tensors[name]
    save_file(tensors, file)
    with pytest.raises(BridgeError, match=r"lacks 'model.layers.0.self_attn.q_proj.lora_A.weight'"):
        load_adapter(adapted_shards(model), hf, adapter, SETTINGS)
    file.rename(adapter / "adapter_model.bin")
    with pytest.raises(BridgeError, match="safe_serialization=True"):
        load_adapter(adapted_shards(model), hf, adapter, SETTINGS)
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(BridgeError, match=r"has no adapter_config.json"):
        load_adapter(adapted_shards(model), hf, adapter, SETTINGS)


def test_a_folder_of_something_else_is_not_replaced(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    drained = iter([("model.layers.0.self_attn.q_proj.lora_A.weight", torch.zeros(4, 8))])
    with pytest.raises(BridgeError, match="is no model folder"):
        write_adapter_folder(drained, tmp_path / "mine", SETTINGS, "base")
    assert next(drained, None) is None, "other ranks would wait"


def test_the_checksum_tells_base_models_apart(model, tmp_path):
    hf, found = read_config(model), []
    for folder in (model, make_tiny_model(tmp_path / "other", "llama", tied=False, seed=1)):
        shards = empty_shards(hf)
        load_hf_weights(shards, folder)
        found.append(base_checksum(shards, hf))
    assert found[0] != found[1] and found[0].startswith("float32:")
    shards = empty_shards(hf)
    load_hf_weights(shards, model)
    assert base_checksum(shards, hf) == found[0]
    names = [f"decoder.layers.{layer}.self_attention.linear_proj.weight" for layer in (0, 1)]
    with torch.no_grad():  # two layers exchanged: the same numbers at other places
        first, second = (shards.parameters[name] for name in names)
        held = first.clone()
        first.copy_(second)
        second.copy_(held)
    assert base_checksum(shards, hf) != found[0]


def test_an_adapter_is_checked_by_its_headers_alone(model, adapter):
    hf, file = read_config(model), adapter / "adapter_model.safetensors"
    check_adapter(adapter, hf, SETTINGS)
    tensors = load_file(file)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    save_file(tensors | {name: tensors[name][:, :1].contiguous()}, file)
    with pytest.raises(BridgeError, match=r"q_proj.lora_B.weight in .* has shape .*, and lora.rank = "):
        check_adapter(adapter, hf, SETTINGS)
    del tensors[name]
    save_file(tensors, file)
    with pytest.raises(BridgeError, match="lacks"):
        check_adapter(adapter, hf, SETTINGS)


def test_an_adapter_with_values_that_are_not_finite_is_refused(model, adapter):
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"][0, 0] = torch.nan
    save_file(tensors, file)
    with pytest.raises(BridgeError, match=r"q_proj.lora_A.weight in .* has values that are not finite"):
        load_adapter(adapted_shards(model), read_config(model), adapter, SETTINGS)
