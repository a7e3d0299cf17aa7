"""Checkpoints of a run. They are complete or absent, verified before they are used, and the newest and the best stay.

folder.py    one checkpoint folder: its name, its manifest with checksums, whether it is undamaged; no torch
changes.py   which keys may differ between the run that wrote a checkpoint and the run that resumes from it
saving.py    `Checkpoints`: saves while training continues, and restores the newest undamaged checkpoint
listing.py   the command `checkpoints`

A folder step_NNNNNNNN contains the sharded weights, optimizer state and shadows (in Megatron's distributed format),
rng_RRRRR.pt (the random generators of rank R), run.json (data position, counters), config.json, and manifest.json,
which is written last.
"""

from megatron_srpo.checkpoints.folder import find_latest, resolve, whole

__all__ = ["find_latest", "resolve", "whole"]
