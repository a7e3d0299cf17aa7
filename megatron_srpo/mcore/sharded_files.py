"""Writes and reads Megatron's sharded checkpoint format one tensor at a time, without process groups.

A checkpoint in this format (torch_dist) is a folder: `metadata.json` names the format, `common.pt` holds plain data,
`__R_N.distcp` are the chunks of all tensors, one `torch.save` record after another, and `.metadata` says which chunk
of where each tensor is. Megatron's own functions write and read whole models at once, on all ranks. They can read
what is written here, and the other way round.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, maybe_load_config, save_config
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_srpo.core.errors import UserError
from megatron_srpo.mcore.checkpoint import BACKEND, COMMON
from megatron_srpo.mcore.safe_files import INDEX, read_index

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

PIECE_BYTES = 2**20  # how much of a chunk is read at a time


@dataclass(frozen=True)
class Written:
    """One chunk: its tensor and offset, where it is, its shape, and the dtype and shape of the whole tensor."""

    index: MetadataIndex
    place: _StorageInfo
    chunk: tuple[int, ...]
    dtype: torch.dtype
    size: tuple[int, ...]


class RankFile:
    """The file of one rank of the layout; a context manager. `finish` needs what it has `written`."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.name = f"__{rank}_0.distcp"
        self.written: list[Written] = []
        self._stream = (folder / self.name).open("wb")

    def __enter__(self) -> RankFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.close()

    def add(self, tensor: ShardedTensor) -> None:
        """Append one chunk. If it is a view, only its own values are written."""
        data = tensor.data.detach().view((1,) * tensor.prepend_axis_num + tuple(tensor.local_shape)).contiguous()
        if data.untyped_storage().nbytes() != data.nbytes:
            data = data.clone()
        start = self._stream.tell()
        torch.save(data, self._stream)
        place = _StorageInfo(self.name, start, self._stream.tell() - start)
        index = MetadataIndex(tensor.key, tensor.global_offset)
        self.written.append(Written(index, place, tuple(data.shape), data.dtype, tuple(tensor.global_shape)))


def finish(folder: Path, written: Iterable[Written], common: dict[str, Any]) -> None:
    """Complete the ranks' files to a checkpoint: write the index of all chunks, `common` (plain data), and the format.

    Trainers find no optimizer state in it and start at step 0.
    """
    index = Metadata({}, storage_data={}, storage_meta=StorageMeta(), version=CURRENT_DCP_VERSION)
    for record in written:
        whole = TensorStorageMetadata(TensorProperties(record.dtype), torch.Size(record.size), [])
        offset = record.index.offset
        assert offset is not None
        entry = index.state_dict_metadata.setdefault(record.index.fqn, whole)
        assert isinstance(entry, TensorStorageMetadata)
        entry.chunks.append(ChunkStorageMetadata(offset, torch.Size(record.chunk)))
        index.storage_data[record.index] = record.place
    torch.save({**common, "progress": {"steps": 0, "adam_steps": 0}}, folder / COMMON)
    (folder / INDEX).write_bytes(pickle.dumps(index))
    save_config(CheckpointingConfig(*BACKEND), str(folder))


class ShardedReader:
    """Reads any region of any tensor of a checkpoint. It holds what it returns and one piece of a chunk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._index = _index(folder)

    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every tensor, by key."""
        found = self._index.state_dict_metadata.items()
        return {
            key: (tuple(entry.size), entry.properties.dtype)
            for key, entry in found
            if isinstance(entry, TensorStorageMetadata)
        }

    def read(self, key: str, offset: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
        """The region [offset, offset + shape) of a tensor. UserError when the checkpoint does not hold all of it."""
        entry = self._index.state_dict_metadata[key]
        assert isinstance(entry, TensorStorageMetadata)
        target = torch.empty(tuple(shape), dtype=entry.properties.dtype)
        filled = 0
        for chunk in entry.chunks:
            spans = [
                (max(have, want), min(have + size, want + wanted))
                for have, size, want, wanted in zip(chunk.offsets, chunk.sizes, offset, shape, strict=True)
            ]
            if any(start >= stop for start, stop in spans):
                continue
            place = tuple(slice(a - want, b - want) for (a, b), want in zip(spans, offset, strict=True))
            taken = tuple(slice(a - have, b - have) for (a, b), have in zip(spans, chunk.offsets, strict=True))
            record = self._index.storage_data[MetadataIndex(key, chunk.offsets)]
            self._copy(record, chunk.sizes, taken, target[place])
            filled += target[place].numel()
        if filled != target.numel():
            raise UserError(
                f"{self.folder}: {key} has {filled:,} of the {target.numel():,} values that its index tells of: the "
                "checkpoint is incomplete. Use another one."
            )
        return target

    def _copy(self, record: _StorageInfo, sizes: torch.Size, taken: tuple[slice, ...], target: torch.Tensor) -> None:
        """target ← chunk[taken]. Rows are read piece by piece, up to the last one that is needed."""
        axis = next(
            (i for i, size in enumerate(sizes) if size > 1), len(sizes) - 1
        )  # the axes before it have one index
        row = math.prod(sizes[axis + 1 :]) * target.dtype.itemsize
        step = max(1, PIECE_BYTES // max(1, row))
        target, rest = target[(0,) * axis], taken[axis + 1 :]
        path = self.folder / record.relative_path
        with _raw(path, record, math.prod(sizes) * target.dtype.itemsize) as stream:
            for start in range(0, taken[axis].stop, step):
                count = min(step, taken[axis].stop - start)
                piece = torch.frombuffer(bytearray(_exactly(stream, count * row, path)), dtype=target.dtype)
                first = max(start, taken[axis].start)
                if first < start + count:
                    part = piece.view(count, *sizes[axis + 1 :])[(slice(first - start, None), *rest)]
                    target[first - taken[axis].start : start + count - taken[axis].start] = part


def _index(folder: Path) -> Metadata:
    config = maybe_load_config(str(folder))
    if config is None:
        raise UserError(
            f"{folder} is no Megatron checkpoint: expected a folder with metadata.json in Megatron's sharded format"
        )
    if config.sharded_backend != BACKEND[0]:
        raise UserError(
            f"{folder} is in Megatron's format {config.sharded_backend!r}: expected {BACKEND[0]!r}. Load it with "
            "Megatron and save it in that format."
        )
    if not (folder / INDEX).is_file():
        raise UserError(f"{folder} has no {INDEX}: the checkpoint is incomplete. Use another one.")
    return read_index(folder)


class _Window(io.RawIOBase):
    """The bytes [start, start + length) of a file, as a file object."""

    def __init__(self, stream: io.FileIO, start: int, length: int) -> None:
        self._stream, self._start, self._length, self._at = stream, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = origin + offset
        return self._at

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer)[: max(0, self._length - self._at)]
        self._stream.seek(self._start + self._at)
        count = self._stream.readinto(view) or 0
        self._at += count
        return count

    def close(self) -> None:
        self._stream.close()
        super().close()


def _raw(path: Path, record: _StorageInfo, size: int) -> IO[bytes]:
    """The tensor's bytes inside a `torch.save` record, which is a zip archive with checksums and without compression.
    The record's pickle is not read."""
    try:
        archive = zipfile.ZipFile(_Window(path.open("rb", buffering=0), record.offset, record.length))
        (data,) = (entry for entry in archive.infolist() if "/data/" in entry.filename)
        if data.file_size != size:
            raise ValueError(f"a chunk has {data.file_size:,} bytes, expected {size:,}")
        return archive.open(data)
    except (OSError, zipfile.BadZipFile, ValueError) as error:
        raise _damaged(path, error) from None


def _exactly(stream: IO[bytes], size: int, path: Path) -> bytes:
    try:
        content = stream.read(size)
        if len(content) != size:
            raise EOFError("it ends too early")
        return content
    except (OSError, zipfile.BadZipFile, EOFError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> UserError:
    if isinstance(error, OSError):  # the disk, which says nothing about the bytes
        return UserError(f"{path} cannot be read ({error.strerror or error}). Make it readable and try again.")
    return UserError(f"{path} cannot be read ({error}): the checkpoint is damaged. Use another one.")
