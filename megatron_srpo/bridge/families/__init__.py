"""Model families: one table of names and rules each, found by what config.json says.

A new family is one file with a `Family` and its name in FAMILIES; docs/add-a-model-family.md goes through it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_srpo.bridge.errors import BridgeError, nearest
from megatron_srpo.bridge.families.llama import LLAMA
from megatron_srpo.bridge.families.qwen2 import QWEN2
from megatron_srpo.bridge.families.qwen3 import QWEN3
from megatron_srpo.bridge.families.qwen3_moe import QWEN3_MOE
from megatron_srpo.bridge.families.table import Dims, Family, Line, Mapped, WeightTable

FAMILIES: tuple[Family, ...] = (LLAMA, QWEN2, QWEN3, QWEN3_MOE)


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a config.json (as a dict). Raises BridgeError that lists the supported ones."""
    architectures = config.get("architectures") or []
    for family in FAMILIES:
        if architectures and architectures[0] in family.architectures:
            return family
        if not architectures and config.get("model_type") in family.model_types:
            return family
    name = architectures[0] if architectures else config.get("model_type")
    supported = [name for family in FAMILIES for name in family.architectures]
    raise BridgeError(
        f"the model's architecture is {name!r}: expected one of {', '.join(supported)}."
        f"{nearest(str(name), supported)} Other families need a table in bridge/families."
    )


def weight_table(config: Mapping[str, Any], padded_vocab_size: int) -> WeightTable:
    """The names and rules of the model that this config.json describes."""
    return WeightTable(family_of(config), Dims.from_hf(config, padded_vocab_size))


__all__ = ["FAMILIES", "Dims", "Family", "Line", "Mapped", "WeightTable", "family_of", "weight_table"]
