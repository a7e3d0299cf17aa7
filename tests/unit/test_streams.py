"""Standard streams that nobody reads, that are closed, or that cannot express a character: nothing stops."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

WORKS_ON = """
import os, sys
from megatron_srpo.core import streams
streams.guard()
from rich.console import Console
from megatron_srpo.observe.progress import open_progress
log = open_progress(sys.argv[1], name="r", total=3)
sys.stdin.read()  # until the test has done its harm
for step in range(1, 4):
    log.update(step, {"critic/score/mean": 0.5})
    log.message(f"a message → {step}")
    print("printed ·", flush=True)
    os.write(1, b"written by a library")
    sys.stderr.write("an error · →")
    sys.stderr.flush()
log.close()
open(sys.argv[2], "w").write("done")
"""


def started(tmp_path, *, mode="plain", **options):
    command = [sys.executable, "-c", WORKS_ON, mode, str(tmp_path / "end")]
    return subprocess.Popen(command, **{"stdin": subprocess.PIPE, **options})


def ended_well(process, tmp_path):
    process.stdin.close()
    return process.wait() == 0 and (tmp_path / "end").read_text() == "done"


def test_a_reader_that_is_gone_stops_nothing(tmp_path):
    read_end, write_end = os.pipe()
    process = started(tmp_path, stdout=write_end, stderr=write_end)
    os.close(write_end)
    os.close(read_end)
    assert ended_well(process, tmp_path)


@pytest.mark.parametrize("mode", ["auto", "plain"])
def test_a_terminal_that_is_gone_stops_nothing(tmp_path, mode):
    master, slave = pty.openpty()
    process = started(tmp_path, mode=mode, stdout=slave, stderr=slave, start_new_session=True)
    os.close(slave)
    os.close(master)
    assert ended_well(process, tmp_path)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_character_that_the_encoding_lacks_is_written_as_an_escape(tmp_path, encoding):
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    process = started(tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
    process.stdin.close()
    shown = process.stdout.read().decode(encoding)
    assert process.wait() == 0 and "a message \\u2192 3" in shown


CLOSED = """
import os, subprocess, sys
for descriptor in (0, 1, 2):
    os.close(descriptor)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def test_closed_streams_lead_nowhere_and_no_other_file_gets_their_numbers(tmp_path):
    subprocess.run([sys.executable, "-c", CLOSED, "-c", WORKS_ON, "plain", tmp_path / "end"], check=True, timeout=60)
    assert (tmp_path / "end").read_text() == "done"


def test_the_command_line_guards_its_streams():
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "megatron_srpo", "--help"]
    process = subprocess.run(command, stdout=write_end, stderr=write_end, timeout=60)
    os.close(write_end)
    assert process.returncode == 0  # a broken pipe causes 1 or 120


def test_a_file_of_both_streams_has_their_lines_in_order(tmp_path):
    script = "import sys; from megatron_srpo.core import streams; streams.guard(); print('first'); "
    script += "print('second', file=sys.stderr); print('third')"
    with open(tmp_path / "log", "w") as log:
        subprocess.run([sys.executable, "-c", script], stdout=log, stderr=log, check=True)
    assert (tmp_path / "log").read_text().split() == ["first", "second", "third"]
