"""Reads a checkpoint's files without letting them run code.

Tensors and plain values go through torch's weights-only loader. The index of the distributed format is a pickle; it is
read with an unpickler that knows the classes of such an index and no others. Megatron reads the same bytes with a plain
unpickler afterwards, so `read_index` comes first.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from megatron_srpo.core.errors import UserError
from megatron_srpo.core.json_types import open_without_waiting, require_regular

INDEX = ".metadata"
_DCP = "torch.distributed.checkpoint"
_KNOWN = {
    ("torch", "Size"), ("torch.serialization", "_get_layout"), ("pathlib", "PosixPath"),
    (f"{_DCP}.filesystem", "_StorageInfo"),
    *((f"{_DCP}.metadata", name) for name in (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    )),
    *((f"{_DCP}.planner", name) for name in ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")),
}  # fmt: skip


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        if (module, name) in _KNOWN:
            return super().find_class(module, name)
        found = getattr(torch, name, None) if module == "torch" else None
        if not isinstance(found, torch.dtype):
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return found


def read_index(directory: Path) -> Metadata:
    """The index of a checkpoint in the distributed format. Raises UserError if it names a class that an index does not
    need."""
    file = Path(directory) / INDEX
    try:
        with open(file, "rb", opener=open_without_waiting) as stream:
            require_regular(stream.fileno())
            index = _IndexUnpickler(stream).load()
        if not isinstance(index, Metadata) or not isinstance(index.state_dict_metadata, dict):
            raise ValueError(f"it holds {type(index).__name__}")
    except OSError:
        raise
    except Exception as error:  # a pickle that somebody has changed raises anything
        raise UserError(f"{file} is no checkpoint's index and was not loaded: {error}") from error
    return index


def refuse_objects(directory: Path) -> None:
    """Raise UserError if an entry of the index is an object and not a tensor: the distributed loader would unpickle it.
    Transformer Engine's `_extra_state`, which Megatron's own checkpoints have, is never loaded."""
    entries = read_index(directory).state_dict_metadata
    wrong = [
        name for name, entry in entries.items()
        if isinstance(entry, BytesStorageMetadata) and "_extra_state" not in name
    ]  # fmt: skip
    if wrong:
        raise UserError(f"{directory} was not loaded: {wrong[0]} is a pickled object, and should be a tensor")


def read_tensors(file: Path) -> dict[str, Any]:
    """Tensors and plain values that torch.save wrote. Raises UserError if the file holds anything else."""
    try:
        with open(file, "rb", opener=open_without_waiting) as stream:
            require_regular(stream.fileno())
            return torch.load(stream, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        raise UserError(f"{file} is no file of a checkpoint and was not loaded: {type(error).__name__}") from error
