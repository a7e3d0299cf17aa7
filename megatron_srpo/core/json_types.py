"""The types of values that JSON and TOML can hold, and JSON files that come from elsewhere."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Union

JsonValue = Union[None, bool, int, float, str, list["JsonValue"], dict[str, "JsonValue"]]  # noqa: UP007
JsonObject = dict[str, JsonValue]


def parse_json(text: str | bytes) -> JsonValue:
    """The value of a JSON text. ValueError if it is not JSON, not UTF-8, or nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: Path) -> JsonValue:
    """The value of a JSON file. ValueError as in `parse_json`, and for a named pipe or a device, which might never end;
    OSError if the file cannot be read."""
    with open(path, "rb", opener=open_without_waiting) as file:
        require_regular(file.fileno())
        return parse_json(file.read())


def read_weight_map(index: Path) -> dict[str, str]:
    """Tensor name → file name, from the index of a model's safetensors files. ValueError if it is no such index."""
    match read_json(index):
        case {"weight_map": dict(names)} if all(isinstance(file, str) for file in names.values()):
            return {name: str(file) for name, file in names.items()}
    raise ValueError('expected {"weight_map": {tensor: file}}')


def open_without_waiting(path: str, flags: int) -> int:
    """An `opener` for open(): a named pipe to which nobody writes does not block."""
    return os.open(path, flags | os.O_NONBLOCK)


def require_regular(descriptor: int) -> None:
    """ValueError if the open file is a named pipe or a device."""
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise ValueError("it is no regular file")
