"""The model folder: whether a Hugging Face model is there, whole, and of a kind that the trainer can build."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from megatron_srpo.core.errors import ConfigError

ARCHITECTURES = ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "Qwen2ForCausalLM", "LlamaForCausalLM")
NUMBERS = (
    "num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size",
    "max_position_embeddings", "rms_norm_eps",
)  # fmt: skip
MOE_NUMBERS = ("num_experts_per_tok", "moe_intermediate_size")
INDEX = "model.safetensors.index.json"
LARGEST_HEADER = 100_000_000  # bytes; the format's own limit
LFS_POINTER = b"version https://git-lfs"


def read_model_folder(path: str) -> dict[str, Any]:
    """config.json of a Hugging Face folder whose safetensors are all there; ConfigError says what is missing."""
    folder, given = Path(path).expanduser(), f'model.path = "{path}"'
    if not os.path.isdir(folder):  # Path.is_dir raises where a name is too long
        raise ConfigError(
            f"{given}: no such folder (looked from {Path.cwd()}). Expected a Hugging Face model on this machine; "
            "nothing is downloaded by itself. Fetch it first: hf download OWNER/MODEL --local-dir FOLDER"
        )
    file = folder / "config.json"
    try:
        hf = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        inside = sorted(found.parent.name for found in folder.glob("*/config.json"))
        hint = f"; there is one in its folder {inside[0]}" if inside else ""
        raise ConfigError(f"{given}: has no config.json. Expected a Hugging Face model folder{hint}.") from None
    except (ValueError, OSError) as error:
        raise ConfigError(f"{file} cannot be read as JSON ({error}). Fetch the model again.") from None
    if not isinstance(hf, dict):
        raise ConfigError(f"{file}: expected a JSON object, got {type(hf).__name__}. Fetch the model again.")
    _require_weights(folder, given)
    return hf


def _require_weights(folder: Path, given: str) -> None:
    present = {file.name for file in folder.glob("*.safetensors") if file.stat().st_size > 0}
    if not present:
        pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
        cure = (
            f"It has {pickled[0]}, which is not read: convert it with "
            "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(FOLDER)"
            if pickled
            else "Fetch the model again, weights included"
        )
        raise ConfigError(f"{given}: has no weights. Expected *.safetensors. {cure}.")
    index = folder / INDEX
    if index.is_file():
        try:
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, OSError):
            raise ConfigError(f"{index} is not an index of safetensors files. Fetch the model again.") from None
        if named - present:
            missing = sorted(named - present)
            raise ConfigError(
                f"{given}: {len(missing)} of the {len(named)} weight files that {INDEX} names are missing or empty, "
                f"first {missing[0]}. The download was not finished: run it again."
            )
        present &= named
    for name in sorted(present):
        damage = _damage(folder / name)
        if damage:
            raise ConfigError(f"{given}: {name} {damage}.")


def _damage(file: Path) -> str | None:
    """What is wrong with a safetensors file as a whole. Reads the header alone: 8 bytes of its length, then JSON with
    the tensors' places."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(len(LFS_POINTER))
        if start == LFS_POINTER:
            return "is a pointer of Git LFS, not the weights. Fetch them: git lfs pull"
        length = int.from_bytes(start[:8], "little")
        if size >= 8 and length > LARGEST_HEADER:
            return "is not a safetensors file. Fetch the model again"
        opened.seek(8)
        header = opened.read(length)
    if size < 8 or len(header) < length:
        return f"ends after {size:,} bytes, inside its header. The download was not finished: run it again"
    try:
        tensors = [entry for name, entry in json.loads(header).items() if name != "__metadata__"]
        expected = 8 + length + max((tensor["data_offsets"][1] for tensor in tensors), default=0)
    except (ValueError, KeyError, AttributeError, TypeError, IndexError):
        return "is not a safetensors file. Fetch the model again"
    if size != expected:
        return f"has {size:,} bytes, and its header tells of {expected:,}. The download was not finished: run it again"
    return None


def expert_count(hf: dict[str, Any]) -> int:
    """Experts of a layer that has any, under the hub's name or the one that transformers writes; 0 in a dense model."""
    return hf.get("num_experts") or hf.get("num_local_experts") or 0


def expert_layers(hf: dict[str, Any]) -> list[bool]:
    """For each layer, whether it has experts."""
    dense, step = hf.get("mlp_only_layers") or [], hf.get("decoder_sparse_step") or 1
    some = expert_count(hf) > 0
    return [some and i not in dense and (i + 1) % step == 0 for i in range(hf["num_hidden_layers"])]


def unsupported(hf: dict[str, Any]) -> list[str]:
    """What in a config.json the trainer would get wrong, a line each; empty when it can be trained."""
    name = (hf.get("architectures") or [None])[0]
    if name not in ARCHITECTURES:
        return [f"model.path: its config.json is for {name or 'no architecture'}; supported are {_all(ARCHITECTURES)}"]
    moe = name == "Qwen3MoeForCausalLM"
    missing = [key for key in (*NUMBERS, *(MOE_NUMBERS if moe else ())) if not isinstance(hf.get(key), int | float)]
    if moe and not expert_count(hf):
        missing.append("num_experts")
    if missing:
        return [f"model.path: its config.json has no number for {_all(missing)}; expected the file of a {name}"]
    problems = []
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        problems.append(
            f'model.path: rotary embedding "{kind}" (rope_scaling) is not supported; expected the default one'
        )
    if rope.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0)) != 1.0:
        problems.append("model.path: partial_rotary_factor is not 1; expected rotary embedding of whole heads")
    for key in ("attention_bias", "mlp_bias", "use_sliding_window"):
        if hf.get(key):
            problems.append(f"model.path: {key} is true in its config.json; expected false, others are not supported")
    if hf.get("hidden_act", "silu") != "silu":
        problems.append(f'model.path: hidden_act is "{hf["hidden_act"]}"; expected "silu"')
    if moe and hf["num_experts_per_tok"] == 1 and hf.get("norm_topk_prob"):
        problems.append("model.path: norm_topk_prob with one expert a token leaves its router without a gradient")
    if hf.get("quantization_config"):
        problems.append("model.path: its weights are quantized; expected the bfloat16 or float32 model")
    return problems


def _all(names: tuple[str, ...] | list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
