"""The numbers of a decoder, read from its config.json. This is the only place that reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from megatron_srpo.families.rope import HfConfig, longest_sequence, rope_base, rope_kind


@dataclass(frozen=True)
class ModelShape:
    """A decoder with gated MLPs, which may be mixtures of experts. Counts are elements, not bytes."""

    layers: int
    hidden: int
    heads: int
    groups: int  # key-value heads
    head_dim: int
    ffn: int  # width of a dense MLP
    vocab: int
    max_positions: int  # longest sequence, in tokens
    norm_eps: float
    rope_theta: float  # base of the rotary embedding
    rope_kind: str  # "default", or how its frequencies are scaled
    tied: bool  # the output layer is the embedding
    experts: int = 0  # in each layer that has experts; 0 in a dense model
    experts_per_token: int = 0
    expert_ffn: int = 0  # width of one expert
    renormalised: bool = False  # the probabilities of a token's chosen experts are scaled to sum to 1
    dense_layers: tuple[int, ...] = ()  # layers without experts
    expert_step: int = 1  # of the layers, every expert_step-th has experts

    @classmethod
    def from_hf(cls, hf: HfConfig) -> Self:
        """From a config.json. Raises KeyError where a number is missing that has no default."""
        return cls(**_numbers(hf))

    @property
    def expert_layers(self) -> list[bool]:
        """For each layer, whether it has experts."""
        return [
            self.experts > 0 and i not in self.dense_layers and (i + 1) % self.expert_step == 0
            for i in range(self.layers)
        ]

    @property
    def expert_bytes(self) -> int:
        """Bytes that the experts of one token take as numbers (rollout.routing_replay): uint8 up to 256 experts."""
        return sum(self.expert_layers) * self.experts_per_token * (1 if self.experts <= 256 else 2)


def expert_count(hf: HfConfig) -> int:
    """Experts of a layer, under the hub's key or under the one that transformers writes; 0 in a dense model."""
    return hf.get("num_experts") or hf.get("num_local_experts") or 0


def _numbers(hf: HfConfig) -> dict[str, Any]:
    heads, experts = hf["num_attention_heads"], expert_count(hf)
    numbers = {
        "layers": hf["num_hidden_layers"],
        "hidden": hf["hidden_size"],
        "heads": heads,
        "groups": hf.get("num_key_value_heads") or heads,
        "head_dim": hf.get("head_dim") or hf["hidden_size"] // heads,
        "ffn": hf.get("intermediate_size", 0),
        "vocab": hf["vocab_size"],
        "max_positions": longest_sequence(hf),
        "norm_eps": hf.get("rms_norm_eps", 1e-6),
        "rope_theta": rope_base(hf),
        "rope_kind": rope_kind(hf),
        "tied": bool(hf.get("tie_word_embeddings", False)),
    }
    if experts:
        numbers |= {
            "experts": experts,
            "experts_per_token": hf.get("num_experts_per_tok", 0),
            "expert_ffn": hf.get("moe_intermediate_size", 0),
            "renormalised": bool(hf.get("norm_topk_prob", False)),
            "dense_layers": tuple(hf.get("mlp_only_layers") or ()),
            "expert_step": hf.get("decoder_sparse_step") or 1,
        }
    return numbers
