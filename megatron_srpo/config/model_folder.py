"""Checks that a Hugging Face model folder exists and that its weight files are complete."""

from __future__ import annotations

import fnmatch
import json
import os
from pathlib import Path
from typing import Any

from megatron_srpo.core.errors import ConfigError
from megatron_srpo.core.json_types import read_json, read_weight_map

INDEX, SINGLE, SHARDS = "model.safetensors.index.json", "model.safetensors", "model-*-of-*.safetensors"
MISTRALS = "consolidated*.safetensors"
LARGEST_HEADER = 100_000_000  # bytes; the format's own limit
LFS_POINTER = b"version https://git-lfs"


def read_model_folder(path: str) -> dict[str, Any]:
    """The config.json of a Hugging Face folder that has all its safetensors. Raises ConfigError that says what is
    missing."""
    folder, given = Path(path).expanduser(), f'model.path = "{path}"'
    if not os.path.isdir(folder):  # Path.is_dir raises where a name is too long
        raise ConfigError(
            f"{given}: no such folder (looked from {Path.cwd()}). Expected a Hugging Face model on this machine; "
            "nothing is downloaded by itself. Fetch it first: hf download OWNER/MODEL --local-dir FOLDER"
        )
    file = folder / "config.json"
    try:
        hf = read_json(file)
    except FileNotFoundError:
        inside = sorted(found.parent.name for found in folder.glob("*/config.json"))
        hint = f"; there is one in its folder {inside[0]}" if inside else ""
        if (folder / "adapter_config.json").is_file():
            raise ConfigError(
                f"{given}: is a peft adapter, not a model. Name its base model, and the adapter with lora.path (and "
                "its lora.rank, lora.alpha and lora.targets)."
            ) from None
        raise ConfigError(f"{given}: has no config.json. Expected a Hugging Face model folder{hint}.") from None
    except (ValueError, OSError) as error:
        raise ConfigError(f"{file} cannot be read as JSON ({error}). Fetch the model again.") from None
    if not isinstance(hf, dict):
        raise ConfigError(f"{file}: expected a JSON object, got {type(hf).__name__}. Fetch the model again.")
    _require_weights(folder, given)
    return hf


def require_tokenizer_folder(given: str) -> None:
    """ConfigError if model.tokenizer is no folder; "" stands for model.path."""
    folder = Path(given).expanduser()
    if not given or os.path.isdir(folder):
        return
    what = "is a file" if os.path.exists(folder) else f"no such folder (looked from {Path.cwd()})"
    raise ConfigError(
        f'model.tokenizer = "{given}": {what}. Expected a Hugging Face folder with a tokenizer on this machine; '
        "nothing is downloaded by itself. Leave the key out to use the tokenizer in model.path"
    )


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
    ambiguous = two_sets_of_weights(folder)
    if ambiguous:
        raise ConfigError(f"{given}: {ambiguous}")
    index = folder / INDEX
    if index.is_file():
        try:
            named = set(read_weight_map(index).values())
        except (ValueError, OSError):
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


def two_sets_of_weights(folder: Path) -> str | None:
    """Why the folder's files may be two models, or None. transformers reads the single file first, vLLM reads the index
    first, and without an index vLLM reads all files. It prefers Mistral's own format to both."""
    own_format = sorted(file.name for file in folder.glob(MISTRALS))
    if own_format:
        return (
            f"has {own_format[0]}, Mistral's own format, which vLLM reads instead of the files that transformers "
            f"reads. Remove {MISTRALS}; to fetch a model without it: hf download OWNER/MODEL --exclude '{MISTRALS}' "
            "--local-dir FOLDER."
        )
    if not (folder / SINGLE).is_file():
        return None
    try:
        named = set(read_weight_map(folder / INDEX).values())
    except FileNotFoundError:
        named = {SINGLE}
    except (ValueError, OSError):
        return None  # the reader of the index tells about it
    every = sorted(file.name for file in folder.glob("*.safetensors") if file.name != SINGLE)
    others = [] if (folder / INDEX).exists() else every
    if SINGLE in named and not others:
        return None
    other = others[0] if others else INDEX
    sharded = not others or fnmatch.fnmatch(other, SHARDS)
    cure = f"remove {INDEX} and the files {SHARDS}" if sharded else f"move {other} to another folder"
    return (
        f"has both {SINGLE} and {other}, which may be two models: transformers reads the first, and vLLM the second, "
        f"or both. Keep one: remove {SINGLE}, or {cure}."
    )


def _damage(file: Path) -> str | None:
    """What is wrong with a safetensors file, or None. Reads only the header: 8 bytes with its length, then JSON with
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
    except (ValueError, KeyError, AttributeError, TypeError, IndexError, RecursionError):
        return "is not a safetensors file. Fetch the model again"
    if size != expected:
        return f"has {size:,} bytes, and its header tells of {expected:,}. The download was not finished: run it again"
    return None
