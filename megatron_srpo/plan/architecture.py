"""The numbers of a decoder that memory and time follow from, and the shipped models' configurations.

The dictionaries are what the hub's config.json of each model says, so that planning needs no network and no weights.
"""

from __future__ import annotations

import difflib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_srpo.core.errors import UserError
from megatron_srpo.core.json_types import read_json
from megatron_srpo.families import HfConfig, ModelShape, find_family

_COMMON: dict[str, Any] = {
    "vocab_size": 151936, "head_dim": 128, "num_key_value_heads": 8, "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6, "rope_theta": 1000000, "attention_bias": False, "hidden_act": "silu",
}  # fmt: skip
_DENSE = {**_COMMON, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
_MOE = {
    **_COMMON, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_key_value_heads": 4,
    "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "tie_word_embeddings": False,
}  # fmt: skip


def _dense(hidden: int, layers: int, heads: int, ffn: int, *, tied: bool) -> dict[str, Any]:
    return {
        **_DENSE, "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "intermediate_size": ffn, "tie_word_embeddings": tied,
    }  # fmt: skip


SHIPPED: dict[str, dict[str, Any]] = {
    "Qwen3-0.6B": _dense(1024, 28, 16, 3072, tied=True),
    "Qwen3-1.7B": _dense(2048, 28, 16, 6144, tied=True),
    "Qwen3-4B": _dense(2560, 36, 32, 9728, tied=True),
    "Qwen3-8B": _dense(4096, 36, 32, 12288, tied=False),
    "Qwen3-14B": _dense(5120, 40, 40, 17408, tied=False),
    "Qwen3-32B": _dense(5120, 64, 64, 25600, tied=False),
    "Qwen3-30B-A3B": {
        **_MOE, "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "intermediate_size": 6144,
        "moe_intermediate_size": 768,
    },
    "Qwen3-235B-A22B": {
        **_MOE, "hidden_size": 4096, "num_hidden_layers": 94, "num_attention_heads": 64, "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
    },
    "Llama-3.1-8B-Instruct": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "intermediate_size": 14336, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "tie_word_embeddings": False,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Architecture(ModelShape):
    """A model's shape, and the numbers of parameters that follow from it. With experts, all layers are taken to have
    them, except in `parameters`. Families that we cannot train are planned as Llama."""

    name: str = "model"
    qk_norm: bool = False
    qkv_bias: bool = False
    dense_ffn: int = 0  # width of the MLP in layers without experts of a model with experts

    @classmethod
    def from_hf(cls, hf: HfConfig, name: str = "model") -> Architecture:
        """From a config.json. Raises KeyError where a number is missing."""
        shape, family = ModelShape.from_hf(hf), find_family(hf)
        settings = family.config(shape) if family else {}
        return cls(
            **asdict(replace(shape, ffn=0) if shape.experts else shape), name=name,
            dense_ffn=shape.ffn if shape.experts else 0,
            qk_norm=bool(settings.get("qk_layernorm")), qkv_bias=bool(settings.get("add_qkv_bias")),
        )  # fmt: skip

    @property
    def query(self) -> int:
        """Elements of a token's queries."""
        return self.heads * self.head_dim

    @property
    def key(self) -> int:
        """Elements of a token's keys; its values have as many."""
        return self.groups * self.head_dim

    @property
    def attention_matrices(self) -> int:
        """Parameters of a layer's QKV and output projections."""
        return self.hidden * (2 * self.query + 2 * self.key)

    @property
    def mlp_matrices(self) -> int:
        """Parameters of a layer's dense MLP: gate, up and down."""
        return 3 * self.hidden * self.ffn

    @property
    def expert_matrices(self) -> int:
        """Parameters of one expert."""
        return 3 * self.hidden * self.expert_ffn

    @property
    def small_vectors(self) -> int:
        """Parameters of a layer's norms, which every tensor-parallel rank has."""
        return 2 * self.hidden + (2 * self.head_dim if self.qk_norm else 0)

    @property
    def layer_parameters(self) -> int:
        bias = self.query + 2 * self.key if self.qkv_bias else 0
        experts = self.experts * (self.expert_matrices + self.hidden)  # the router has a row an expert
        return self.attention_matrices + bias + self.mlp_matrices + self.small_vectors + experts

    @property
    def parameters(self) -> int:
        """All of the model's; a tied head is counted once."""
        heads = 1 if self.tied else 2
        total = self.layers * self.layer_parameters + heads * self.vocab * self.hidden + self.hidden
        if self.experts:
            without = self.expert_layers.count(False)
            more = 3 * self.hidden * self.dense_ffn - self.experts * (self.expert_matrices + self.hidden)
            total += without * more
        return total

    @property
    def active_matrices(self) -> int:
        """Parameters of a layer's products that one token goes through."""
        experts = self.experts_per_token * self.expert_matrices + self.experts * self.hidden if self.experts else 0
        return self.attention_matrices + self.mlp_matrices + experts


def shipped_if_absent(folder: str) -> str:
    """What `read_architecture` takes for a configuration's model.path: the folder, or the shipped model that it is
    named after where it is not there (not downloaded yet, or on another machine)."""
    name = Path(folder).name
    there = (Path(folder).expanduser() / "config.json").is_file()
    return name if name in SHIPPED and not there else folder


def read_architecture(model: str) -> tuple[Architecture, dict[str, Any]]:
    """(numbers, config.json) of a shipped name or a Hugging Face folder. Raises UserError when it is neither."""
    if model in SHIPPED:
        return Architecture.from_hf(SHIPPED[model], model), dict(SHIPPED[model])
    file = Path(model).expanduser() / "config.json"
    if not file.is_file():
        near = difflib.get_close_matches(model, SHIPPED, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UserError(
            f"plan: {model!r} is no folder with a config.json, and no shipped name.{hint} Expected a Hugging Face "
            f"folder (its weights are not read), or one of {', '.join(SHIPPED)}."
        )
    try:
        hf = read_json(file)
        if not isinstance(hf, dict):
            raise TypeError(f"{type(hf).__name__}, expected an object")
        arch = Architecture.from_hf(hf, Path(model).name)
        _require_sound(arch)
        return arch, hf
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise UserError(
            f"plan: {file} does not describe a decoder ({error!r}). Expected a model's config.json."
        ) from None


def _require_sound(arch: Architecture) -> None:
    """ValueError if the numbers cannot be a decoder's."""
    mlp = ("experts", "experts_per_token", "expert_ffn") if arch.experts else ("ffn",)
    for name in ("layers", "hidden", "heads", "groups", "head_dim", "vocab", "max_positions", *mlp):
        value = getattr(arch, name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: {value!r}, expected a whole number above 0")
    if arch.heads % arch.groups:
        raise ValueError(f"{arch.heads} attention heads do not divide into {arch.groups} key-value heads")
