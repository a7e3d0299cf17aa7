"""A Hugging Face folder into shards and back, for every family, naming and split; and what broken folders get."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_srpo.bridge import BridgeError, Exporter, load_hf_weights, read_config, weight_table
from megatron_srpo.core.errors import UserError
from megatron_srpo.families import ModelShape, family_of, unsupported
from tests.tiny_models import FAMILIES, make_tiny_model
from tests.tiny_shards import empty_shards

SIZES = {"hidden": 48, "layers": 2, "heads": 12, "kv_heads": 4, "head_dim": 6, "ffn": 28, "vocab": 37}
SIZES |= {"experts": 3, "expert_ffn": 20, "dense_layers": (0,)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(family, tied) → folder, made on demand."""
    made = {}

    def folder(family="qwen3", tied=True):
        if (family, tied) not in made:
            path = tmp_path_factory.mktemp(f"{family}-{tied}")
            made[family, tied] = make_tiny_model(path, family, tied=tied, **SIZES)
        return made[family, tied]

    return folder


@pytest.fixture
def broken(folders, tmp_path):
    """A private copy of a sound folder, to be broken."""
    shutil.copytree(folders(), tmp_path / "model")
    return tmp_path / "model"


def loaded(folder, **layout):
    shards = empty_shards(read_config(folder), **layout)
    load_hf_weights(shards, folder)
    return shards


def undo(folder, ranks):
    """Full tensors from the shards of all tensor-parallel ranks of one stage, over which experts are split too."""
    table = weight_table(read_config(folder), ranks[0].padded_vocab_size)
    full = {}
    for name in ranks[0].parameters:
        mapped = table.lookup(name)
        if mapped.exported:
            parts = [rank.parameters[name].detach() for rank in ranks]
            full.update(zip(mapped.hf_names, mapped.rule.from_shards(parts), strict=True))
    return full


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("transformer_engine", [False, True], ids=["local", "te"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama", "qwen3_moe"])
def test_folder_to_shards_to_folder_is_bitwise(folders, family, tied, transformer_engine, tp):
    folder = folders(family, tied)
    layout = {"transformer_engine": transformer_engine, "pad_to": 4, "tp_size": tp, "etp_size": tp}
    ranks = [loaded(folder, tp_rank=rank, etp_rank=rank, **layout) for rank in range(tp)]
    expected = load_file(folder / "model.safetensors")
    full = undo(folder, ranks)
    assert sorted(full) == sorted(expected)  # a tied head is not exported
    assert all(torch.equal(full[name], expected[name]) for name in expected)


@pytest.mark.parametrize("transformer_engine", [False, True], ids=["local", "te"])
def test_an_expert_parallel_rank_loads_its_own_experts_whole(folders, transformer_engine):
    shards = loaded(
        folders("qwen3_moe"), tp_rank=1, tp_size=2, ep_rank=2, ep_size=3, transformer_engine=transformer_engine
    )
    weights = load_file(folders("qwen3_moe") / "model.safetensors")
    found = {name: value for name, value in shards.parameters.items() if "experts" in name}
    up_or_gate, down = found.values()
    expert = "model.layers.1.mlp.experts.2."
    assert torch.equal(up_or_gate, torch.cat([weights[f"{expert}{part}_proj.weight"] for part in ("gate", "up")]))
    assert torch.equal(down, weights[f"{expert}down_proj.weight"])


def test_the_hubs_name_for_the_number_of_experts_is_read_too(folders, tmp_path):
    shutil.copytree(folders("qwen3_moe"), tmp_path / "hub")
    config = json.loads((tmp_path / "hub/config.json").read_text())
    config["num_experts"] = config.pop("num_local_experts")  # as transformers writes it
    (tmp_path / "hub/config.json").write_text(json.dumps(config))
    shards = empty_shards(read_config(folders("qwen3_moe")))
    load_hf_weights(shards, tmp_path / "hub")
    expected = loaded(folders("qwen3_moe"))
    assert all(torch.equal(value, expected.parameters[name]) for name, value in shards.parameters.items())


def test_every_parameter_is_written_and_padding_is_zero(folders):
    shards = loaded(folders(), tp_rank=1, tp_size=2, pad_to=16)  # 64 rows for 37: rank 1 has 5 real ones
    assert all(parameter.isfinite().all() for parameter in shards.parameters.values())
    assert shards.parameters["embedding.word_embeddings.weight"][5:].eq(0).all()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_pipeline_stage_loads_its_own_layers_and_the_last_one_its_head(folders, tied):
    folder = folders("qwen3", tied)
    stage = loaded(folder, pp_rank=1, pp_size=2)
    weights = load_file(folder / "model.safetensors")
    head = weights["model.embed_tokens.weight" if tied else "lm_head.weight"]
    assert torch.equal(stage.parameters["output_layer.weight"], head)
    down = stage.parameters["decoder.layers.1.mlp.linear_fc2.weight"]
    assert torch.equal(down, weights["model.layers.1.mlp.down_proj.weight"])
    assert not any("layers.0" in name for name in stage.parameters)


def test_weights_are_cast_to_the_parameters_dtype(folders):
    shards = loaded(folders(), dtype=torch.bfloat16)
    norm = load_file(folders() / "model.safetensors")["model.norm.weight"]
    assert torch.equal(shards.parameters["decoder.final_layernorm.weight"], norm.bfloat16())


def test_a_sharded_folder_loads_like_a_single_file(tmp_path, folders):
    sharded = make_tiny_model(tmp_path / "sharded", max_shard_size="20KB", **SIZES)
    assert not (sharded / "model.safetensors").exists()
    one, many = loaded(folders()), loaded(sharded)
    assert all(torch.equal(one.parameters[name], many.parameters[name]) for name in one.parameters)


def test_without_parallelism_the_export_is_a_view_of_the_parameters(folders):
    shards = loaded(folders())
    items = dict(Exporter(shards, read_config(folders())).items())
    shards.parameters["decoder.final_layernorm.weight"].data.fill_(3.0)
    assert items["model.norm.weight"].eq(3).all()


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("decoder.layers.1.mlp.linear_fc3.weight", "decoder.layers.1.mlp.linear_fc"),
        ("decoder.layers.0.self_attention.linear_qkv.bias", "decoder.layers.0.self_attention.linear_qkv.weight"),
        ("decoder.layers.7.mlp.linear_fc1.weight", "decoder.layers.7.mlp.linear_fc1.weight"),  # there are two layers
    ],
)
def test_a_parameter_without_a_rule_is_refused_with_the_nearest(folders, name, nearest):
    shards = empty_shards(read_config(folders()))
    shards.parameters[name] = torch.nn.Parameter(torch.zeros(4, 4))
    with pytest.raises(BridgeError) as refused:
        load_hf_weights(shards, folders())
    assert repr(name) in str(refused.value) and nearest in str(refused.value)
    with pytest.raises(BridgeError, match="no rule"):
        Exporter(shards, read_config(folders()))


@pytest.mark.parametrize(
    ("part", "nearest"),
    [
        ("local_experts.3.linear_fc1.weight", "local_experts.3.linear_fc1.weight"),  # there are three experts
        ("weight1", "experts.linear_fc2.weight1"),  # of Megatron's grouped product without Transformer Engine
    ],
)
def test_an_expert_without_a_rule_is_refused_with_the_nearest(folders, part, nearest):
    table = weight_table(read_config(folders("qwen3_moe")), 37)
    with pytest.raises(BridgeError, match=rf"2 layers, 3 experts.*nearest known name is .*{nearest}"):
        table.lookup(f"decoder.layers.1.mlp.experts.{part}")


def test_an_unknown_architecture_is_refused_with_the_supported_ones():
    with pytest.raises(UserError, match=r"'Qwen3NextForCausalLM'.*Qwen2ForCausalLM, LlamaForC.*nearest"):
        family_of({"architectures": ["Qwen3NextForCausalLM"]})
    assert family_of({"model_type": "llama"}).name == "llama"
    with pytest.raises(UserError, match="None"):
        family_of({})


def rewrite(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def reconfigure(folder, **values):
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "has no weights: expected model.safetensors"),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            r"only as pytorch_model.bin.*save_pretrained",
        ),
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\x00" * 40), "not a complete safetensors file"),
        (
            lambda f: rewrite(f, lambda w: w.pop("model.layers.1.mlp.up_proj.weight")),
            r"no tensor 'model.layers.1.mlp.up_proj.weight'.*nearest.*model.layers",
        ),
        (
            lambda f: rewrite(f, lambda w: w.update({"model.norm.weight": torch.zeros(41)})),
            r"model.norm.weight .* has shape \[41\], config.json implies \[48\]",
        ),
        (
            lambda f: rewrite(f, lambda w: w.update({"model.norm.weight": torch.zeros(48, dtype=torch.int8)})),
            "stored as I8.*Quantised",
        ),
        (
            lambda f: rewrite(f, lambda w: w.update({"model.layers.1.self_attn.o_proj.bias": torch.zeros(48)})),
            r"1 tensor\(s\) .* does not know.*o_proj.bias.*attention_bias",
        ),
        (
            lambda f: (
                (f / "model.safetensors").rename(f / "model-00002-of-00002.safetensors"),
                (f / "model.safetensors.index.json").write_text(
                    json.dumps({"weight_map": {"model.embed_tokens.weight": "model-00001-of-00002.safetensors"}})
                ),
            ),
            "lacks model-00001-of-00002.safetensors.*incomplete",
        ),
    ],
    ids=["none", "bin", "no config", "bad json", "truncated", "missing", "shape", "int8", "extra", "half a download"],
)
def test_a_broken_folder_gets_one_clear_message(broken, damage, message):
    shards = empty_shards(read_config(broken))
    damage(broken)
    with pytest.raises(BridgeError, match=message):
        load_hf_weights(shards, broken)


def test_a_config_with_other_layers_than_the_weights_is_refused(broken):
    reconfigure(broken, num_hidden_layers=1)
    with pytest.raises(BridgeError, match=r"does not know, the first is 'model\.layers\.1"):
        load_hf_weights(empty_shards(read_config(broken)), broken)


def test_a_path_that_is_no_folder_is_refused(tmp_path, folders):
    with pytest.raises(BridgeError, match="expected a Hugging Face model folder"):
        load_hf_weights(empty_shards(read_config(folders())), tmp_path / "nowhere")


def test_a_head_of_tied_models_that_is_in_the_folder_all_the_same_is_ignored(broken):
    rewrite(broken, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    load_hf_weights(empty_shards(read_config(broken)), broken)


@pytest.mark.parametrize("rows", [37, 38], ids=["other values", "another shape"])
def test_a_head_of_its_own_contradicts_tied_embeddings_and_is_refused(broken, rows):
    rewrite(broken, lambda w: w.update({"lm_head.weight": torch.ones(rows, 48)}))
    with pytest.raises(BridgeError, match=r"tie_word_embeddings = true, but .* own lm_head.weight.*set tie_word_emb"):
        load_hf_weights(empty_shards(read_config(broken)), broken)


def test_a_dense_mlp_in_a_layer_with_experts_is_refused_as_unread(folders, tmp_path):
    shutil.copytree(folders("qwen3_moe"), tmp_path / "model")  # layer 0 is dense, layer 1 has experts
    shards = empty_shards(read_config(tmp_path / "model"))
    name = "model.layers.1.mlp.gate_proj.weight"
    rewrite(tmp_path / "model", lambda w: w.update({name: torch.ones(28, 48)}))
    with pytest.raises(BridgeError, match=f"does not know, the first is '{name}'"):
        load_hf_weights(shards, tmp_path / "model")


def test_a_tensor_that_the_index_does_not_name_is_refused(broken):
    names = list(load_file(broken / "model.safetensors"))
    index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
    rewrite(broken, lambda w: w.update({"lm_head.weight": torch.ones(37, 48)}))
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BridgeError, match=r"holds 'lm_head.weight', which model.safetensors.index.json does not name"):
        load_hf_weights(empty_shards(read_config(broken)), broken)


def test_a_tensor_in_two_files_without_an_index_is_refused(broken):
    (broken / "model.safetensors").rename(broken / "model-00001-of-00002.safetensors")
    save_file({"model.norm.weight": torch.ones(48)}, broken / "model-00002-of-00002.safetensors")
    with pytest.raises(BridgeError, match=r"'model.norm.weight' in both model-00001-of-00002.*and model-00002-of"):
        load_hf_weights(empty_shards(read_config(broken)), broken)


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama", "mistral", "qwen3_moe"])
@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {},
        {"type": "default"},
        {"type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        {"rope_type": "dynamic", "factor": 4.0},
    ],
)
@pytest.mark.parametrize("parameters", [None, {"rope_type": "default", "rope_theta": 5e5}, {"rope_type": "default"}])
@pytest.mark.parametrize("base", [None, 5e5, 7e5])
def test_a_rotary_embedding_is_either_refused_or_the_one_that_transformers_computes(family, scaling, parameters, base):
    config_class, model_class = FAMILIES[family]
    given = {"architectures": [model_class.__name__], "hidden_size": 64, "num_attention_heads": 4}
    given |= {"num_hidden_layers": 2, "intermediate_size": 8, "vocab_size": 7, "max_position_embeddings": 64}
    given |= {"rms_norm_eps": 1e-6, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    given |= {"num_experts": 4} if family == "qwen3_moe" else {"sliding_window": None}
    spelled = {"rope_scaling": scaling, "rope_parameters": parameters, "rope_theta": base}
    given |= {key: copy.deepcopy(value) for key, value in spelled.items() if value is not None}
    refused = unsupported(copy.deepcopy(given))
    theirs = config_class(**given).rope_parameters
    if not refused:
        assert ModelShape.from_hf(given | spelled).rope_kind == theirs["rope_type"]
        assert ModelShape.from_hf(given | spelled).rope_theta == theirs["rope_theta"]
    elif parameters is None or not scaling:  # nothing is given twice
        assert theirs["rope_type"] == "dynamic" or (parameters and base not in (None, parameters.get("rope_theta")))
