"""Rows are made when a pass asks for them, so a pass must ask for each one once."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import torch

from megatron_srpo.mcore import step


class Made(Sequence):
    """Rows that count how often each is made."""

    def __init__(self, count):
        self.times = [0] * count

    def __len__(self):
        return len(self.times)

    def __getitem__(self, number):
        if number >= len(self):
            raise IndexError(number)
        self.times[number] += 1
        return SimpleNamespace(input_ids=torch.zeros(4 + number), number=number)


def test_a_pass_makes_every_row_once(monkeypatch):
    seen = []

    def schedule(*, data_iterator, seq_length, num_microbatches, **unused):
        seen.append((seq_length, [row.number for row in data_iterator[0]], num_microbatches))
        return []

    monkeypatch.setattr(step, "get_forward_backward_func", lambda: schedule)
    rows = Made(3)
    step.PipelineRunner._run(SimpleNamespace(model=[None], _forward=print), rows, None)
    assert seen == [(4, [0, 1, 2], 3)] and rows.times == [1, 1, 1]
