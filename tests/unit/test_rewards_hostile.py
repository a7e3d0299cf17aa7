"""Model output is data: no reward evaluates it, whatever a library's own scorer would do."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import reasoning_gym

from megatron_srpo.rewards import resolve
from megatron_srpo.rewards.reasoning_gym_safety import EVALUATING, PARSING, is_arithmetic

LIBRARY = Path(reasoning_gym.__file__).parent
EVALUATORS = {"eval", "exec", "parse_expr", "sympify", "S", "literal_eval", "loads_pickle"}
gym = resolve("reasoning_gym")


def attack(mark: Path) -> str:
    """An expression that makes a folder when it is evaluated as Python."""
    return f"__import__('os').mkdir({str(mark)!r})"


@pytest.mark.parametrize("dataset", [*EVALUATING, *PARSING])
def test_an_answer_that_is_a_program_is_not_run(dataset, tmp_path):
    entry = reasoning_gym.create_dataset(dataset, size=1, seed=3)[0]
    for answer in (attack(tmp_path / "ran"), f"[{attack(tmp_path / 'ran')}]", f"x + {attack(tmp_path / 'ran')}"):
        verdict = gym(f"<answer>{answer}</answer>", entry["answer"], {"dataset": dataset, "entry": entry})
        assert verdict.score <= 0.05
    assert list(tmp_path.iterdir()) == []


def test_the_attack_works_on_the_librarys_own_scorer(tmp_path):
    dataset = reasoning_gym.create_dataset("countdown", size=1, seed=3)
    dataset.score_answer(attack(tmp_path / "ran"), dataset[0])
    assert (tmp_path / "ran").is_dir()


def test_lists_are_still_read_where_the_library_accepts_them():
    entry = reasoning_gym.create_dataset("spiral_matrix", size=1, seed=3)[0]
    as_list = "[" + ", ".join(entry["answer"].split()) + "]"
    metadata = {"dataset": "spiral_matrix", "entry": entry}
    assert gym(f"<answer>{as_list}</answer>", entry["answer"], metadata).score == 0.1


@pytest.mark.parametrize("dataset", PARSING)
def test_every_right_answer_of_the_library_counts_as_arithmetic(dataset):
    for entry in reasoning_gym.create_dataset(dataset, size=5, seed=1):
        assert is_arithmetic(entry["answer"]), entry["answer"]
        metadata = {"dataset": dataset, "entry": entry}
        assert gym(f"<answer>{entry['answer']}</answer>", entry["answer"], metadata).score == 1.0


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("2*(3 + 4.5)/x**2 - sin(x)^3", True), ("-C + exp(.5*y)", True), ("", True), ("x.is_number", False),
        ("chr(95)", False), ("eval(x)", False), ("__class__", False), ("_", False), ("x_1", False), ("x[0]", False),
        ("'a'", False), ("lambda: 1", False), ("x if y else z", False), ("1e5", True), ("x; y", False),
        ("exit()", False), ("\u0661 + 1", False), ("x\0", False), ("ｘx", False),
        ("a" * 100_000, False), ("x+" * 100_000 + "x", True),
    ],
)  # fmt: skip
def test_arithmetic_is_numbers_letters_and_known_functions(text, plain):
    assert is_arithmetic(text) is plain


def test_no_other_scorer_of_the_installed_library_evaluates_its_answer():
    """What a later version of the library adds shows here."""
    found = set()
    for file in LIBRARY.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name in ("score_answer", "_score_answer"):
                calls = [call.func for call in ast.walk(node) if isinstance(call, ast.Call)]
                names = {call.attr if isinstance(call, ast.Attribute) else getattr(call, "id", "") for call in calls}
                if names & EVALUATORS:
                    found.add(".".join(file.relative_to(LIBRARY).with_suffix("").parts))
    reads_its_own_row = {"algorithmic.number_sorting"}  # eval of the row's expected answer
    assert found - reads_its_own_row == {*EVALUATING.values(), *PARSING.values()}
