"""A full disk is recognised through whatever a library wraps around it, and nothing else is."""

from __future__ import annotations

import errno
import os

import pytest
from torch.distributed.checkpoint.api import CheckpointException

from megatron_srpo.core.disk import disk_problem

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/x/metrics.jsonl")


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (FULL, "runs/x/metrics.jsonl: No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "runs/x"), "runs/x: Permission denied"),
        (OSError(errno.EROFS, "Read-only file system"), "the disk: Read-only file system"),
        (caused(RuntimeError("saving failed"), FULL), "runs/x/metrics.jsonl: No space left on device"),
        (CheckpointException("write", {1: (FULL, None)}), "runs/x/metrics.jsonl: No space left on device"),
        (
            RuntimeError('IoError(Os { code: 28, kind: StorageFull, message: "No space left on device" })'),
            "the disk: No space left on device",
        ),
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"),
            "the disk: No space left on device",
        ),
    ],
)
def test_the_disks_word_is_found(error, told):
    assert disk_problem(error) == told


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shapes differ"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "x"),
        CheckpointException("write", {}),
        CheckpointException("write", {0: (ValueError("x"), None)}),
        caused(ValueError("a"), KeyError("b")),
    ],
)
def test_other_errors_are_not_the_disks(error):
    assert disk_problem(error) is None


def test_a_missing_folder_is_the_disks_problem_where_files_are_written():
    missing = FileNotFoundError(errno.ENOENT, "No such file or directory", "x")
    assert disk_problem(missing, writing=True) == "x: No such file or directory"


def test_the_systems_error_is_named_before_a_librarys_guess_that_the_disk_is_full():
    guess = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")
    assert disk_problem(caused(guess, OSError(errno.EIO, "Input/output error", "x"))) == "x: Input/output error"


def test_a_circle_of_causes_ends():
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__cause__ = second, first
    assert disk_problem(first) is None
