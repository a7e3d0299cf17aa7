"""Contradictions: each refused with its cure, and the sound configuration beside it accepted."""

from __future__ import annotations

import json

import pytest

from megatron_srpo.config import Config, check, read_model_folder, require_tokenizer_folder
from megatron_srpo.config.check import contradictions
from megatron_srpo.core.errors import ConfigError

# The numbers of Qwen3-8B's config.json.
QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "num_hidden_layers": 36,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 12288,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "rope_scaling": None,
    "attention_bias": False,
    "hidden_act": "silu",
}
QWEN3_30B_A3B = {
    **QWEN3_8B,
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
SMOLLM2 = {
    **QWEN3_8B,
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "intermediate_size": 1536,
    "vocab_size": 49152,
}


def configured(**changes):
    """A sound configuration with dotted changes, written section__key."""
    tree = {"model": {"path": "m"}, "data": {"train": "t.jsonl"}}
    for name, value in changes.items():
        section, _, key = name.partition("__")
        tree.setdefault(section, {})[key] = value
    return Config.model_validate(tree)


def told(hf=None, world=None, splits=(), **changes):
    return "\n".join(contradictions(configured(**changes), hf, world, splits=splits))


def test_a_sound_configuration_passes_all_checks():
    check(configured(parallel__tensor_model_parallel_size=4, parallel__sequence_parallel=True), QWEN3_8B, 8)


@pytest.mark.parametrize(
    ("changes", "key", "cure"),
    [
        ({"lora__path": "somewhere"}, 'lora.path = "somewhere": lora.rank is 0', "set lora.rank"),
        ({"lora__rank": 8, "lora__path": "nowhere"}, 'lora.path = "nowhere"', "name the folder of a peft adapter"),
        ({"lora__rank": 8, "lora__targets": []}, "lora.targets = []", '["attention", "mlp"]'),
        ({"lora__rank": 8, "model__fp8": "hybrid"}, 'model.fp8 = "hybrid"', "lora.rank = 0"),
        (  # the routers have no adapters
            {"lora__rank": 8, "train__moe_aux_loss_coef": 0.001},
            "train.moe_aux_loss_coef = 0.001: with adapters the routers are not trained",
            "set it to 0, or lora.rank = 0",
        ),
        (
            {"lora__rank": 8, "lora__dropout": 0.1, "lora__targets": ["experts"]},
            "lora.dropout = 0.1",
            'remove "experts"',
        ),
        ({"train__prompts_per_mini_batch": 5}, "train.prompts_per_mini_batch = 5", "1, 2, 4, 8, 16, 32"),
        ({"train__prompts_per_mini_batch": 64}, "train.prompts_per_mini_batch = 64", "0 for the whole batch"),
        (  # it weighs a group of one 0, whatever teaches
            {"rollout__n_samples_per_prompt": 1, "algorithm__name": "scsdpo", "algorithm__use_feedback": True},
            "rollout.n_samples_per_prompt = 1",
            "sample at least 2",
        ),
        ({"rollout__n_samples_per_prompt": 1}, "rollout.n_samples_per_prompt = 1", "sample at least 2"),
        (
            {"rollout__n_samples_per_prompt": 1, "algorithm__name": "sdpo"},
            "rollout.n_samples_per_prompt = 1",
            "algorithm.use_feedback = true",
        ),
        (
            {"train__max_tokens_per_gpu": 1000, "algorithm__name": "grpo"},
            "train.max_tokens_per_gpu = 1000",
            "10240 tokens",
        ),
        ({"train__max_tokens_per_gpu": 18431}, "train.max_tokens_per_gpu = 18431", "raise the budget to 18432"),
        ({"teacher__max_prompt_length": 2048}, "teacher.max_prompt_length = 2048", "0 for 10240"),
        ({"rollout__top_p": 0.9}, "rollout.top_p = 0.9", "set 1.0"),
        ({"rollout__top_k": 20}, "rollout.top_k = 20", "set 0"),
        ({"rollout__max_num_batched_tokens": 255}, "rollout.max_num_batched_tokens = 255", "raise it to at least that"),
        ({"eval__n_samples": 16, "eval__temperature": 0}, "eval.n_samples = 16", "set n_samples = 1"),
        ({"algorithm__rollout_correction_cap": 0.5}, "algorithm.rollout_correction_cap = 0.5", "set 1 or more"),
        (
            {"algorithm__rollout_correction_cap": 1.0, "algorithm__rollout_correction": "mask"},
            "algorithm.rollout_correction_cap = 1.0",
            "set 1.05 or more",
        ),
        (
            {"algorithm__rollout_correction_cap": 1.04, "algorithm__rollout_correction": "sequence_mask"},
            "algorithm.rollout_correction_cap = 1.04",
            "set 1.05 or more",
        ),
        (
            {"reward__mcq_format": "lenient", "reward__functions": {"mcq": "mine:score"}},
            'reward.mcq_format = "lenient"',
            "remove one of them",
        ),
        ({"algorithm__distill_ratio_clip": 0.5}, "algorithm.distill_ratio_clip = 0.5", "0 for no ratio"),
        (
            {"algorithm__distillation_topk": 1, "algorithm__distillation_tail": False},
            "algorithm.distillation_tail = false",
            "raise distillation_topk",
        ),
        ({"optimizer__min_lr": 1.0}, "optimizer.min_lr = 1.0", "lower it"),
        ({"optimizer__warmup_steps": 101}, "optimizer.warmup_steps = 101", "only 100 optimizer steps"),
        ({"eval__every": 5}, "eval.every = 5", "data.test is empty"),
        ({"checkpoint__keep_best": "accuracy"}, 'checkpoint.keep_best = "accuracy"', 'like "eval/accuracy"'),
        (
            {"checkpoint__keep_best": "-reward"},
            'checkpoint.keep_best = "-reward"',
            "no checkpoint would be kept",
        ),
        ({"checkpoint__keep_best": "-eval/loss"}, 'checkpoint.keep_best = "-eval/loss"', "a multiple of eval.every"),
        ({"rollout__max_staleness": 1}, "rollout.max_staleness = 1", 'rollout.placement = "servers"'),
        (
            {"rollout__max_staleness": 1, "rollout__placement": "servers", "algorithm__rollout_correction": "off"},
            "rollout.max_staleness = 1",
            'algorithm.rollout_correction = "truncate"',
        ),
        (
            {"rollout__max_staleness": 1, "rollout__placement": "servers", "rollout__max_refills": 2},
            "rollout.max_refills = 2",
            "rollout.max_staleness = 0",
        ),
        (
            {"rollout__partial_tokens": 64},
            "rollout.partial_tokens = 64: a response that goes on",
            "rollout.max_staleness is 0; set that to at least 1",
        ),
        ({"rollout__partial_groups": 4}, "rollout.partial_groups = 4", "or set rollout.partial_tokens"),
        (
            {"rollout__max_staleness": 1, "rollout__partial_tokens": 64, "algorithm__rollout_correction": "off"},
            "rollout.max_staleness = 1",
            'algorithm.rollout_correction = "truncate"',
        ),
        (
            {"rollout__max_staleness": 1, "rollout__partial_tokens": 64, "rollout__max_refills": 2},
            "rollout.max_refills = 2",
            "rollout.max_staleness = 0",
        ),
        (
            {"rollout__max_staleness": 1, "rollout__partial_tokens": 64, "rollout__placement": "servers"},
            "rollout.partial_tokens = 64: servers generate ahead",
            'rollout.placement = "colocated"',
        ),
        (
            {"rollout__max_staleness": 2, "rollout__partial_tokens": 64, "rollout__partial_groups": 65},
            "rollout.partial_groups = 65",
            "set at most 64, or raise max_staleness",
        ),
        (
            {"rollout__max_staleness": 1, "rollout__partial_tokens": 64, "rollout__max_response_length": 64},
            "rollout.partial_tokens = 64: is not below rollout.max_response_length = 64",
            "or set 0",
        ),
        ({"rollout__servers": ["http://a:1"]}, "rollout.servers", 'set it to "servers"'),
        (
            {"rollout__placement": "servers", "rollout__servers": ["a:1"]},
            'rollout.servers: "a:1" is not the address',
            "http://HOST:PORT",
        ),
        (
            {"rollout__placement": "servers", "rollout__servers": ["http://a:1"] * 2},
            "rollout.servers",
            "lists one server twice",
        ),
        (
            {"rollout__placement": "servers", "rollout__server_port": 65535, "rollout__num_servers": 2},
            "rollout.server_port = 65535",
            "lower it",
        ),
        (
            {"train__stop_on_collapse": True, "train__collapse_share": 0},
            "train.stop_on_collapse = true",
            "set a share",
        ),
        ({"algorithm__distill_decay": 5}, "algorithm.distill_decay = 5: full distillation never ends", "leave it out"),
        (
            {"algorithm__name": "sdpo", "algorithm__kl_loss_coef": 0.1},
            "algorithm.kl_loss_coef = 0.1: it regularises the policy gradient, and sdpo has none",
            "leave it out",
        ),
        ({"algorithm__name": "scsdpo", "algorithm__entropy_coef": 0.1}, "algorithm.entropy_coef = 0.1", "scsdpo has"),
        (
            {"algorithm__teachers": ["none", "sibling"]},
            'algorithm.teachers: "none" always has something to show',
            'let "none" be the last',
        ),
        (
            {"algorithm__teachers": ["none"], "algorithm__use_feedback": True},
            'algorithm.use_feedback: "none" always has something to show',
            'let "none" be the last',
        ),
        (
            {"parallel__virtual_pipeline_model_parallel_size": 2},
            "parallel.virtual_pipeline_model_parallel_size = 2",
            "set it to 1",
        ),
        ({"parallel__sequence_parallel": True}, "parallel.sequence_parallel = true", "set it to false"),
        ({"model__recompute_layers": 2}, "model.recompute_layers = 2", 'recompute to "full"'),
        ({"model__fp8": "hybrid", "run__device": "cpu"}, 'model.fp8 = "hybrid"', "use a GPU"),
        ({"model__fp8": "e4m3", "model__dtype": "float32"}, 'model.fp8 = "e4m3"', 'model.dtype = "bfloat16"'),
        (
            {"rollout__sleep_while_training": True, "run__device": "cpu"},
            "rollout.sleep_while_training = true",
            "set it to false",
        ),
        (
            {"train__offload_while_generating": True},
            "train.offload_while_generating = true",
            "set rollout.sleep_while_training = true",
        ),
        (
            {"train__offload_while_generating": True, "rollout__placement": "servers"},
            "train.offload_while_generating = true",
            "set it to false",
        ),
    ],
)
def test_a_contradiction_is_told_with_key_value_and_cure(changes, key, cure):
    text = told(**changes)
    assert text.startswith(key) and cure in text and text.count("\n") == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"train__prompts_per_mini_batch": 8},
        {"train__max_tokens_per_gpu": 18432},
        {"train__max_tokens_per_gpu": 10240, "algorithm__name": "grpo"},
        {"rollout__n_samples_per_prompt": 1, "algorithm__name": "sdpo", "algorithm__use_feedback": True},
        {"eval__n_samples": 16, "eval__temperature": 0.6, "eval__top_p": 0.9},
        {"eval__every": 5, "data__test": "x.jsonl"},
        {"eval__every": 5, "data__test": "x.jsonl", "checkpoint__keep_best": "eval/accuracy"},
        {"checkpoint__keep_best": "critic/score/mean"},
        {"optimizer__warmup_steps": 400, "train__prompts_per_mini_batch": 8},
        {"algorithm__rollout_correction_cap": 0.5, "algorithm__rollout_correction": "off"},
        {"algorithm__rollout_correction_cap": 1.0},
        {"algorithm__rollout_correction_cap": 1.05, "algorithm__rollout_correction": "mask"},
        {"algorithm__distill_ratio_clip": 0.0},
        {"algorithm__distillation_topk": 1},
        {"algorithm__distillation_topk": 2, "algorithm__distillation_tail": False},
        {"algorithm__name": "grpo", "teacher__max_prompt_length": 100},
        {"model__dtype": "float32", "run__device": "cuda"},
        {"rollout__placement": "servers", "rollout__servers": ["http://[::1]:80", "http://node-3:8000/"]},
        {"rollout__placement": "servers", "rollout__max_staleness": 2},
        {"rollout__max_staleness": 1, "rollout__partial_tokens": 64},
        {"rollout__max_staleness": 2, "rollout__partial_tokens": 64, "rollout__partial_groups": 64},
    ],
)
def test_what_only_resembles_a_contradiction_passes(changes):
    assert told(**changes) == ""


@pytest.mark.parametrize(
    ("hf", "changes", "expected"),
    [
        (
            SMOLLM2,
            {"parallel__tensor_model_parallel_size": 2},
            "num_attention_heads = 9, num_key_value_heads = 3; every rank needs whole heads and key-value heads: "
            "choose one of 1, 3",
        ),
        (QWEN3_8B, {"parallel__tensor_model_parallel_size": 16}, "num_key_value_heads = 8; every rank"),
        (
            QWEN3_8B,
            {"parallel__pipeline_model_parallel_size": 13, "parallel__virtual_pipeline_model_parallel_size": 3},
            "13 pipeline stages in 3 pieces each take at least 39 layers, but the model's num_hidden_layers = 36",
        ),
        (QWEN3_8B, {"rollout__tensor_parallel_size": 3}, "rollout.tensor_parallel_size = 3: does not fit"),
        (QWEN3_8B, {"algorithm__distillation_topk": 151937}, "the model's vocabulary has 151936 tokens"),
        (
            {**QWEN3_8B, "max_position_embeddings": 18000},
            {},
            "with the teacher's enriched prompt (10240 tokens) this exceeds the model's max_position_embeddings",
        ),
        (
            {**QWEN3_8B, "max_position_embeddings": 8192},
            {"algorithm__name": "grpo"},
            "with the data.max_prompt_length (2048 tokens)",
        ),
        ({**QWEN3_8B, "head_dim": 48}, {"run__device": "cpu"}, "the model has head_dim 48"),
        (
            {"architectures": ["MambaForCausalLM"]},
            {},
            "is for MambaForCausalLM; supported are Qwen3",
        ),
        ({}, {}, "is for no architecture"),
        ({"architectures": ["LlamaForCausalLM"]}, {}, "has no number for num_hidden_layers, hidden_size"),
        ({**QWEN3_8B, "rope_scaling": {"type": "yarn", "factor": 4}}, {}, 'of kind "yarn" needs original_max'),
        ({**QWEN3_8B, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, {}, 'rotary embedding "dynamic"'),
        ({**QWEN3_8B, "rope_parameters": {"partial_rotary_factor": 0.5}}, {}, "partial_rotary_factor"),
        (
            {**QWEN3_8B, "rope_scaling": {"type": "linear", "factor": 4}, "rope_parameters": {"rope_type": "default"}},
            {},
            "rope_scaling and rope_parameters scale differently",
        ),
        ({**QWEN3_8B, "rope_scaling": {"type": "linear", "rope_type": "default"}}, {}, 'and type "linear"; keep'),
        ({**QWEN3_8B, "rope_scaling": {"type": "linear", "factor": 0}}, {}, "needs factor, each a number above 0"),
        (
            {**QWEN3_8B, "rope_parameters": {"full_attention": {"rope_type": "yarn"}}},
            {},
            "has full_attention; expected",
        ),
        ({**QWEN3_8B, "rope_scaling": {"factor": 4.0}}, {}, 'rope_scaling of kind "default" has factor'),
        ({**QWEN3_8B, "rope_scaling": "yarn"}, {}, "rope_scaling is no table"),
        (
            {**QWEN3_8B, "rope_theta": 1e6, "rope_parameters": {"rope_theta": 1e4}},
            {},
            "rope_theta is given twice in its config.json: 1e+06 in the top, 10000 in rope_parameters",
        ),
        ({**QWEN3_8B, "partial_rotary_factor": 0.5}, {}, "partial_rotary_factor is not 1"),
        ({**QWEN3_8B, "rotary_emb_base": 5e5}, {}, "rotary_emb_base is set"),
        ({**QWEN3_8B, "layer_types": ["sliding_attention"]}, {}, 'layer_types has "sliding_attention"'),
        ({**QWEN3_8B, "logit_scale": 0.5}, {}, "logit_scale is 0.5"),
        ({**QWEN3_30B_A3B, "num_local_experts": 64}, {}, "num_experts is 128 and num_local_experts is 64"),
        ({**QWEN3_8B, "attention_bias": True}, {}, "attention_bias is true"),
        ({**QWEN3_8B, "use_sliding_window": True}, {}, "use_sliding_window is true"),
        (QWEN3_8B, {"parallel__expert_model_parallel_size": 2}, "the model has no experts; set it to 1"),
        (QWEN3_8B, {"parallel__expert_tensor_parallel_size": 2}, "the model has no experts; set it to 1"),
        (QWEN3_8B, {"train__moe_aux_loss_coef": 0.001}, "the model has no experts; set it to 0"),
        (QWEN3_8B, {"rollout__routing_replay": "rollout"}, "the model has no experts; set it to"),
        (QWEN3_8B, {"rollout__routing_replay": "old"}, "the model has no experts; set it to"),
        (
            QWEN3_30B_A3B,
            {"teacher__routing_replay": True, "rollout__routing_replay": "old"},
            "the engine returns no experts; set it to false",
        ),
        (QWEN3_30B_A3B, {"parallel__expert_model_parallel_size": 3}, "128 experts; choose one of 1, 2, 4, 8"),
        (
            QWEN3_30B_A3B,
            {"parallel__expert_tensor_parallel_size": 5},
            "moe_intermediate_size = 768; choose one of 1, 2, 3",
        ),
        (
            {**QWEN3_30B_A3B, "moe_intermediate_size": 776},
            {"rollout__tensor_parallel_size": 16},
            "rollout.tensor_parallel_size = 16: does not divide the model's moe_intermediate_size = 776",
        ),
        (QWEN3_30B_A3B, {"parallel__tensor_model_parallel_size": 2}, "sequence_parallel = false: with experts"),
        (
            {**QWEN3_30B_A3B, "num_experts": None, "moe_intermediate_size": None},
            {},
            "has no number for moe_intermediate_size and num_experts",
        ),
        ({**QWEN3_30B_A3B, "num_experts_per_tok": 1}, {}, "leaves its router without a gradient"),
        ({**QWEN3_30B_A3B, "hidden_size": 2000}, {"run__device": "cpu"}, "multiples of 32 with experts"),
        ({**QWEN3_8B, "hidden_act": "gelu"}, {}, 'hidden_act is "gelu"'),
        ({**QWEN3_8B, "quantization_config": {"bits": 4}}, {}, "quantized"),
    ],
)
def test_a_model_that_does_not_fit_is_told(hf, changes, expected):
    text = told(hf=hf, **changes)
    assert expected in text and text.count("\n") == 0


@pytest.mark.parametrize(
    ("hf", "changes"),
    [
        (SMOLLM2, {"parallel__tensor_model_parallel_size": 3, "parallel__pipeline_model_parallel_size": 2}),
        (QWEN3_8B, {"rollout__tensor_parallel_size": 16}),  # the engine may repeat key-value heads
        ({**QWEN3_8B, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, {}),
        ({**QWEN3_8B, "rope_theta": 1e6, "rope_scaling": {"type": "default"}, "rope_parameters": None}, {}),
        ({**QWEN3_8B, "layer_types": ["full_attention"], "logit_scale": None, "num_experts": None}, {}),
        ({**QWEN3_8B, "architectures": ["Qwen2ForCausalLM"]}, {}),
        (
            QWEN3_30B_A3B,
            {
                "parallel__expert_model_parallel_size": 8,
                "parallel__tensor_model_parallel_size": 4,
                "parallel__sequence_parallel": True,
                "train__moe_aux_loss_coef": 0.001,
            },
        ),
        # No layer has the dense width: it need not be divisible.
        ({**QWEN3_30B_A3B, "intermediate_size": 7}, {"rollout__tensor_parallel_size": 4}),
        ({**QWEN3_8B, "num_key_value_heads": None, "head_dim": None}, {"run__device": "cpu"}),
        (QWEN3_8B, {"algorithm__name": "grpo", "algorithm__distillation_topk": 10**6}),
        ({**QWEN3_8B, "max_position_embeddings": 18432}, {}),
    ],
)
def test_a_model_that_fits_passes(hf, changes):
    assert told(hf=hf, **changes) == ""


@pytest.mark.parametrize(
    ("world", "changes", "expected"),
    [
        (4, {"parallel__expert_model_parallel_size": 8}, "= 8 ranks, but 4 ranks were started; start a multiple of 8"),
        (
            3,
            {"parallel__tensor_model_parallel_size": 2},
            "3 ranks were started; start a multiple of 2 (python -m megatron_srpo.torchrun --np",
        ),
        (1, {"parallel__pipeline_model_parallel_size": 4}, "but 1 rank was started; start a multiple of 4"),
        (6, {"parallel__tensor_model_parallel_size": 4}, "megatron_srpo.torchrun --nproc-per-node 8"),
        (
            6,
            {"rollout__tensor_parallel_size": 4},
            "one engine takes 4 ranks, but 6 ranks were started",
        ),
    ],
)
def test_a_number_of_ranks_that_does_not_fit_is_told(world, changes, expected):
    assert expected in told(world=world, **changes)


def test_all_contradictions_come_in_one_error():
    config = configured(rollout__top_p=0.5, eval__every=1, parallel__tensor_model_parallel_size=3)
    with pytest.raises(ConfigError, match="this configuration: 4 problems") as caught:
        check(config, QWEN3_8B, 8)
    assert str(caught.value).count("\n  ") == 4


def test_data_files_are_looked_for_where_the_command_needs_them(tmp_path):
    there, absent = tmp_path / "a.jsonl", str(tmp_path / "b.jsonl")
    there.write_text("{}")
    files = {"data__train": [str(there), absent], "data__test": absent}
    assert told(**files) == ""
    assert told(splits=("train",), **files).count("no such file") == 1
    assert told(splits=("train", "test"), **files).count("no such file") == 2
    assert "data.test: is empty" in told(splits=("test",), data__train=str(there))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("rows.csv", "expected a .jsonl, .json or .parquet file"),
        ("empty.jsonl", "is empty; expected one row per line"),
        ("folder", "is a folder; name its .jsonl, .json or .parquet files"),
        ("x" * 300 + ".jsonl", "no such file"),  # longer than a name may be
    ],
)
def test_a_file_that_cannot_be_data_is_told(tmp_path, name, expected):
    (tmp_path / "rows.csv").write_text("prompt,answer\n")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "folder").mkdir()
    assert expected in told(splits=("train",), data__train=str(tmp_path / name))


def test_an_output_folder_that_cannot_be_is_told(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("{}")

    def of(folder):
        return told(splits=("train",), data__train=str(file), run__output_dir=str(folder))

    assert of(tmp_path) == of(tmp_path / "not/yet/there") == ""
    assert "is a file; name a folder" in of(file)
    assert f"{file} is a file; name a folder" in of(file / "below")
    assert 'run.output_dir = "": is empty' in of("")


@pytest.mark.parametrize("key", ["path", "tokenizer"])
def test_a_model_that_the_export_would_replace_is_refused_at_once(tmp_path, key):
    (tmp_path / "run/hf").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "run/hf")
    (tmp_path / "rows.jsonl").write_text("{}\n")
    for named in (tmp_path / "run/hf", tmp_path / "run/../run/hf/", tmp_path / "link"):
        changes = {"run__output_dir": str(tmp_path / "run"), f"model__{key}": str(named)}
        text = told(splits=("train",), data__train=str(tmp_path / "rows.jsonl"), **changes)
        assert f"model.{key}" in text and "into which this run writes its trained model" in text


def test_an_output_folder_without_permission_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write everywhere
    assert f"this user may not write in {tmp_path}" in told(splits=("train",), run__output_dir=str(tmp_path / "new"))


def test_a_tilde_is_the_users_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    config = configured(run__output_dir="~/run", model__path="~/model", model__tokenizer="~/tokenizer")
    assert configured(checkpoint__fallback_dir="~/disk").fallback_folder.startswith("/home/ada/disk/")
    assert config.run.output_dir == "/home/ada/run"
    assert (config.model.path, config.model.tokenizer) == ("/home/ada/model", "/home/ada/tokenizer")


# ---- the model folder ------------------------------------------------------------------------------------------------


def weights(data, length=12):
    """A safetensors file of one tensor that should have `length` bytes."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [length // 4], "data_offsets": [0, length]}}).encode()
    return len(header).to_bytes(8, "little") + header + data


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_8B))
    (tmp_path / "model.safetensors").write_bytes(weights(b"x" * 12))
    return tmp_path


def test_a_whole_folder_gives_its_configuration(folder):
    assert read_model_folder(str(folder)) == QWEN3_8B


def refused(folder):
    with pytest.raises(ConfigError) as caught:
        read_model_folder(str(folder))
    return str(caught.value)


def test_a_folder_that_is_not_there_is_told_with_the_way_to_fetch_it(tmp_path):
    assert "no such folder" in refused(tmp_path / "x") and "hf download" in refused("Qwen/Qwen3-8B")


def test_a_tokenizer_that_is_no_folder_is_told_with_the_cure(tmp_path):
    (tmp_path / "file").write_text("")
    for given, what in (("nope", "no such folder (looked from "), (str(tmp_path / "file"), "is a file. Expected")):
        with pytest.raises(ConfigError) as caught:
            require_tokenizer_folder(given)
        assert f'model.tokenizer = "{given}": {what}' in str(caught.value) and "Leave the key out" in str(caught.value)
    require_tokenizer_folder("")
    require_tokenizer_folder(str(tmp_path))


def test_a_folder_without_configuration_is_told(folder):
    (folder / "config.json").rename(folder / "other.json")
    assert "has no config.json" in refused(folder)
    assert "in its folder hf" not in refused(folder)
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").write_text("{}")
    assert "there is one in its folder hf" in refused(folder)


def test_a_broken_configuration_is_told(folder):
    (folder / "config.json").write_text("{")
    assert "cannot be read as JSON" in refused(folder)
    (folder / "config.json").write_text("[]")
    assert "expected a JSON object" in refused(folder)


def test_missing_weights_are_told_and_pickled_ones_are_to_be_converted(folder):
    (folder / "model.safetensors").write_bytes(b"")
    assert "has no weights" in refused(folder) and "Fetch the model again" in refused(folder)
    (folder / "pytorch_model.bin").write_bytes(b"x")
    assert "pytorch_model.bin" in refused(folder) and "save_pretrained" in refused(folder)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (weights(b"x" * 5), "bytes, and its header tells of"),
        (weights(b"x" * 20), "bytes, and its header tells of"),
        (weights(b"")[:30], "ends after 30 bytes, inside its header"),
        (b"x", "ends after 1 bytes, inside its header"),
        (b"\xff" * 100, "is not a safetensors file"),
        ((8).to_bytes(8, "little") + b"not json", "is not a safetensors file"),
        ((7).to_bytes(8, "little") + b'{"a":1}', "is not a safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "git lfs pull"),
    ],
)
def test_a_weight_file_that_is_not_whole_is_told_by_its_header(folder, content, expected):
    (folder / "model.safetensors").write_bytes(content)
    assert expected in refused(folder) and "model.safetensors" in refused(folder)


def test_an_unfinished_download_is_told(folder):
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "1 of the 2 weight files" in refused(folder) and "model-00002-of-00002.safetensors" in refused(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    assert "is not an index" in refused(folder)


def test_single_and_sharded_weights_side_by_side_are_refused_and_both_are_named(folder):
    shard = "model-00001-of-00002.safetensors"
    (folder / shard).write_bytes(weights(b"x" * 12))
    assert f"has both model.safetensors and {shard}" in refused(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    assert "has both model.safetensors and model.safetensors.index.json" in refused(folder)
    (folder / "model.safetensors").unlink()
    read_model_folder(str(folder))


def test_a_second_file_of_weights_which_vllm_would_read_too_is_refused(folder):
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    (folder / "old.safetensors").write_bytes(weights(b"y" * 12))
    _, files, *_ = DefaultModelLoader(LoadConfig())._prepare_weights(str(folder), None, None, False, None)
    assert len(files) == 2, "else the refusal has no reason any more"
    assert "has both model.safetensors and old.safetensors" in refused(folder)
    assert "move old.safetensors to another folder" in refused(folder)


def test_weights_in_mistrals_own_format_which_vllm_would_read_are_refused(folder):
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    (folder / "consolidated.safetensors").write_bytes(weights(b"y" * 12))
    _, files, *_ = DefaultModelLoader(LoadConfig())._prepare_weights(str(folder), None, None, False, None)
    assert files == [str(folder / "consolidated.safetensors")], "else the refusal has no reason any more"
    assert "has consolidated.safetensors" in refused(folder) and "--exclude 'consolidated*.safetensors'" in refused(
        folder
    )


def test_an_old_index_beside_a_newer_single_file_is_not_taken_for_an_unfinished_download(folder):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}  # its files are gone
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "has both" in refused(folder) and "download" not in refused(folder)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"template": "{question}{solution}{hint}"}, r"teacher.template: unknown placeholder \{hint\}"),
        ({"template": "{question}{0}{solution}"}, "unknown placeholder"),
        ({"template": "{question.__class__}{solution}"}, "unknown placeholder"),
        ({"template": "{question!r}{solution}"}, "write the name alone"),
        ({"template": "{question:>9}{solution}"}, "write the name alone"),
        ({"template": "{question}"}, r"\{solution\} is missing"),
        ({"template": "{solution}"}, r"\{question\} is missing"),
        ({"template": "{question}{solution}{solution}"}, "twice"),
        ({"template": "{question}{solution} {"}, "placeholders are"),
        ({"solution_section": "here"}, r"teacher.solution_section: \{solution\} is missing"),
        ({"feedback_section": "{solution}"}, "teacher.feedback_section: unknown"),
    ],
)
def test_a_wrong_template_is_refused(changes, complaint):
    with pytest.raises(ConfigError, match=complaint):
        check(configured(**{f"teacher__{key}": value for key, value in changes.items()}))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"teacher__instruction": "Think again."}, r"teacher.instruction: the teacher never reads it"),
        ({"teacher__feedback_section": "{feedback}!"}, r"teacher.feedback_section: the teacher never reads it"),
        ({"algorithm__use_feedback": True}, r"teacher.template: it has no \{feedback\}"),
    ],
)
def test_a_text_for_the_teacher_that_no_template_shows_is_refused(changes, complaint):
    changes = {"algorithm__name": "srpo", **changes}
    check(configured(**changes))
    with pytest.raises(ConfigError, match=complaint):
        check(configured(**changes, teacher__template="{question}{solution}"))


def test_settings_of_environments_that_cannot_be_meant_are_refused():
    settings = {"environment__classes": {"talk": "tools"}}
    check(configured(**settings))
    for key, value, complaint in (
        ("max_turn_tokens", 10**6, "environment.max_turn_tokens = 1000000: is above rollout.max_response_length"),
        ("memory_mib", 1, "environment.memory_mib = 1: an episode cannot run"),
        ("variables", ["KEY=secret"], "environment.variables: 'KEY=secret' is not the name of a variable"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            check(configured(**settings, **{f"environment__{key}": value}))


def test_attempts_beyond_the_turns_of_an_episode_are_refused():
    def of(kind, attempts, turns):
        return told(
            environment__classes={"code": kind}, environment__arguments={"code": {"attempts": attempts}},
            environment__max_turns=turns,
        )  # fmt: skip

    assert "environment.arguments.code.attempts = 4: an episode is cut after environment.max_turns = 3" in of(
        "python", 4, 3
    )
    assert of("python", 3, 3) == of("mine.py:Mine", 4, 3) == of("python", "many", 3) == ""


def test_feedback_beside_a_solution_needs_feedback():
    both = {"teacher__feedback_with_solution": True}
    for name in ("srpo", "sdpo"):
        assert "teacher.feedback_with_solution = true" in told(algorithm__name=name, **both)
        assert told(algorithm__name=name, algorithm__use_feedback=True, **both) == ""
    assert told(algorithm__name="sdpo", algorithm__teachers=["sibling", "feedback"], **both) == ""
    assert told(algorithm__name="grpo", **both) == ""  # it has no teacher; the file may serve several methods


def test_replaying_experts_for_the_teacher_needs_experts():
    with pytest.raises(ConfigError, match=r"teacher.routing_replay = true: the model has no experts"):
        check(configured(teacher__routing_replay=True), QWEN3_8B)


def test_adapters_need_projections_that_the_model_has():
    assert "the model has no experts" in told(QWEN3_8B, lora__rank=8, lora__targets=["attention", "experts"])
    assert 'write "experts"' in told(QWEN3_30B_A3B, lora__rank=8)
    for targets in (["attention"], ["attention", "experts"]):
        assert "lora" not in told(QWEN3_30B_A3B, lora__rank=8, lora__targets=targets)
    mixed = {**QWEN3_30B_A3B, "mlp_only_layers": [0]}
    deep = {"lora__rank": 8, "parallel__pipeline_model_parallel_size": 2}
    for targets in (["mlp"], ["experts"], ["up_proj"]):  # a stage may have none of these layers
        assert "a pipeline stage without any adapter is not" in told(mixed, **deep, lora__targets=targets)
        assert "lora" not in told(mixed, lora__rank=8, lora__targets=targets)
    for targets in (["attention"], ["mlp", "experts"], ["q_proj", "mlp"]):
        assert "lora" not in told(mixed, **deep, lora__targets=targets)
    assert "lora" not in told(QWEN3_8B, **deep, lora__targets=["mlp"])
    assert "lora" not in told(QWEN3_8B, lora__rank=8) + told(QWEN3_8B, lora__targets=["experts"])


def test_adapters_larger_than_the_weights_are_refused_and_one_target_needs_no_list():
    assert "lora.rank = 5000: is above the model's hidden size, 4096" in told(QWEN3_8B, lora__rank=5000)
    assert configured(lora__rank=8, lora__targets="attention").lora.targets == ["attention"]


def test_a_folder_that_is_no_adapter_is_told(tmp_path):
    assert "has no adapter_config.json" in told(lora__rank=4, lora__path=str(tmp_path))
    assert "no such folder" in told(lora__rank=4, lora__path=str(tmp_path / "absent"))


def test_an_adapter_is_not_taken_for_a_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "is a peft adapter, not a model. Name its base model" in refused(tmp_path)
