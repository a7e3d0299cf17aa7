"""Rewards: what a response is worth, and in words what was wrong with it.

    registry.py   which function scores which kind, the built-in ones and the user's own
    mcq.py tooluse.py math.py exact.py reasoning_gym.py    one file a kind, named after it
    pool.py       scores a batch in worker processes, so that no answer can hang or kill the run
    process.py    one worker process, seen from the driver
    worker.py     what runs inside it

Everything but pool.py stays clear of torch: workers import it, and torch would cost each of them seconds and memory.
Hence RewardPool and RewardTask are imported on first use.
"""

from typing import TYPE_CHECKING, Any

from megatron_srpo.rewards.registry import RewardError, Verdict, known_kinds, register, resolve

if TYPE_CHECKING:
    from megatron_srpo.rewards.pool import RewardPool, RewardTask

__all__ = ["RewardError", "RewardPool", "RewardTask", "Verdict", "known_kinds", "register", "resolve"]


def __getattr__(name: str) -> Any:
    if name in ("RewardPool", "RewardTask"):
        from megatron_srpo.rewards import pool

        return getattr(pool, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
