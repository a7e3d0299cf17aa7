"""Reads which steps an offline W&B run has recorded, so that tests can see that each step is there once.

The offline file is a sequence of protocol buffers in LevelDB's log format: blocks of 32 KiB that contain chunks of
[checksum 4 bytes, length 2, kind 1] and data.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

BLOCK, FILE_HEADER, CHUNK_HEADER = 32768, 7, 7
FULL, FIRST, LAST = 1, 2, 4


def offline_steps(folder: Path, run_id: str) -> list[int]:
    """The "step" of every history record in `folder`/wandb/offline-run-*, in order."""
    from wandb.proto.wandb_internal_pb2 import Record

    steps = []
    for file in sorted(folder.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb")):
        for data in _records(file.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            for item in record.history.item:
                if item.key == "step" or list(item.nested_key) == ["step"]:
                    steps.append(int(json.loads(item.value_json)))
    return steps


def _records(content: bytes) -> Iterator[bytes]:
    position, parts = FILE_HEADER, b""
    while position + CHUNK_HEADER <= len(content):
        left = BLOCK - position % BLOCK
        if left < CHUNK_HEADER:  # the rest of a block is padding
            position += left
            continue
        length = int.from_bytes(content[position + 4 : position + 6], "little")
        kind, start = content[position + 6], position + CHUNK_HEADER
        data, position = content[start : start + length], start + length
        parts = data if kind in (FULL, FIRST) else parts + data
        if kind in (FULL, LAST):
            yield parts
