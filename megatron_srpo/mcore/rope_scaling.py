"""Scaled rotary embeddings: transformers' own functions give the frequencies, Megatron's model turns with them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_srpo.families import HfConfig, ModelShape, family_of


@dataclass(frozen=True)
class ScaledRotary:
    """A rotary embedding whose frequencies are not those of its base."""

    inverse_frequencies: Tensor  # [head_dim / 2] fp32
    attention_factor: float  # cosine and sine are multiplied by it (YaRN)


def scaled_rotary(hf: HfConfig) -> ScaledRotary:
    """What transformers computes for this config.json, whose kind is not "default"."""
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    shape = ModelShape.from_hf(hf)
    settings = {key: value for key, value in hf.items() if key not in ("model_type", "architectures")}
    config = AutoConfig.for_model(family_of(hf).model_types[0], **settings)
    config.head_dim = shape.head_dim
    with torch.device("cpu"):  # a model without memory is built inside torch.device("meta")
        frequencies, factor = ROPE_INIT_FUNCTIONS[shape.rope_kind](config, "cpu")
    return ScaledRotary(frequencies.float(), float(factor))
