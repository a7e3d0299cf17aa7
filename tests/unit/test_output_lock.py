"""Two runs never share an output folder; a killed one leaves nothing that has to be removed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from megatron_srpo.core.errors import UserError
from megatron_srpo.run.output_lock import LOCK_FILE, OutputLock

HOLDER = """
import sys
from pathlib import Path
from megatron_srpo.run.output_lock import OutputLock
lock = OutputLock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_the_second_run_is_refused_with_the_first_ones_process_until_that_is_killed(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=rf"in use by another run \(process {holder.pid} on .*--run.output_dir"):
        OutputLock(tmp_path)
    holder.kill()
    holder.communicate()
    with OutputLock(tmp_path):
        assert (tmp_path / LOCK_FILE).read_text().startswith(f"process {os.getpid()} on ")


def test_the_lock_ends_with_its_block_and_programs_started_meanwhile_do_not_keep_it(tmp_path):
    with OutputLock(tmp_path):
        child = subprocess.Popen(["sleep", "1000"])
    try:
        OutputLock(tmp_path).release()
    finally:
        child.kill()
        child.wait()


def test_a_folder_that_is_deleted_while_its_run_goes_on_is_told_once_and_locked_again(tmp_path):
    out, told = tmp_path / "out", []
    with OutputLock(out) as lock:
        lock.renew(told.append)
        assert told == []
        shutil.rmtree(out)
        lock.renew(told.append)
        lock.renew(told.append)
        assert len(told) == 1 and f"{out}, or the lock file in it, was deleted or replaced" in told[0]
        with pytest.raises(UserError, match="in use by another run"):
            OutputLock(out)
    OutputLock(out).release()


def test_a_run_whose_deleted_folder_another_run_has_taken_is_refused(tmp_path):
    out = tmp_path / "out"
    with OutputLock(out) as lock:
        shutil.rmtree(out)
        with OutputLock(out), pytest.raises(UserError, match="in use by another run"):
            lock.renew(lambda text: None)
