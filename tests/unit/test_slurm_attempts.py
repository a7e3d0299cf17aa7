"""Attempts in vain are counted over requeues; a newer checkpoint, and nothing else, ends the count."""

from __future__ import annotations

import pytest

from slurm.attempts import Attempts


@pytest.fixture
def output(tmp_path):
    return tmp_path / "run"


def attempt(output, *, saves: int | None = None, limit: int = 3, job: str = "7") -> bool:
    """One attempt of a fresh process; whether another one may follow."""
    attempts = Attempts(output, limit, job)
    attempts.begin()
    if saves is not None:
        (output / f"checkpoints/step_{saves:08d}").mkdir(parents=True)
    return not attempts.exhausted


def test_three_attempts_without_a_checkpoint_are_enough(output):
    assert [attempt(output) for _ in range(3)] == [True, True, False]


def test_a_newer_checkpoint_starts_the_count_anew(output):
    said = [attempt(output, saves=saves) for saves in (None, None, 1, None, None, 2, None, None, None)]
    assert said == [True] * 7 + [True, False]


def test_a_job_that_is_submitted_anew_starts_the_count_anew(output):
    assert [attempt(output, job=job) for job in ("7", "7", "8", "8", "8")] == [True, True, True, True, False]


def test_one_attempt_may_be_the_limit(output):
    assert not attempt(output, limit=1)
    assert attempt(output, saves=4, limit=1)


def test_an_attempt_that_ended_without_a_word_counts(output):
    for _ in range(2):
        Attempts(output, 3, "7").begin()  # the host died: nobody asked afterwards
    assert not attempt(output)


def test_a_checkpoint_that_was_made_before_a_silent_end_counts_for_it(output):
    attempts = Attempts(output, 3, "7")
    attempts.begin()
    attempts.begin()
    (output / "checkpoints/step_00000007").mkdir(parents=True)
    assert attempt(output) and attempt(output)


def test_what_is_forgotten_or_damaged_counts_from_the_start(output):
    assert attempt(output) and attempt(output)
    Attempts(output, 3, "7").forget()
    assert attempt(output) and attempt(output)
    (output / "slurm_attempts.json").write_text("{")
    assert attempt(output)
