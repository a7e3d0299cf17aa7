"""A Hugging Face folder written tensor by tensor: its files are planned before any weight is there.

`write_hf_folder` collects a file's tensors before it writes them, as the safetensors library wants it; here only one
parameter is in memory. The format is the library's: 8 bytes with the header's length, the header in JSON with every
tensor's place, then the tensors' bytes.
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
class Unit:
    """Tensors that come together, of one dtype: what one Megatron parameter gives."""

    key: str  # by which the producer knows them
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes) * self.dtype.itemsize


@dataclass(frozen=True)
class PlannedFile:
    """One safetensors file of the folder and what is in it, in order."""

    name: str
    units: tuple[Unit, ...]

    @property
    def nbytes(self) -> int:
        return sum(unit.nbytes for unit in self.units)


def plan_files(units: Iterable[Unit], max_bytes: int) -> list[PlannedFile]:
    """Deal tensors to files of at most `max_bytes` of weights each (at least one unit a file).

    Wider dtypes come first, so that every tensor starts at a multiple of its element size.
    """
    dealt: list[list[Unit]] = []
    filled = 0
    for unit in sorted(units, key=lambda unit: -unit.dtype.itemsize):
        if unit.dtype not in DTYPES:
            raise BridgeError(f"{unit.names[0]} is {unit.dtype}: expected one of {', '.join(map(str, DTYPES))}")
        if not dealt or filled + unit.nbytes > max_bytes:
            dealt.append([])
            filled = 0
        dealt[-1].append(unit)
        filled += unit.nbytes
    if len(dealt) == 1:
        return [PlannedFile(SINGLE, tuple(dealt[0]))]
    names = (f"model-{i + 1:05d}-of-{len(dealt):05d}.safetensors" for i in range(len(dealt)))
    return [PlannedFile(name, tuple(part)) for name, part in zip(names, dealt, strict=True)]


def write_file(folder: Path, file: PlannedFile, produce: Callable[[Unit], Iterable[torch.Tensor]]) -> None:
    """Write one file; `produce` is called for one unit after the other and gives its tensors in order."""
    with (folder / file.name).open("wb") as stream:
        stream.write(_header(file))
        for unit in file.units:
            for name, shape, tensor in zip(unit.names, unit.shapes, produce(unit), strict=True):
                assert tuple(tensor.shape) == shape and tensor.dtype == unit.dtype, f"{name} is not as planned"
                stream.write(memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy()))


def write_index(folder: Path, files: list[PlannedFile]) -> None:
    """The index of several files; nothing for one."""
    if len(files) == 1:
        return
    weight_map = {name: file.name for file in files for unit in file.units for name in unit.names}
    index = {"metadata": {"total_size": sum(file.nbytes for file in files)}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _header(file: PlannedFile) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for unit in file.units:
        for name, shape in zip(unit.names, unit.shapes, strict=True):
            stop = start + math.prod(shape) * unit.dtype.itemsize
            entries[name] = {"dtype": DTYPES[unit.dtype], "shape": list(shape), "data_offsets": [start, stop]}
            start = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
