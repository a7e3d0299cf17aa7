"""The science example: the paper's numbers in its configurations, and the real questions where they are at hand."""

import itertools
import json
from pathlib import Path

import pytest

from examples.science.short_answers import REQUEST, main
from megatron_srpo.config import DataConfig, check, load_config
from megatron_srpo.data import load_rows
from megatron_srpo.rewards import resolve
from tests.unit.test_config_check import QWEN3_8B, SMOLLM2

FOLDER = Path(__file__).resolve().parents[2] / "examples/science"
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
QWEN3_4B = QWEN3_8B | {"hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True}

# SRPO, arXiv 2604.02288: hyperparameter table, and §2–3 for the clips.
PAPER = {
    "rollout": {"rollout_batch_size": 32, "n_samples_per_prompt": 8, "max_response_length": 8192, "temperature": 1.0},
    "data": {"max_prompt_length": 2048},
    "train": {"prompts_per_mini_batch": 32},
    "teacher": {"mode": "ema", "update_rate": 0.05, "max_prompt_length": 10240},
    "optimizer": {"lr": 5e-6},
    "eval": {"n_samples": 16},
    "algorithm": {
        "name": "srpo", "success_reward_threshold": 0.5, "advantage_std": False, "clip_ratio_low": 0.2,
        "clip_ratio_high": 0.28, "distillation_topk": 100, "distillation_tail": True, "divergence_alpha": 0.5,
        "distill_ratio_clip": 2.0, "beta": 1.0, "rollout_correction": "truncate", "rollout_correction_cap": 2.0,
        "kl_loss_coef": 0.0, "entropy_coef": 0.0,
    },
}  # fmt: skip


@pytest.mark.parametrize(("name", "hf"), [("srpo_qwen3_8b", QWEN3_8B), ("srpo_qwen3_4b", QWEN3_4B)])
def test_the_papers_hyperparameters_fit_one_node_of_eight_gpus(name, hf):
    config = load_config(FOLDER / f"{name}.toml")
    found = {part: {key: getattr(getattr(config, part), key) for key in keys} for part, keys in PAPER.items()}
    assert found == PAPER
    assert name.removeprefix("srpo_").removeprefix("qwen3_").upper() in config.model.path
    check(config, hf, 8)


@pytest.mark.parametrize("size", ["8b", "4b"])
@pytest.mark.parametrize(
    ("algorithm", "rate", "prompts", "beta"), [("grpo", 1e-6, 8, 0.0), ("sdpo", 1e-5, 32, 0.0), ("srpo", 5e-6, 32, 1.0)]
)
def test_the_baselines_named_at_the_head_of_a_file_are_the_papers_columns(size, algorithm, rate, prompts, beta):
    path = FOLDER / f"srpo_qwen3_{size}.toml"
    label = f"#   {algorithm.upper()}: "
    overrides = [line.removeprefix(label) for line in path.read_text().splitlines() if line.startswith(label)]
    assert len(overrides) == (algorithm != "srpo")  # SRPO is the file itself
    config = load_config(path, " ".join(overrides).split())
    check(config, QWEN3_8B if size == "8b" else QWEN3_4B, 8)
    assert (config.algorithm.name, config.optimizer.lr) == (algorithm, rate)
    assert (
        config.train.prompts_per_mini_batch,
        (config.algorithm.distillation.beta if config.algorithm.needs.teacher else 0.0),
    ) == (prompts, beta)


def test_the_laptop_configuration_fits_smollm2_on_two_ranks_by_pipeline_or_three_by_tensor():
    path, tensor = FOLDER / "science_smollm2_cpu.toml", "--parallel.tensor_model_parallel_size=3"
    check(load_config(path), SMOLLM2, 2)
    check(load_config(path, [tensor, "--parallel.pipeline_model_parallel_size=1"]), SMOLLM2, 3)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data sets are not here")
@pytest.mark.parametrize(
    ("split", "count"),
    [("chemistry_train", 1890), ("chemistry_test", 210), ("material_train", 841), ("material_test", 94)],
)
def test_real_questions_load_and_only_the_right_letter_is_rewarded(split, count):
    rows, report = load_rows(str(SHARED / f"sciknoweval/{split}.jsonl"), DataConfig(train="unused"))
    assert report.rows == len(rows) == count
    mcq = resolve("mcq", {})
    for row in itertools.islice(rows, 0, None, 7):
        rewards = {letter: mcq(f"<reasoning>x</reasoning>\n<answer>\n{letter}\n</answer>", row.answer, {}).score
                   for letter in "ABCD"}  # fmt: skip
        assert rewards == {letter: float(letter == row.answer) for letter in "ABCD"}


def test_a_question_becomes_a_conversation_with_two_shown_answers(tmp_path):
    row = {"prompt": f"What?\n\nA: x\nB: y\n{REQUEST}", "system": "reason", "answer": "B", "kind": "mcq", "idx": 3}
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).write_text(json.dumps(row) + "\n")
    assert main([str(tmp_path), str(tmp_path / "out")]) == 0
    (example,), _ = load_rows(str(tmp_path / "out/train.jsonl"), DataConfig(train="unused"))
    assert [m["role"] for m in example.messages] == ["user", "assistant"] * 2 + ["user"]
    assert example.messages[-1]["content"] == "What?\n\nA: x\nB: y" and example.answer == "B"


def test_without_prepared_rows_the_cure_is_named(tmp_path, capsys):
    assert main([str(tmp_path / "absent"), str(tmp_path / "out")]) == 1
    assert "run python -m megatron_srpo prepare-data first" in capsys.readouterr().err
