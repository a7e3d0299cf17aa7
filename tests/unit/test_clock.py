"""A wall clock that jumps changes nothing: decisions are made by monotonic clocks."""

from __future__ import annotations

import itertools
import re
import time
from pathlib import Path

import megatron_srpo
from megatron_srpo.config import RewardConfig
from megatron_srpo.rewards import RewardPool, RewardTask
from megatron_srpo.run.stopping import SAME_REQUEST_SECONDS, StopRequest

PACKAGE = Path(megatron_srpo.__file__).parent
FOR_PEOPLE_ONLY = {
    "run/cli.py": "the time in torchrun's report",
    "checkpoints/saving.py": "when a checkpoint was written",
    "run/first_start.py": "the date that chat templates show; later starts read it from a file",
    "environments/verifiers.py": "when an answer was made, which OpenAI's format asks for",
}


WALL_CLOCK = re.compile(r"\btime\.(time|time_ns|localtime|ctime)\(|\.(now|today|utcnow)\(")


def test_only_what_people_read_asks_the_wall_clock():
    asking = {file.relative_to(PACKAGE).as_posix() for file in PACKAGE.rglob("*.py") if asks(file)}
    assert asking == set(FOR_PEOPLE_ONLY)


def asks(file: Path) -> bool:
    return bool(WALL_CLOCK.search(file.read_text(encoding="utf-8")))


def test_rewards_and_stops_do_not_notice_a_clock_that_jumps_by_years(monkeypatch):
    jumps = itertools.cycle([0.0, 1e9, -1e9])
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + next(jumps))
    with RewardPool(RewardConfig(workers=1, timeout_seconds=20.0), ["exact"]) as pool:
        rewards = pool.score([RewardTask("exact", str(i % 3), "1") for i in range(30)])
    assert [reward.score for reward in rewards] == [0.0, 1.0, 0.0] * 10
    assert not any(reward.error for reward in rewards)
    stop = StopRequest(speaks=False)
    assert not stop() and SAME_REQUEST_SECONDS < 1e9
