"""Files and folders that appear complete or not at all, whatever happens while they are written."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import nullcontext, suppress

import pytest

from megatron_srpo.core import atomic
from megatron_srpo.core.atomic import (
    atomic_file,
    atomic_folder,
    atomic_write,
    remove_leftovers,
    replace_folder,
    set_aside,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_is_written_and_replaced_and_nothing_else_remains(tmp_path, durable):
    for text in ("old", "new ρ\n"):
        atomic_write(tmp_path / "run.json", text, durable=durable)
    assert (tmp_path / "run.json").read_text(encoding="utf-8") == "new ρ\n"
    assert names(tmp_path) == ["run.json"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_file_whose_writing_fails_stays_as_it_was(tmp_path, error):
    (tmp_path / "run.json").write_text("old")
    with pytest.raises(type(error)), atomic_file(tmp_path / "run.json") as aside:
        aside.write_text("half")
        raise error
    assert (tmp_path / "run.json").read_text() == "old" and names(tmp_path) == ["run.json"]


def test_a_file_that_nobody_wrote_leaves_the_old_one(tmp_path):
    (tmp_path / "run.json").write_text("old")
    with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "run.json"):
        pass
    assert (tmp_path / "run.json").read_text() == "old"


def test_the_bytes_are_on_the_disk_before_a_durable_file_has_its_name(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append((tmp_path / "run.json").exists()))
    atomic_write(tmp_path / "run.json", "text")
    assert synced == []
    (tmp_path / "run.json").unlink()
    atomic_write(tmp_path / "run.json", "text", durable=True)
    assert synced == [False]


def test_a_folder_replaces_an_old_one_whole(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/old").touch()
    with atomic_folder(tmp_path / "model") as aside:
        (aside / "new").touch()
        assert names(tmp_path / "model") == ["old"]
    assert names(tmp_path) == ["model"] and names(tmp_path / "model") == ["new"]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_folder_is_replaced_where_the_file_system_can_exchange_names_and_where_it_cannot(
    tmp_path, monkeypatch, can_exchange
):
    if not can_exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/old").touch()
    with atomic_folder(tmp_path / "model") as aside:
        (aside / "new").touch()
    assert names(tmp_path) == ["model"] and names(tmp_path / "model") == ["new"]


@pytest.mark.parametrize("can_exchange", [True, False])
@pytest.mark.parametrize("killed_at", range(4))
def test_wherever_a_replacement_is_killed_a_whole_folder_has_the_name_after_the_next_start(
    tmp_path, monkeypatch, can_exchange, killed_at
):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/old").touch()
    writing = tmp_path / ".hf.writing-12"
    writing.mkdir()
    (writing / "new").touch()
    calls = 0

    def killing(real):
        def call(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls > killed_at:
                raise KeyboardInterrupt
            return real(*arguments, **options)

        return call

    monkeypatch.setattr(atomic, "_exchange", killing(atomic._exchange) if can_exchange else lambda one, other: False)
    monkeypatch.setattr(type(tmp_path), "rename", killing(type(tmp_path).rename))
    monkeypatch.setattr(atomic.shutil, "rmtree", killing(atomic.shutil.rmtree))
    with suppress(KeyboardInterrupt):
        replace_folder(writing, tmp_path / "hf")
    assert not can_exchange or (tmp_path / "hf").is_dir()  # even without a next start
    monkeypatch.undo()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["hf"] and names(tmp_path / "hf") in (["old"], ["new"])


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path):
    for name in (".hf.writing-7", ".hf.replaced-8", "hf", "writing-1", ".hf.writing", "checkpoints"):
        (tmp_path / name).mkdir()
    for name in (".config.writing-7.toml", "config.toml", ".latest.writing-9", ".hidden"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == [".hf.writing", ".hidden", "checkpoints", "config.toml", "hf", "writing-1"]


def test_a_folder_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(atomic, "sync", lambda path: synced.append((path.name, (tmp_path / "hf").exists())))
    with atomic_folder(tmp_path / "hf") as aside:
        (aside / "weights").touch()
    assert synced == [("weights", False), (aside.name, False), (tmp_path.name, True)]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EIO])
def test_a_folder_is_written_where_the_file_system_cannot_sync_folders_but_not_where_that_fails(
    tmp_path, monkeypatch, number
):
    fsync = os.fsync

    def of_files_alone(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", of_files_alone)
    with pytest.raises(OSError) if number == errno.EIO else nullcontext(), atomic_folder(tmp_path / "made") as aside:
        (aside / "file").write_text("x")
    assert (tmp_path / "made" / "file").exists() == (number != errno.EIO)


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    (tmp_path / "disk/hf").mkdir(parents=True)
    (tmp_path / "hf").symlink_to(tmp_path / "disk/hf")
    with atomic_folder(tmp_path / "hf") as aside:
        (aside / "new").touch()
    assert (tmp_path / "hf").is_symlink() and names(tmp_path / "disk/hf") == ["new"]


def test_a_folder_whose_writing_fails_stays_as_it_was(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/old").touch()
    with pytest.raises(OSError, match="full"), atomic_folder(tmp_path / "model") as aside:
        (aside / "new").touch()
        raise OSError("disk full")
    assert names(tmp_path) == ["model"] and names(tmp_path / "model") == ["old"]


def test_a_folder_that_must_not_be_replaced_is_left_alone(tmp_path):
    with pytest.raises(OSError), atomic_folder(tmp_path / "out", replace=False) as aside:
        (aside / "ours").touch()
        (tmp_path / "out").mkdir()  # meanwhile, by somebody else
        (tmp_path / "out/theirs").touch()
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["theirs"]


def test_what_a_killed_writer_left_under_the_same_name_is_dropped(tmp_path):
    left = tmp_path / ".out.writing"
    left.mkdir()
    (left / "stale").touch()
    with atomic_folder(tmp_path / "deep/out", aside=left) as aside:
        assert names(aside) == []
        (tmp_path / "deep").mkdir()
    assert names(tmp_path / "deep") == ["out"] and names(tmp_path) == ["deep"]


def test_the_old_folder_goes_only_when_the_new_one_has_its_name(tmp_path, monkeypatch):
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    monkeypatch.setattr("shutil.rmtree", lambda path, ignore_errors: seen.append((path, names(tmp_path / "old"))))
    seen: list = []
    replace_folder(tmp_path / "new", tmp_path / "old")
    ((replaced, now),) = seen
    assert now == ["new"] and names(replaced) == ["old"]


def test_what_is_set_aside_gets_the_first_free_number(tmp_path):
    for name in ("metrics.jsonl", "metrics.previous.1.jsonl", "checkpoints.previous.1"):
        (tmp_path / name).touch()
    (tmp_path / "checkpoints").mkdir()
    assert set_aside(tmp_path / "metrics.jsonl").name == "metrics.previous.2.jsonl"
    assert set_aside(tmp_path / "checkpoints").name == "checkpoints.previous.2"
    assert names(tmp_path)[0] == "checkpoints.previous.1" and not (tmp_path / "metrics.jsonl").exists()
