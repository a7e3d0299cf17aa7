"""A checkpoint's files cannot run code when they are loaded."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_srpo.core.errors import UserError
from megatron_srpo.mcore.safe_files import INDEX, read_index, read_tensors, refuse_objects


class Hostile:
    """Unpickled by a plain loader, it makes a file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def index(**keys):
    entry = TensorStorageMetadata(TensorProperties(dtype=torch.bfloat16), torch.Size([2]), [])
    return Metadata(state_dict_metadata={"weight": entry, **keys})


def test_an_index_is_read_back(tmp_path):
    (tmp_path / INDEX).write_bytes(pickle.dumps(index()))
    assert read_index(tmp_path) == index()


@pytest.mark.parametrize("where", ["alone", "inside"])
def test_an_index_that_would_run_code_is_refused_and_does_not(tmp_path, where):
    mark = tmp_path / "ran"
    hostile = Hostile(mark) if where == "alone" else index(extra=Hostile(mark))
    (tmp_path / INDEX).write_bytes(pickle.dumps(hostile))
    with pytest.raises(UserError, match=r"was not loaded: it names posix.mkdir"):
        read_index(tmp_path)
    assert not mark.exists()
    pickle.loads((tmp_path / INDEX).read_bytes())
    assert mark.is_dir()  # the attack works on whoever does not look


@pytest.mark.parametrize("name", [("builtins", "eval"), ("torch", "load"), ("pathlib", "Path"), ("torch.nn", "Linear")])
def test_no_other_name_is_looked_up(tmp_path, name):
    (tmp_path / INDEX).write_bytes(b"\x80\x02c" + "\n".join(name).encode() + b"\n.")
    with pytest.raises(UserError, match="it names"):
        read_index(tmp_path)


def test_an_object_in_a_tensors_place_is_refused_because_the_loader_would_unpickle_it(tmp_path):
    (tmp_path / INDEX).write_bytes(pickle.dumps(index(**{"layer._extra_state/shard_0_1": BytesStorageMetadata()})))
    refuse_objects(tmp_path)  # never asked for
    (tmp_path / INDEX).write_bytes(pickle.dumps(index(bias=BytesStorageMetadata())))
    with pytest.raises(UserError, match="bias is a pickled object"):
        refuse_objects(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a pickle",
        pickle.dumps(index())[:-5],
        pickle.dumps([1]),
        pickle.dumps(Metadata(None)),
        b"\x80\x02]q\x00(K\x01sr.",
    ],
)
def test_a_broken_index_is_one_message(tmp_path, content):
    (tmp_path / INDEX).write_bytes(content)
    with pytest.raises(UserError, match="no checkpoint's index"):
        read_index(tmp_path)


def test_tensors_and_plain_values_are_read_and_code_is_refused(tmp_path):
    file, mark = Path(tmp_path / "x.pt"), tmp_path / "ran"
    torch.save({"steps": 3, "state": torch.arange(4)}, file)
    assert read_tensors(file)["steps"] == 3
    torch.save({"steps": Hostile(mark)}, file)
    with pytest.raises(UserError, match="was not loaded"):
        read_tensors(file)
    assert not mark.exists()
    file.write_bytes(b"garbage")
    with pytest.raises(UserError, match="was not loaded"):
        read_tensors(file)


@pytest.mark.parametrize("read", [lambda folder: read_index(folder), lambda folder: read_tensors(folder / INDEX)])
def test_a_pipe_or_a_device_is_refused_without_a_hang(tmp_path, read):
    os.mkfifo(tmp_path / INDEX)
    with pytest.raises(UserError, match="was not loaded"):
        read(tmp_path)
    (tmp_path / INDEX).unlink()
    (tmp_path / INDEX).symlink_to("/dev/zero")
    with pytest.raises(UserError, match="was not loaded"):
        read(tmp_path)
