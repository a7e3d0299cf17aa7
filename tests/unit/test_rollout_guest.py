"""An engine in the trainer's process leaves no trace there."""

from __future__ import annotations

import random
import signal

import numpy as np
import pytest
import torch

from megatron_srpo.rollout.guest import preserved_generators, preserved_settings


def draw():
    return random.random(), np.random.rand(), torch.rand(()).item()


def seed(number):
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


@pytest.mark.parametrize("fails", [False, True])
def test_random_generators_continue_where_they_were(fails):
    seed(3)
    expected = [draw(), draw()]
    seed(3)
    found = [draw()]
    try:
        with preserved_generators("cpu"):
            seed(99)
            draw()
            if fails:
                raise ValueError
    except ValueError:
        pass
    assert [*found, draw()] == expected


@pytest.mark.parametrize("fails", [False, True])
def test_torch_settings_and_signal_handlers_are_put_back(fails):
    def settings():
        return (
            torch.set_num_threads, torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),
            torch.get_float32_matmul_precision(), signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM),
        )  # fmt: skip

    before = settings()
    try:
        with preserved_settings():
            torch.set_num_threads(before[1] + 1)
            torch.set_num_threads = lambda threads: None  # as vLLM's CPU worker does
            torch.set_default_dtype(torch.bfloat16)
            torch.set_float32_matmul_precision("medium")
            torch.set_grad_enabled(False)
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
            assert all(now != then for now, then in zip(settings(), before, strict=True))
            if fails:
                raise ValueError
    except ValueError:
        pass
    assert settings() == before
