"""Model families: one file for each, with its names, its Megatron settings and what it refuses.

    shape.py    the numbers of a decoder, read from config.json
    family.py   what a family is made of

A new family is one file and its line in FAMILIES; docs/add-a-model-family.md goes through it. Nothing here imports
torch, so that a wrong configuration is refused in the first second.
"""

from __future__ import annotations

from megatron_srpo.core.errors import UserError, nearest
from megatron_srpo.families.family import Family, Line, Settings, Split
from megatron_srpo.families.llama import LLAMA
from megatron_srpo.families.mistral import MISTRAL
from megatron_srpo.families.qwen2 import QWEN2
from megatron_srpo.families.qwen3 import QWEN3
from megatron_srpo.families.qwen3_moe import QWEN3_MOE
from megatron_srpo.families.shape import HfConfig, ModelShape, expert_count

FAMILIES: tuple[Family, ...] = (QWEN3, QWEN3_MOE, QWEN2, LLAMA, MISTRAL)
ARCHITECTURES = [name for family in FAMILIES for name in family.architectures]


def find_family(hf: HfConfig) -> Family | None:
    """The family of a config.json, or None."""
    architectures = hf.get("architectures") or []
    for family in FAMILIES:
        if architectures and architectures[0] in family.architectures:
            return family
        if not architectures and hf.get("model_type") in family.model_types:
            return family
    return None


def family_of(hf: HfConfig) -> Family:
    """The family of a config.json. Raises UserError that lists the supported architectures."""
    family = find_family(hf)
    if family is None:
        architectures = hf.get("architectures") or []
        name = architectures[0] if architectures else hf.get("model_type")
        raise UserError(
            f"the model's architecture is {name!r}: expected one of {', '.join(ARCHITECTURES)}."
            f"{nearest(str(name), ARCHITECTURES)} Other families need a file in megatron_srpo/families."
        )
    return family


def unsupported(hf: HfConfig) -> list[str]:
    """What in a config.json the trainer would get wrong, a line each; empty when the model can be trained."""
    name = (hf.get("architectures") or [None])[0]
    if name not in ARCHITECTURES:
        return [f"model.path: its config.json is for {name or 'no architecture'}; supported are {_all(ARCHITECTURES)}"]
    family = family_of(hf)
    given = {**hf, "num_experts": expert_count(hf) or None}
    missing = [key for key in family.numbers if not isinstance(given.get(key), int | float)]
    if missing:
        return [f"model.path: its config.json has no number for {_all(missing)}; expected the file of a {name}"]
    return [f"model.path: {problem}" for problem in family.refusals(hf)]


def _all(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


__all__ = [
    "FAMILIES",
    "Family",
    "HfConfig",
    "Line",
    "ModelShape",
    "Settings",
    "Split",
    "expert_count",
    "family_of",
    "find_family",
    "unsupported",
]
