"""metrics.jsonl: every line is JSON, a resume drops what it repeats, a full disk stops nothing."""

from __future__ import annotations

import errno
import json
import math
import os
import resource

import numpy as np
import pytest
import torch

from megatron_srpo.observe.metrics import JsonlWriter, json_line, read_records


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def writer(path, said=None):
    return JsonlWriter(path, (said if said is not None else []).append)


def test_a_line_is_strict_json_with_the_step_first():
    values = {"b": float("nan"), "a": math.inf, "c": -math.inf, "n": 3, "t": torch.tensor(0.5), "x": np.float32(0.25)}
    line = json_line(7, values)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    record = json.loads(line, parse_constant=refuse)
    assert line.startswith('{"step": 7, ')
    assert record == {"step": 7, "b": "NaN", "a": "Infinity", "c": "-Infinity", "n": 3, "t": 0.5, "x": 0.25}
    assert math.isnan(float(record["b"])) and float(record["c"]) == -math.inf


def test_a_metric_named_step_does_not_hide_the_step():
    assert json.loads(json_line(3, {"step": 99, "a": 1.0})) == {"step": 3, "a": 1.0}


def test_a_line_is_on_the_disk_when_log_returns(tmp_path):
    log = writer(tmp_path / "deep/er/metrics.jsonl")
    log.log(1, {"a": 1.0})
    assert lines(tmp_path / "deep/er/metrics.jsonl") == [{"step": 1, "a": 1.0}]
    log.close()


def test_a_resume_drops_later_lines_and_a_torn_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = writer(path)
    for step in range(6):
        log.log(step, {"a": float(step)})
    log.close()
    with path.open("a") as file:
        file.write('{"step": 6, "a": 0.')  # as a killed process leaves it
    log = writer(path)
    log.resume(3)
    log.log(4, {"a": 40.0})
    log.close()
    assert [(row["step"], row["a"]) for row in lines(path)] == [(0, 0), (1, 1), (2, 2), (3, 3), (4, 40)]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_fresh_start_keeps_an_earlier_runs_lines_under_another_name(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 5}\n')
    log = writer(path)
    log.resume(0)
    log.log(0, {})
    log.close()
    assert lines(path) == [{"step": 0}]
    assert lines(tmp_path / "metrics.previous.1.jsonl") == [{"step": 5}]


def test_readers_pass_over_what_is_no_record(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n[1]\n\n{"a": 2}\n{"step": "x"}\n\xff\xfe\n{"step": 2, "a"')
    assert list(read_records(path)) == [{"step": 1}]


@pytest.fixture
def small_disk():
    """A function that limits the size of files that this process may write (None: as before)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (soft if size is None else size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_when_the_disk_is_full_lines_wait_and_nothing_is_torn(tmp_path, small_disk):
    path, said = tmp_path / "metrics.jsonl", []
    log = writer(path, said)
    log.log(1, {"a": 1.0})
    size = path.stat().st_size
    small_disk(size + 5)  # room for a part of the next line
    log.log(2, {"a": 2.0})
    log.log(3, {"a": 3.0})
    during = path.stat().st_size
    small_disk(None)
    log.log(4, {"a": 4.0})
    log.close()
    assert during == size
    assert [row["step"] for row in lines(path)] == [1, 2, 3, 4]
    assert len(said) == 2 and "training goes on" in said[0] and "writing again" in said[1]


def test_lines_that_wait_are_tried_once_more_at_the_end(tmp_path, small_disk):
    path, said = tmp_path / "metrics.jsonl", []
    log = writer(path, said)
    small_disk(0)
    log.log(1, {"a": 1.0})
    small_disk(None)
    log.close()
    assert [row["step"] for row in lines(path)] == [1]
    small_disk(0)
    log.log(2, {})
    log.close()
    small_disk(None)
    assert "1 lines could not be written" in said[-1]


def test_a_file_whose_close_fails_as_on_nfs_is_opened_again(tmp_path, monkeypatch):
    """NFS tells of a full quota when a file is closed, which closes it all the same."""
    said, close = [], os.close
    log = writer(tmp_path / "m.jsonl", said)
    log.log(1, {"a": 1.0})

    def failing(number):
        close(number)
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    (tmp_path / "m.jsonl").rename(tmp_path / "moved")  # the open file is closed at the next line
    monkeypatch.setattr(os, "close", failing)
    log.log(2, {"a": 2.0})
    monkeypatch.setattr(os, "close", close)
    log.log(3, {"a": 3.0})
    assert [line["step"] for line in lines(tmp_path / "m.jsonl")] == [2, 3]
    monkeypatch.setattr(os, "close", failing)
    log.close()
    assert "Disk quota exceeded" in said[-1]


def test_a_file_that_another_host_has_deleted_is_made_again(tmp_path, monkeypatch):
    said, fstat = [], os.fstat
    log = writer(tmp_path / "m.jsonl", said)
    log.log(1, {"a": 1.0})

    def stale(number):
        monkeypatch.setattr(os, "fstat", fstat)
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(os, "fstat", stale)
    log.log(2, {"a": 2.0})
    assert [line["step"] for line in lines(tmp_path / "m.jsonl")] == [1, 2]
    assert said == [f"{tmp_path / 'm.jsonl'} was deleted or replaced; it is continued with this line"]


def test_a_folder_that_cannot_be_made_is_one_warning(tmp_path):
    (tmp_path / "file").write_text("")
    said = []
    log = writer(tmp_path / "file/metrics.jsonl", said)
    log.resume(2)
    log.log(3, {})
    log.log(4, {})
    assert len(said) == 1


def test_a_resumed_file_is_cut_where_the_later_steps_begin_and_what_stays_is_not_touched(tmp_path):
    path = tmp_path / "metrics.jsonl"
    kept = b'{"step": 1, "text": "\xc3\xa9"}\nno record\n{"step": 2}\n'
    for later in (b'{"step": 3}\n{"step": 4}\n', b'{"step": 3', b'{"step": 2, "half', b""):
        path.write_bytes(kept + later)
        file = path.stat().st_ino
        JsonlWriter(path, pytest.fail).resume(2)
        assert path.read_bytes() == kept and path.stat().st_ino == file
