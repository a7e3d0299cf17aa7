"""The experts that an engine used for each token of a response, as the trainer takes them."""

from __future__ import annotations

import base64
import io

import numpy as np

from megatron_srpo.core.records import Experts
from megatron_srpo.families import ModelShape


def expert_record(rows: np.ndarray | None, tokens: int, shape: ModelShape) -> Experts:
    """Rollout.experts of a sequence of `tokens` tokens from what vLLM returns: [tokens − 1, layers, experts of a
    token], with a meaningless row for a layer without experts. Raises ValueError for anything else."""
    if rows is None:
        raise ValueError("no experts came with the response")
    expected = (tokens - 1, shape.layers, shape.experts_per_token)
    if rows.shape != expected or rows.dtype.kind not in "iu":
        raise ValueError(f"experts of shape {rows.shape} and type {rows.dtype}, expected integers of {expected}")
    own = rows[:, np.flatnonzero(shape.expert_layers)]
    if own.size and (own.min() < 0 or own.max() >= shape.experts):
        raise ValueError(f"experts from {own.min()} to {own.max()}, expected 0 to {shape.experts - 1}")
    return own.astype(np.uint8, order="C") if shape.experts <= 256 else own.astype(np.uint16, order="C")


def decode_rows(text: object) -> np.ndarray | None:
    """The array in a server's JSON: base64 of a .npy file. None for null. Raises ValueError for anything else."""
    if text is None:
        return None
    if not isinstance(text, str):
        raise ValueError(f"experts as {type(text).__name__}, expected base64")
    try:
        return np.lib.format.read_array(io.BytesIO(base64.b64decode(text, validate=True)), allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"experts that are no array ({error})") from error
