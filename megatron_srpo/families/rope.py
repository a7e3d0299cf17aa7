"""The rotary embedding in a config.json, which has an old and a new spelling: "rope_theta" and "rope_scaling" at the
top, or both inside "rope_parameters". Only the plain one of whole heads is supported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HfConfig = Mapping[str, Any]  # a Hugging Face config.json

DEFAULT_BASE = 10000.0  # transformers' own, of all our families
SPELLINGS = ("rope_scaling", "rope_parameters")
KNOWN = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
# Of remote code and old checkpoints: vLLM reads them, transformers' classes of our families do not.
FOREIGN = ("rotary_emb_base", "rotary_pct", "rotary_emb_fraction", "rope_ratio", "dual_chunk_attention_config")


def rope_base(hf: HfConfig) -> float:
    """The base of the rotary embedding."""
    inner = [given["rope_theta"] for given in _given(hf).values() if given.get("rope_theta") is not None]
    found = [*inner, *([hf["rope_theta"]] if hf.get("rope_theta") is not None else []), DEFAULT_BASE]
    return float(found[0])


def rope_problems(hf: HfConfig) -> list[str]:
    """What config.json asks for and the trainer would compute wrongly, a line each, contradictions included."""
    shapeless = [name for name in SPELLINGS if hf.get(name) and not isinstance(hf[name], Mapping)]
    if shapeless:
        return [f"{shapeless[0]} is no table in its config.json; expected one like {{'rope_type': 'default'}}"]
    problems = [f"{key} is set in its config.json; it is not supported" for key in FOREIGN if hf.get(key) is not None]
    for name, given in _given(hf).items():
        problems += _of_one_spelling(name, given)
    return problems + _contradictions(hf)


def _given(hf: HfConfig) -> dict[str, Mapping[str, Any]]:
    return {name: hf[name] for name in SPELLINGS if isinstance(hf.get(name), Mapping) and hf[name]}


def _of_one_spelling(name: str, given: Mapping[str, Any]) -> list[str]:
    kinds = [given[key] for key in ("rope_type", "type") if given.get(key) is not None]
    scaled = [kind for kind in kinds if kind != "default"]
    if scaled:
        return [f'rotary embedding "{scaled[0]}" ({name}) is not supported; expected the default one']
    other = sorted(key for key, value in given.items() if key not in KNOWN and value is not None)
    if other:
        return [f"{name} has {', '.join(other)}; expected the default rotary embedding, the same in every layer"]
    return []


def _contradictions(hf: HfConfig) -> list[str]:
    """Two places that differ: transformers and vLLM would each read another one."""
    problems = []
    for key, default in (("rope_theta", DEFAULT_BASE), ("partial_rotary_factor", 1.0)):
        outside = hf.get(key)
        places = {} if outside is None else {"the top": float(outside)}
        # A spelling without the key takes it from the top, and never from the other spelling.
        usual = default if outside is None else float(outside)
        for name, given in _given(hf).items():
            places[name] = usual if given.get(key) is None else float(given[key])
        if len(set(places.values())) > 1:
            told = ", ".join(f"{value:g} in {place}" for place, value in places.items())
            problems.append(f"{key} is given twice in its config.json: {told}; keep the right one")
        elif key == "partial_rotary_factor" and set(places.values()) - {default}:
            problems.append(f"{key} is not 1; expected rotary embedding of whole heads")
    return problems
