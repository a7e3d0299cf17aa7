"""Two runs never share an output folder; a killed one leaves nothing that has to be removed."""

from __future__ import annotations

import os
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
