"""Samples to packed rows.

plan.py        who forwards which samples, in which row
rows.py        the rows as tensors, and where the trained tokens are
passes.py      scoring passes, kept per sample, and train steps
source.py      where an iteration's work comes from: rank 0, and the other ranks
diagnosis.py   which samples made a step's gradient infinite or NaN
"""

from megatron_srpo.batching.plan import plan_batch, share_of
from megatron_srpo.batching.rows import pack_rows, predicting_positions

__all__ = ["pack_rows", "plan_batch", "predicting_positions", "share_of"]
