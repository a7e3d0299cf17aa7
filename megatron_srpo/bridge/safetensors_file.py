"""Writes safetensors files, one tensor in memory at a time, and the index of several files.

The safetensors library wants all tensors of a file before it writes the first. Here names, shapes and dtypes are enough
to begin. The format is the library's: 8 bytes with the length of the header, the header in JSON with the place of every
tensor, then the bytes of the tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_srpo.bridge.errors import BridgeError
from megatron_srpo.bridge.load import INDEX, SINGLE

DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class TensorGroup:
    """Tensors of one dtype that are produced together, as those of one Megatron parameter are."""

    key: str  # by which the producer knows them
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise BridgeError(f"{self.names[0]} is {self.dtype}: expected one of {', '.join(map(str, DTYPES))}")

    @property
    def nbytes(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes) * self.dtype.itemsize


@dataclass(frozen=True)
class PlannedFile:
    """One safetensors file and its tensors, in order. Wider dtypes must come first, so that every tensor starts at a
    multiple of its element size."""

    name: str
    groups: tuple[TensorGroup, ...]

    @property
    def nbytes(self) -> int:
        return sum(group.nbytes for group in self.groups)


def file_names(count: int) -> list[str]:
    """The names of the files of a model in `count` files, as transformers expects them."""
    return [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def plan_files(groups: Iterable[TensorGroup], max_bytes: int) -> list[PlannedFile]:
    """Distribute tensors over files of at most `max_bytes` of weights, with at least one group in each file."""
    planned: list[list[TensorGroup]] = []
    filled = 0
    for group in sorted(groups, key=lambda group: -group.dtype.itemsize):
        if not planned or filled + group.nbytes > max_bytes:
            planned.append([])
            filled = 0
        planned[-1].append(group)
        filled += group.nbytes
    return [PlannedFile(name, tuple(part)) for name, part in zip(file_names(len(planned)), planned, strict=True)]


def write_file(path: Path, file: PlannedFile, produce: Callable[[TensorGroup], Iterable[torch.Tensor]]) -> None:
    """Write one file. `produce` is called for one group after the other and gives its tensors, on the CPU, in order."""
    with path.open("wb") as stream:
        stream.write(_header(file))
        for group in file.groups:
            for name, shape, tensor in zip(group.names, group.shapes, produce(group), strict=True):
                assert tuple(tensor.shape) == shape and tensor.dtype == group.dtype, f"{name} is not as planned"
                stream.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)


def write_index(folder: Path, files: list[PlannedFile]) -> None:
    """Write the index of several files. One file needs none."""
    if len(files) == 1:
        return
    weight_map = {name: file.name for file in files for group in file.groups for name in group.names}
    index = {"metadata": {"total_size": sum(file.nbytes for file in files)}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _header(file: PlannedFile) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for group in file.groups:
        for name, shape in zip(group.names, group.shapes, strict=True):
            stop = start + math.prod(shape) * group.dtype.itemsize
            entries[name] = {"dtype": DTYPES[group.dtype], "shape": list(shape), "data_offsets": [start, stop]}
            start = stop
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
