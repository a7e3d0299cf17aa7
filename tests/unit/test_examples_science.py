"""The science example: the small model's configuration, and the real questions where they are at hand."""

import itertools
import json
from pathlib import Path

import pytest

from examples.science.short_answers import REQUEST, main
from megatron_srpo.config import DataConfig, check, load_config
from megatron_srpo.data import load_rows
from megatron_srpo.rewards import resolve
from tests.unit.test_config_check import SMOLLM2

FOLDER = Path(__file__).resolve().parents[2] / "examples/science"
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


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
