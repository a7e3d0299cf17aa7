"""Rewards: scores a response, and says in words what is wrong with it.

    registry.py   finds the function of a kind: a built-in one or the user's own
    mcq.py tooluse.py math.py exact.py reasoning_gym.py    one file for each built-in kind, named after it
    pool.py       scores a batch in worker processes, so that no response can hang or kill the run
    process.py    the driver's side of one worker process
    worker.py     the program of a worker process

Only pool.py imports torch: workers import the other files, and torch would cost each worker seconds and memory. For the
same reason RewardPool and RewardTask are imported on first use.
"""

from typing import TYPE_CHECKING

from megatron_srpo.rewards.registry import RewardError, Verdict, known_kinds, register, resolve

if TYPE_CHECKING:
    from megatron_srpo.rewards.pool import RewardPool, RewardTask

__all__ = ["RewardError", "RewardPool", "RewardTask", "Verdict", "known_kinds", "register", "resolve"]


def __getattr__(name: str) -> object:
    if name in ("RewardPool", "RewardTask"):
        from megatron_srpo.rewards import pool

        return getattr(pool, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
