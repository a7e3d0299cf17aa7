"""A checkpoint of a policy on real ranks, without the trainer around it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def save_policy(policy: Any, folder: Path) -> None:
    """Write a checkpoint into an existing, empty folder. All ranks call it."""
    from megatron_srpo.mcore import checkpoint

    write_snapshot(policy, checkpoint.snapshot(policy, folder))


def write_snapshot(policy: Any, snapshot: Any) -> None:
    """Write what was copied. All ranks call it."""
    snapshot.write()
    results = [None] * policy.topology.world_size
    torch.distributed.all_gather_object(results, snapshot.results, group=policy.topology.control_group)
    if policy.topology.is_driver:
        snapshot.write_index(results)
    torch.distributed.barrier()
