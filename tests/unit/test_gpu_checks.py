"""The checks of a node with GPUs, rehearsed on a CPU."""

from __future__ import annotations

import importlib
import subprocess
from pathlib import Path

import pytest

from megatron_srpo.run import gpu_checks
from megatron_srpo.run.gpu_checks import FAILED, OK, WARNING


def test_a_check_that_crashes_hangs_or_has_no_time_costs_one_line(monkeypatch):
    found, state = gpu_checks._in_a_process("bogus", "cpu", 60)
    assert state == FAILED and "KeyError" in found
    assert gpu_checks._in_a_process("rates", "cpu", 0.5)[1] == WARNING

    def hangs(command, *, timeout, **given):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(gpu_checks.subprocess, "run", hangs)
    assert gpu_checks._in_a_process("rates", "cpu", 1.0) == ("no end within 1 s", FAILED)


def test_the_kernels_of_the_losses_are_held_against_float64(monkeypatch):
    found, state = gpu_checks.losses("cpu")
    assert state == OK and "gradient" in found
    real = importlib.import_module("megatron_srpo.losses.vocab_parallel")
    monkeypatch.setattr(
        real, "gather_logprobs", lambda logits, ids, **more: (logits.softmax(-1).gather(1, ids), None)
    )  # fmt: skip
    assert gpu_checks.losses("cpu")[1] == FAILED


def test_a_peer_that_never_comes_is_an_error_within_the_limit(monkeypatch):
    monkeypatch.setattr(gpu_checks, "PEER_SECONDS", 0.5)
    found, state = gpu_checks.absent_peer("cpu")
    assert state == OK and found.startswith("gloo: error after")


@pytest.mark.parametrize("name", sorted(path.stem for path in (Path(__file__).parents[2] / "benchmarks").glob("*.py")))
def test_every_benchmark_can_be_imported(name):
    importlib.import_module(f"benchmarks.{name}")


@pytest.mark.slow
def test_all_checks_pass_as_a_rehearsal(capsys):
    assert gpu_checks.report("cpu") == 0
    table = capsys.readouterr().out
    assert all(name in table for name in gpu_checks.CHECKS) and "A rehearsal on a CPU" in table
