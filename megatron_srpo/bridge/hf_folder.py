"""An export → a complete Hugging Face folder, or none."""

from __future__ import annotations

import fnmatch
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron_srpo.bridge.errors import BridgeError
from megatron_srpo.bridge.load import INDEX, SINGLE, read_config
from megatron_srpo.core.atomic import atomic_folder

# What a model needs beside its weights; everything else in the source folder stays there.
COPIED = (
    "generation_config.json", "tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "chat_template*", "spiece.model", "*.tiktoken", "preprocessor_config.json", "LICENSE*", "NOTICE*",
)  # fmt: skip
DEFAULT_SHARD_BYTES = 5 * 10**9

Items = Iterable[tuple[str, torch.Tensor]]


def write_hf_folder(
    items: Items, source_hf_dir: str | Path, out_dir: str | Path, dtype: torch.dtype | str | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> Path:  # fmt: skip
    """Write an export with the configuration and tokenizer of `source_hf_dir`; returns `out_dir`.

    One process calls this; all other ranks drain their own iterator, because producing items is collective. The folder
    is written aside and renamed: `out_dir` is the old one or the complete new one. `dtype` (also by name) converts;
    None keeps what comes. Holds at most `max_shard_bytes` of weights. On an error the iterator is drained before it is
    raised, so that no other rank waits. Raises BridgeError when `out_dir` is the source, or no model folder.
    """
    source, target = Path(source_hf_dir), Path(out_dir)
    stream = iter(items)
    try:
        refuse_bad_target(source, target)
        with atomic_folder(target) as aside:
            kind = getattr(torch, dtype) if isinstance(dtype, str) else dtype
            written = _write_weights(stream, aside, kind, max_shard_bytes)
            write_config(source, aside, kind or written)
            copy_files(source, aside)
    except BaseException:
        for _ in stream:
            pass
        raise
    return target


def refuse_bad_target(source: Path, target: Path) -> None:
    if target.resolve() == source.resolve():
        raise BridgeError(f"the export would replace its own source, {source}: choose another folder.")
    if target.exists() and not (target.is_dir() and ((target / "config.json").exists() or not any(target.iterdir()))):
        raise BridgeError(f"{target} exists and is no model folder: it is not replaced. Choose another folder.")


def _shards(items: Iterator[tuple[str, torch.Tensor]], dtype: torch.dtype | None, limit: int) -> Iterator[dict]:
    """Tensors on the CPU, converted, in dicts of at most `limit` bytes (at least one tensor)."""
    shard: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in items:
        # Own memory: the file must not hold what the tensor is a view of.
        tensor = tensor.detach().to("cpu", dtype or tensor.dtype, copy=True).contiguous()
        if shard and size + tensor.nbytes > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    if shard:
        yield shard


def _write_weights(
    items: Iterator[tuple[str, torch.Tensor]], folder: Path, dtype: torch.dtype | None, limit: int
) -> torch.dtype:
    """safetensors files, and an index where there are several; returns the dtype of the first tensor."""
    placed: list[list[str]] = []
    total, first = 0, None
    for shard in _shards(items, dtype, limit):
        part = folder / f"part-{len(placed)}"
        part.touch()
        usual = part.stat().st_mode  # what the user's umask gives; safetensors writes files that only the owner reads
        save_file(shard, part, metadata={"format": "pt"})
        part.chmod(usual)
        placed.append(list(shard))
        total += sum(tensor.nbytes for tensor in shard.values())
        first = first or next(iter(shard.values())).dtype
    if first is None:
        raise BridgeError("the export is empty: there is nothing to write")
    if len(placed) == 1:
        (folder / "part-0").rename(folder / SINGLE)
        return first
    files = [f"model-{i + 1:05d}-of-{len(placed):05d}.safetensors" for i in range(len(placed))]
    for i, file in enumerate(files):
        (folder / f"part-{i}").rename(folder / file)
    weight_map = {name: file for file, names in zip(files, placed, strict=True) for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return first


def write_config(source: Path, folder: Path, dtype: torch.dtype) -> None:
    """The source's config.json with the dtype that was written, under the key that its transformers version uses."""
    config = read_config(source)
    name = str(dtype).removeprefix("torch.")
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    config.update(dict.fromkeys(keys, name))
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def copy_files(source: Path, folder: Path) -> None:
    """The tokenizer, the generation configuration and the licence."""
    for path in source.iterdir():
        if path.is_file() and any(fnmatch.fnmatch(path.name, pattern) for pattern in COPIED):
            shutil.copyfile(path, folder / path.name)
