"""Checksums: what changes them, and what does not."""

from __future__ import annotations

import pytest
import torch

from megatron_srpo.bridge import BridgeError, Verifier
from megatron_srpo.bridge import verify as module
from megatron_srpo.bridge.verify import bits, digest, sources_of, total

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float8_e4m3fn)
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def some(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def reference_digest(values: list[int], chunk: int) -> int:
    """The same in whole numbers of any size."""
    result = len(values)
    for start in range(0, len(values), chunk):
        part = sum(value * (2 * place + 1) for place, value in enumerate(values[start : start + chunk]))
        result = (result * 6364136223846793005 + part) % 2**64
    return result


@pytest.mark.parametrize("dtype", DTYPES)
def test_both_sums_are_those_of_whole_numbers_of_any_size(dtype, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 7)
    tensor = some(dtype, 5, 9)
    values = bits(tensor).tolist()
    assert digest(tensor) == reference_digest(values, 7)
    assert total(tensor) == sum(values) % 2**64


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [0, 13, 44])
def test_every_bit_counts_in_both(dtype, place):
    tensor = some(dtype, 5, 9)
    for bit in range(8 * tensor.element_size() - 1):
        changed = tensor.clone()
        bits(changed)[place] ^= 1 << bit
        assert digest(changed) != digest(tensor) and total(changed) != total(tensor)


def test_order_and_padding_count_in_the_digest_alone():
    tensor = some(torch.float32, 6, 4)
    assert digest(tensor.T) != digest(tensor) and total(tensor.T) == total(tensor)
    padded = torch.cat([tensor, torch.zeros(3, 4)])
    assert digest(padded) != digest(tensor) and total(padded) == total(tensor)


def test_the_total_of_a_fused_parameter_over_its_shards_is_that_of_its_parts():
    parts = [some(torch.bfloat16, 4, 3) + i for i in range(3)]
    shards = [torch.cat([part[rank::2] for part in parts]) for rank in range(2)]
    assert sum(map(total, shards)) % 2**64 == sum(map(total, parts)) % 2**64


@pytest.mark.parametrize(
    ("every", "verified"), [(0, [False] * 5), (1, [True] * 5), (3, [True, False, False, True, False])]
)
def test_the_first_publish_and_every_nth_is_verified(every, verified):
    verifier = Verifier(every)
    assert [verifier.begin() for _ in range(5)] == verified


def test_a_fused_parameters_parts_are_found():
    names = [f"model.layers.3.{part}.weight" for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")]
    names += ["model.embed_tokens.weight", "model.layers.3.mlp.experts.0.gate_proj.weight"]
    names += [f"model.layers.3.mlp.experts.{i}.{part}_proj.weight" for i in (0, 1) for part in ("gate", "up", "down")]
    aliases = {"lm_head.weight": "model.embed_tokens.weight"}

    def found(parameter: str) -> list[str]:
        return sources_of(parameter, names, PACKED, aliases)

    assert found("model.layers.3.self_attn.qkv_proj.weight") == names[:3]
    assert found("lm_head.weight") == found("model.embed_tokens.weight") == ["model.embed_tokens.weight"]
    assert len(found("model.layers.3.mlp.experts.w13_weight")) == 4
    assert len(found("model.layers.3.mlp.experts.routed_experts.w2_weight")) == 2
    assert found("model.layers.3.self_attn.attn.k_scale") == []


def reports(ranks: int, parts: dict[str, torch.Tensor], *, whole: bool = False) -> list[dict]:
    """What the workers of an engine with one fused parameter say."""
    found = []
    for rank in range(ranks):
        shards = [part if whole else part.chunk(ranks)[rank] for part in parts.values()]
        found.append(
            {
                "received": {name: digest(part) for name, part in parts.items()},
                "totals": {name: total(part) for name, part in parts.items()},
                "held": {"fused": sum(map(total, shards)) % 2**64},
                "sources": {"fused": list(parts)},
            }
        )
    return found


@pytest.fixture
def parts() -> dict[str, torch.Tensor]:
    return {f"{name}_proj.weight": some(torch.float32, 4, 3) * (i + 1) for i, name in enumerate("qkv")}


def recorded(parts: dict[str, torch.Tensor]) -> Verifier:
    verifier = Verifier(1)
    assert [name for name, _ in verifier.record(parts.items())] == list(parts)
    return verifier


def test_sound_engines_pass_split_or_whole_on_every_rank(parts):
    for ranks in (1, 2, 4):
        for whole in (False, True):
            recorded(parts).compare("engine 0", reports(ranks, parts, whole=whole))
    mixed = reports(2, parts)
    for rank, report in enumerate(mixed):  # queries split, keys and values on both
        query, key, value = parts.values()
        report["held"]["fused"] = (total(query.chunk(2)[rank]) + total(key) + total(value)) % 2**64
    recorded(parts).compare("engine 0", mixed)


def test_what_differs_is_named(parts):
    found = reports(2, parts)
    found[1]["received"]["k_proj.weight"] ^= 1
    with pytest.raises(BridgeError, match=r"'k_proj.weight' arrived at engine 3, rank 1 with other values"):
        recorded(parts).compare("engine 3", found)
    found = reports(2, parts)
    found[0]["held"]["fused"] ^= 1
    with pytest.raises(BridgeError, match=r"engine 3 does not hold in 'fused' what it was sent as q_proj.weight, k_pr"):
        recorded(parts).compare("engine 3", found)


def test_a_tensor_that_never_arrived_is_named_and_one_without_a_known_place_is_told(parts):
    more = parts | {"new.weight": torch.ones(2)}
    with pytest.raises(BridgeError, match=r"'new.weight' arrived at engine 0 with other values"):
        recorded(more).compare("engine 0", reports(1, parts))
    found = reports(1, more)
    found[0]["sources"] = {"fused": list(parts)}
    found[0]["held"] = reports(1, parts)[0]["held"]
    verifier = recorded(more)
    verifier.compare("engine 0", found)
    assert verifier.unplaced == ["new.weight"]
