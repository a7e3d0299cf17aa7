"""The shipped configurations against one table of the SRPO paper's settings: five benchmarks × methods × two models."""

from __future__ import annotations

import itertools
import re
import tomllib
from pathlib import Path

import pytest

from megatron_srpo.config import check, load_config
from tests.unit.test_config_check import QWEN3_8B

ROOT = Path(__file__).resolve().parents[2]
# Adapters take another learning rate than the paper's, which trains all weights.
BASES = [file for file in sorted((ROOT / "examples/science").glob("srpo_qwen3_*.toml")) if "lora" not in file.stem]
BENCHMARKS = sorted((ROOT / "configs/benchmark").glob("*.toml"))
METHODS = sorted((ROOT / "configs/method").glob("*.toml"))
QWEN3_4B = QWEN3_8B | {"hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True}
MARKS = ("[paper]", "[SDPO repository]", "[ours]")

# SRPO, arXiv 2604.02288: its table 3, sections 2 to 4 for the policy loss, listing 5 for the teacher's prompt.
PAPER = {
    "data.chat_template_kwargs": {"enable_thinking": False},
    "data.max_prompt_length": 2048,
    "rollout.rollout_batch_size": 32,
    "rollout.n_samples_per_prompt": 8,
    "rollout.max_response_length": 8192,
    "rollout.temperature": 1.0,
    "algorithm.clip_ratio_high": 0.28,
    "algorithm.advantage_std": False,
    "algorithm.rollout_correction": "truncate",
    "teacher.mode": "ema",
    "teacher.update_rate": 0.05,
    "teacher.template": "{question}{solution}{feedback}\n\n{instruction}",
    "teacher.solution_section": "\n\nCorrect solution:\n\n{solution}",
    "teacher.instruction": "Correctly solve the original question.",
    "optimizer.warmup_steps": 10,
    "optimizer.weight_decay": 0.01,
    "optimizer.clip_grad": 1.0,
    "eval.n_samples": 16,
    "eval.temperature": 0.6,
    "eval.top_p": 0.95,
}
DISTILLATION = {
    "algorithm.distillation_topk": 100,
    "algorithm.divergence_alpha": 0.5,
    "algorithm.distill_ratio_clip": 2.0,
}
# Columns of table 3, and the ablations of section 4.3 and figure 1b.
BY_METHOD = {
    "grpo": {"algorithm.name": "grpo", "train.prompts_per_mini_batch": 8, "optimizer.lr": 1e-6},
    "sdpo": {"algorithm.name": "sdpo", "train.prompts_per_mini_batch": 32, "optimizer.lr": 1e-5},
    "srpo": {"algorithm.name": "srpo", "train.prompts_per_mini_batch": 32, "optimizer.lr": 5e-6},
    "srpo-unweighted": {"algorithm.name": "srpo", "algorithm.entropy_beta": 0.0},
    "mix": {"algorithm.name": "mix", "algorithm.mix_lambda": 0.9},
    "sdpo-incorrect": {"algorithm.name": "sdpo", "algorithm.distill_on": "incorrect"},
    "sdpo-correct": {"algorithm.name": "sdpo", "algorithm.distill_on": "correct"},
}
BETA = {"srpo": 1.0, "sdpo": 0.0, "srpo-unweighted": 0.0, "mix": 0.0, "sdpo-incorrect": 0.0, "sdpo-correct": 0.0}
# What is ours (docs/evidence.md): SRPO, but for what these set.
OWN_METHODS = {
    "srpo-solution-handover": BY_METHOD["srpo"]
    | {"algorithm.teachers": ["sibling", "solution"], "algorithm.distill_patience": 10, "algorithm.distill_decay": 10}
}
OWN_BETA = {"algorithm.entropy_beta": -1}  # in a file: the algorithm's own value, which is the paper's
# The paper does not repeat what it takes from SDPO's code.
SDPO_REPOSITORY = {
    "data.shuffle": True,
    "algorithm.success_reward_threshold": 0.5,
    "algorithm.use_feedback": False,
    "algorithm.clip_ratio_low": 0.2,
    "algorithm.dual_clip": 3.0,
    "algorithm.distillation_tail": True,
    "algorithm.rollout_correction_cap": 2.0,
    "teacher.max_prompt_length": 10240,
    "reward.mcq_format": "lenient",
    "optimizer.schedule": "constant",
    "eval.every": 5,
}
NAMES = {"chemistry", "physics", "biology", "materials", "tooluse"}


def value_of(config, key):
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def marked(file):
    """(key, value, mark) of every line of a file that sets a key."""
    section, tree = "", tomllib.loads(file.read_text())
    for line in file.read_text().splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif match := re.match(r"(\w+) = [^#]*(?:#\s*(\[[^\]]+\]))?", line):
            yield f"{section}.{match[1]}", tree[section][match[1]], match[2]


def test_there_are_five_benchmarks_seven_methods_of_the_paper_and_one_of_ours():
    assert {file.stem for file in BENCHMARKS} == NAMES
    assert {file.stem for file in METHODS} == {*BY_METHOD, *OWN_METHODS}


@pytest.mark.parametrize("file", [*BASES, *BENCHMARKS, *METHODS], ids=lambda file: file.stem)
def test_every_value_has_its_source_and_every_source_is_true(file):
    own = BY_METHOD.get(file.stem, BY_METHOD["srpo"])
    tables = {
        "[paper]": PAPER | DISTILLATION | OWN_BETA | own,
        "[SDPO repository]": SDPO_REPOSITORY,
    }
    for key, value, mark in marked(file):
        assert mark in MARKS, key
        if mark in tables:
            assert tables[mark].get(key, "not in the table") == value, key
        else:
            assert key not in PAPER | DISTILLATION | SDPO_REPOSITORY, key


@pytest.mark.parametrize("file", BASES, ids=lambda file: file.stem)
def test_a_base_names_every_setting_of_the_paper(file):
    keys = {key for key, _, mark in marked(file) if mark != "[ours]"}
    assert keys == set(PAPER | DISTILLATION | OWN_BETA | BY_METHOD["srpo"] | SDPO_REPOSITORY)


@pytest.mark.parametrize("method", METHODS, ids=lambda file: file.stem)
@pytest.mark.parametrize("size", ["8b", "4b"])
def test_every_benchmark_and_method_is_the_papers_and_fits_one_node_of_eight_gpus(size, method):
    base, folders = ROOT / f"examples/science/srpo_qwen3_{size}.toml", set()
    expected = PAPER | SDPO_REPOSITORY | (BY_METHOD | OWN_METHODS)[method.stem]
    for benchmark in BENCHMARKS:
        config = load_config([base, benchmark, method])
        assert load_config([base, method, benchmark]) == config
        given = expected | (DISTILLATION if config.algorithm.distillation else {})
        known = [key for key in given if key.partition(".")[0] != "algorithm" or hasattr(config.algorithm, key[10:])]
        assert {key: value_of(config, key) for key in known} == {key: given[key] for key in known}
        assert method.stem == "grpo" or config.algorithm.distillation.beta == BETA.get(method.stem, 1.0)
        assert config.data.test == f"runs/data/sdpo/{benchmark.stem}/test.jsonl"
        assert config.run.output_dir == f"runs/qwen3-{size}/{benchmark.stem}/{method.stem}"
        assert config.run.name == f"qwen3-{size}-{benchmark.stem}-{method.stem}"
        folders.add(config.run.output_dir)
        check(config, QWEN3_8B if size == "8b" else QWEN3_4B, 8)
    assert len(folders) == 5


def test_a_base_alone_is_srpo_on_chemistry():
    for base, order in itertools.product(BASES, ([], ["benchmark/chemistry", "method/srpo"])):
        files = [base, *(ROOT / f"configs/{name}.toml" for name in order)]
        assert load_config(files) == load_config(base)


LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192},
}  # fmt: skip


def test_llama_is_one_more_file_and_its_scaled_rotary_embedding_is_accepted():
    base = ROOT / "examples/science/srpo_qwen3_8b.toml"
    config = load_config([base, ROOT / "configs/model/llama_3_1_8b.toml", ROOT / "configs/method/grpo.toml"])
    assert (config.run.name, config.data.chat_template_kwargs) == ("llama-3.1-8b-chemistry-grpo", {})
    check(config, LLAMA_8B, 8)


@pytest.mark.parametrize("model", ["30b_a3b", "235b_a22b"])
def test_mixtures_of_experts_use_the_engines_choice(model):
    config = load_config(ROOT / f"examples/science/srpo_qwen3_{model}.toml")
    assert config.rollout.replay(128) == "rollout" and not config.teacher.routing_replay
