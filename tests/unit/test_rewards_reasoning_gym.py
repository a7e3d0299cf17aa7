"""Faults of the library's scorers do not reach the reward: wrong answers that it rewards, right ones that it misses."""

from __future__ import annotations

import json

import pytest
import reasoning_gym

from megatron_srpo.rewards import RewardError, resolve
from megatron_srpo.rewards import reasoning_gym as reasoning_gym_kind
from megatron_srpo.rewards.reasoning_gym import ANSWER_LIMIT

gym = resolve("reasoning_gym")


def entry_of(dataset: str, seed: int = 3) -> dict:
    """An entry as a row of a file has it."""
    return json.loads(json.dumps(reasoning_gym.create_dataset(dataset, size=1, seed=seed)[0]))


def score(dataset: str, given: str, entry: dict) -> float:
    return gym(f"<answer>{given}</answer>", entry["answer"], {"dataset": dataset, "entry": entry}).score


def puzzle(answer: str, *numbers: int, target: int = 24) -> dict:
    return {"question": "q", "answer": answer, "metadata": {"numbers": list(numbers), "target": target}}


@pytest.mark.parametrize("dataset", ["arc_agi", "rearc"])
def test_a_right_board_is_right_in_a_row_of_a_file(dataset):
    entry = entry_of(dataset)
    assert score(dataset, entry["answer"], entry) == 1.0
    assert score(dataset, entry_of(dataset, seed=4)["answer"], entry) < 0.1


@pytest.mark.parametrize(
    ("dataset", "given"),
    [
        ("coin_flip", "0"), ("coin_flip", "0."), ("complex_arithmetic", "nan"), ("complex_arithmetic", "NaN+nanj"),
        ("complex_arithmetic", "NAN"), ("game_of_life_halting", "maybe"),
    ],
)  # fmt: skip
def test_what_is_no_answer_gets_no_reward(dataset, given):
    for seed in range(4):
        entry = entry_of(dataset, seed)
        assert score(dataset, given, entry) == 0.0
        assert score(dataset, entry["answer"], entry) == 1.0


def test_the_wrong_one_of_two_answers_gets_no_reward():
    entry = entry_of("game_of_life_halting")
    wrong = "True" if entry["answer"] == "False" else "False"
    assert score("game_of_life_halting", wrong, entry) == 0.0
    assert score("game_of_life_halting", f"{entry['answer'].upper()}.", entry) == 1.0


@pytest.mark.parametrize(
    ("given", "right"),
    [
        ("4*8 - 6 - 2", True), ("(8 - 6 + 4) * (2 + 2)", False), ("6*4*1*1", False), ("6*4", False),
        ("4*8 - 6 - 2 + x - x", False),
        ("(4 + 8 + 6 + 2)*(x - x) + 24*x/x", False), ("8*6/2 + 4//4", False),
    ],
)  # fmt: skip
def test_a_puzzle_is_solved_with_its_own_numbers(given, right):
    entry = puzzle("4*8 - 6 - 2", 4, 8, 6, 2)
    assert (score("puzzle24", given, entry) == 1.0) is right
    assert (score("countdown", given, entry) == 1.0) is right


def test_a_sign_before_a_number_or_a_bracket_counts():
    entry = puzzle("5*5 - 2 + 1", 5, 5, 2, 1)
    assert score("puzzle24", "-(2 - 5*5) + 1", entry) == score("puzzle24", "+5*5 - 2 + 1", entry) == 1.0
    assert score("puzzle24", "-(5*5 - 2 + 1)", entry) < 0.1


def test_numbers_that_only_round_to_24_do_not_solve_the_puzzle():
    assert score("puzzle24", "5*5 - 1/2", puzzle("5*5 - 2/1", 5, 5, 1, 2)) == 0.0  # 24.5


@pytest.mark.parametrize(("given", "credit"), [("12", 0), ("-1", 0), ("1.5", 0), ("1", 1), ("It is 1.", 1 / 8)])
def test_a_number_that_only_contains_the_right_digits_gets_no_credit(given, credit):
    entry = {"question": "q", "answer": "1", "metadata": {}}
    assert score("gcd", given, entry) == credit


def test_partly_right_and_far_too_long_answers_say_what_is_wrong():
    entry = {"question": "q", "answer": "1", "metadata": {}}
    metadata = {"dataset": "gcd", "entry": entry}
    partly, right = (gym(f"<answer>{given}</answer>", "1", metadata) for given in ("It is 1.", "1"))
    assert partly.feedback == "The answer 'It is 1.' is not fully correct." and right.feedback is None
    for length, feedback in ((ANSWER_LIMIT, "is not fully correct."), (ANSWER_LIMIT + 1, "is far too long.")):
        verdict = gym(f"<answer>{'1 '.ljust(length, 'x')}</answer>", "1", metadata)
        assert verdict.score < 0.1 and verdict.feedback.endswith(feedback)


def test_a_scorer_without_memory_is_a_failure_and_no_wrong_answer(monkeypatch):
    def scorer(given, entry):
        raise MemoryError

    monkeypatch.setattr(reasoning_gym_kind, "_scorer", lambda dataset: scorer)
    with pytest.raises(MemoryError):
        score("gcd", "1", {"question": "q", "answer": "1", "metadata": {}})


def test_an_answer_that_a_scorer_cannot_read_is_wrong_and_no_failure():
    entry = entry_of("prime_factorization")
    assert score("prime_factorization", "I do not know", entry) == 0.0
    assert score("coin_flip", "1e999", entry_of("coin_flip")) == score("boxnet", "1", entry_of("boxnet")) == 0.0
    with pytest.raises(ValueError):
        score("prime_factorization", "I do not know", {**entry, "answer": "a broken row"})
    with pytest.raises(RewardError):
        score("prime_factorization", "2", {**entry, "metadata": None})
