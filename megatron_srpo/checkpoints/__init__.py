"""Checkpoints of a run: complete or absent, verified before they are used, the newest few and the best kept.

folder.py    one folder: its name, its manifest of checksums, whether it is whole; a run's set of them. No torch.
changes.py   what may differ between the run that wrote a checkpoint and the one that goes on from it
saving.py    `Checkpoints`: saving beside the training, restoring with fall-back

What a step_NNNNNNNN folder holds: the sharded weights, optimizer state and shadows (Megatron's distributed format),
rng_RRRRR.pt (the generators of rank R), run.json (data position, counters), config.json, and manifest.json, written
last.
"""

from megatron_srpo.checkpoints.folder import find_latest, resolve, whole

__all__ = ["find_latest", "resolve", "whole"]
