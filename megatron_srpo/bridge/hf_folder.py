"""Writes an export as a Hugging Face folder, which appears complete or not at all."""

from __future__ import annotations

import fnmatch
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from megatron_srpo.bridge.errors import BridgeError
from megatron_srpo.bridge.load import read_config
from megatron_srpo.bridge.safetensors_file import PlannedFile, TensorGroup, file_names, write_file, write_index
from megatron_srpo.core.atomic import atomic_folder

# The files that a model needs in addition to its weights. Other files of the source folder are not copied.
TOKENIZER = (
    "tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*",
    "spiece.model", "*.tiktoken",
)  # fmt: skip
OTHERS = ("generation_config.json", "preprocessor_config.json", "LICENSE*", "NOTICE*")
DEFAULT_SHARD_BYTES = 5 * 10**9

Items = Iterable[tuple[str, torch.Tensor]]


def write_hf_folder(
    items: Items, source_hf_dir: str | Path, out_dir: str | Path, dtype: torch.dtype | str | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES, *, tokenizer: str | Path = "",
) -> Path:  # fmt: skip
    """Write an export with the configuration of `source_hf_dir`, and its tokenizer unless `tokenizer` names another
    folder. Returns `out_dir`. If that is a link to a folder, the link stays.

    One rank calls this. All other ranks consume their own iterator, because producing items is collective. The folder
    is written under another name and renamed at the end, so `out_dir` is always the old one or the complete new one.
    `dtype` (or its name) converts; None keeps the dtype of the items. The function holds at most `max_shard_bytes` of
    weights. On an error it consumes the iterator before it raises, so that no other rank waits. Raises BridgeError when
    `out_dir` is the source, or is not a model folder.
    """
    source, target = Path(source_hf_dir), Path(out_dir)
    stream = iter(items)
    try:
        refuse_bad_target(source, target)
        with atomic_folder(target.resolve() if target.is_symlink() else target) as aside:
            kind = getattr(torch, dtype) if isinstance(dtype, str) else dtype
            written = _write_weights(stream, aside, kind, max_shard_bytes)
            write_config(source, aside, kind or written)
            copy_files(source, aside, Path(tokenizer) if tokenizer else source)
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
    """Converted tensors on the CPU, in dicts of at most `limit` bytes with at least one tensor."""
    shard: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in items:
        # A copy, because a tensor of an export may keep a whole bucket alive.
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
    """Write safetensors files, and an index if there are several. Returns the dtype of the first tensor."""
    parts: list[tuple[TensorGroup, ...]] = []
    first: torch.dtype | None = None
    for shard in _shards(items, dtype, limit):
        first = first or next(iter(shard.values())).dtype
        ordered = sorted(shard.items(), key=lambda item: (-item[1].itemsize, item[0]))  # the library's order
        groups = tuple(TensorGroup(name, (name,), (tuple(t.shape),), t.dtype) for name, t in ordered)
        part = PlannedFile(f"part-{len(parts)}", groups)
        write_file(folder / part.name, part, lambda group, shard=shard: [shard[group.key]])  # type: ignore[misc]
        parts.append(groups)
    if first is None:
        raise BridgeError("the export is empty: there is nothing to write")
    files = [PlannedFile(name, groups) for name, groups in zip(file_names(len(parts)), parts, strict=True)]
    for i, file in enumerate(files):  # their names contain the number of files, which is known only now
        (folder / f"part-{i}").rename(folder / file.name)
    write_index(folder, files)
    return first


def write_config(source: Path, folder: Path, dtype: torch.dtype) -> None:
    """Write the source's config.json with the written dtype, under the key that the source's transformers version
    uses."""
    config = read_config(source)
    name = str(dtype).removeprefix("torch.")
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    config.update(dict.fromkeys(keys, name))
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def copy_files(source: Path, folder: Path, tokenizer: Path) -> None:
    """Copy the tokenizer from its folder, and the generation configuration and the licence from `source`."""
    for place, patterns in ((tokenizer, TOKENIZER), (source, OTHERS)):
        for path in place.iterdir():
            if path.is_file() and any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns):
                shutil.copyfile(path, folder / path.name)
