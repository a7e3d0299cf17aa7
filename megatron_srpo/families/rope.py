"""The rotary embedding in a config.json, which has an old and a new spelling: "rope_theta" and "rope_scaling" at the
top, or both inside "rope_parameters". Rotary embeddings of whole heads are supported, plain or scaled.

transformers takes the first of "rope_scaling" and "rope_parameters" that is not empty, and vLLM loads the same
configuration. So this table counts, and a second one that says something else is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HfConfig = Mapping[str, Any]  # a Hugging Face config.json

DEFAULT_BASE = 10000.0  # transformers' own, of all our families
SPELLINGS = ("rope_scaling", "rope_parameters")
KNOWN = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
ORIGINAL = "original_max_position_embeddings"
REQUIRED: Mapping[str, frozenset[str]] = {  # by kind
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", ORIGINAL}),
    "yarn": frozenset({"factor", ORIGINAL}),
}
OPTIONAL = {"yarn": {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}}
# Of remote code and old checkpoints: vLLM reads them, transformers' classes of our families do not.
FOREIGN = ("rotary_emb_base", "rotary_pct", "rotary_emb_fraction", "rope_ratio", "dual_chunk_attention_config")


def rope_base(hf: HfConfig) -> float:
    """The base of the rotary embedding."""
    inner = [given["rope_theta"] for given in _given(hf).values() if given.get("rope_theta") is not None]
    found = [*inner, *([hf["rope_theta"]] if hf.get("rope_theta") is not None else []), DEFAULT_BASE]
    return float(found[0])


def rope_kind(hf: HfConfig) -> str:
    """ "default", or how the frequencies are scaled for longer sequences: a key of REQUIRED."""
    return next((_kind(given) for given in _given(hf).values()), "default")


def longest_sequence(hf: HfConfig) -> int:
    """Positions that the model is made for. Linear scaling stretches max_position_embeddings; the others, as
    transformers and vLLM read them, have it stretched already. vLLM's YaRN has no more than factor × original ones."""
    limit, kind = int(hf.get("max_position_embeddings", 0)), rope_kind(hf)
    given = next(iter(_given(hf).values()), {})
    if kind == "linear":
        return int(limit * given["factor"])
    return min(limit, int(given["factor"] * given[ORIGINAL])) if kind == "yarn" else limit


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


def _kind(given: Mapping[str, Any]) -> str:
    return str(next((given[key] for key in ("rope_type", "type") if given.get(key) is not None), "default"))


def _of_one_spelling(name: str, given: Mapping[str, Any]) -> list[str]:
    kinds = [given[key] for key in ("rope_type", "type") if given.get(key) is not None]
    if len(set(kinds)) > 1:
        return [f'{name} has rope_type "{kinds[0]}" and type "{kinds[1]}"; keep the right one']
    kind = _kind(given)
    if kind not in REQUIRED:
        return [f'rotary embedding "{kind}" ({name}) is not supported; expected one of {", ".join(REQUIRED)}']
    missing = sorted(key for key in REQUIRED[kind] if not _is_positive(given.get(key)))
    if missing:
        return [f'{name} of kind "{kind}" needs {", ".join(missing)}, each a number above 0']
    known = KNOWN | REQUIRED[kind] | OPTIONAL.get(kind, set())
    other = sorted(key for key, value in given.items() if key not in known and value is not None)
    if other:
        return [f'{name} of kind "{kind}" has {", ".join(other)}; expected one rotary embedding for all layers']
    return []


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _contradictions(hf: HfConfig) -> list[str]:
    """Two places that differ: whoever wrote one of them is not read."""
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
    tables = [{key: value for key, value in given.items() if key not in KNOWN} for given in _given(hf).values()]
    kinds = [_kind(given) for given in _given(hf).values()]
    if len(tables) == 2 and (tables[0] != tables[1] or kinds[0] != kinds[1]):
        problems.append(f"{' and '.join(SPELLINGS)} scale differently in its config.json; keep the right one")
    if hf.get(ORIGINAL) is not None and any(hf[ORIGINAL] != given.get(ORIGINAL) for given in _given(hf).values()):
        problems.append(f"{ORIGINAL} is outside of the rotary embedding's table in its config.json; write it inside")
    return problems
