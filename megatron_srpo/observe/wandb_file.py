"""Which steps an offline W&B run has already recorded.

A run that goes on repeats the steps after its checkpoint; W&B would show those twice. Its offline file is a sequence of
protocol buffers in LevelDB's log format: blocks of 32 KiB, in them chunks of [checksum 4, length 2, kind 1] and data.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

BLOCK, FILE_HEADER, CHUNK_HEADER = 32768, 7, 7
FULL, FIRST, LAST = 1, 2, 4


def offline_steps(folder: Path, run_id: str) -> list[int]:
    """The "step" of every history record in `folder`/wandb/offline-run-*, in order, up to a file's torn end."""
    steps = []
    for file in sorted(folder.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb")):
        steps += _steps(file)
    return steps


def _steps(file: Path) -> Iterator[int]:
    from wandb.proto.wandb_internal_pb2 import Record

    for data in _records(file.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        for item in record.history.item:
            if item.key == "step" or list(item.nested_key) == ["step"]:
                yield int(json.loads(item.value_json))


def _records(content: bytes) -> Iterator[bytes]:
    """The whole records of a file; ends where it is torn."""
    position, parts = FILE_HEADER, b""
    while position + CHUNK_HEADER <= len(content):
        left = BLOCK - position % BLOCK
        if left < CHUNK_HEADER:  # the rest of a block is padding
            position += left
            continue
        length = int.from_bytes(content[position + 4 : position + 6], "little")
        kind, start = content[position + 6], position + CHUNK_HEADER
        if start + length > len(content) or not FULL <= kind <= LAST:
            return
        data, position = content[start : start + length], start + length
        parts = data if kind in (FULL, FIRST) else parts + data
        if kind in (FULL, LAST):
            yield parts
