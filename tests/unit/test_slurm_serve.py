"""The engine servers of a node, with small programs in their place: GPUs, ports, and what an end leads to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from megatron_srpo.core import exit_codes
from slurm.serve import RESTARTS

ROOT = Path(__file__).parents[2]


def start(folder: Path, program: str, **environment: str) -> subprocess.Popen:
    """Two servers of two GPUs each on the second of two nodes."""
    where = ["--hosts=a,b", "--port=100", "--gpus=4", "--size=2", f"--logs={folder}"]
    command = [sys.executable, "-m", "slurm.serve", *where, "--", "bash", "-c", program, "server"]
    return subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "SLURM_NODEID": "1", **environment}, stdout=subprocess.PIPE, text=True
    )


def told(folder: Path) -> list[str]:
    return sorted(line for log in folder.glob("engine-1-*.log") for line in log.read_text().splitlines())


@pytest.mark.parametrize(
    ("code", "ends", "starts"), [(exit_codes.MISTAKE, exit_codes.MISTAKE, 2), (7, 1, 2 + RESTARTS)]
)
def test_a_server_that_ends_is_started_again_some_times_and_one_that_refuses_never(tmp_path, code, ends, starts):
    program = f"echo started; if [ $4 = 102 ]; then exit {code}; else exec sleep 60; fi"
    servers = start(tmp_path, program)
    servers.communicate(timeout=60)
    assert servers.returncode == ends
    assert len(told(tmp_path)) == starts


@pytest.mark.parametrize(("visible", "gpus"), [("", ["0,1", "2,3"]), ("4,5,6,7", ["4,5", "6,7"])])
def test_every_server_has_gpus_and_a_port_of_its_own_and_sigterm_ends_all(tmp_path, visible, gpus):
    program = 'echo "$CUDA_VISIBLE_DEVICES $*"; exec sleep 60'
    servers = start(tmp_path, program, CUDA_VISIBLE_DEVICES=visible)
    assert [servers.stdout.readline() for _ in range(2)] == [f"engine server: http://b:{port}\n" for port in (102, 103)]
    children = psutil.Process(servers.pid).children(recursive=True)
    while len(told(tmp_path)) < 2:
        os.sched_yield()
    servers.send_signal(signal.SIGTERM)
    assert servers.wait(timeout=60) == exit_codes.DONE
    assert told(tmp_path) == [f"{gpus[0]} --host b --port 102", f"{gpus[1]} --host b --port 103"]
    assert not psutil.wait_procs(children, timeout=10)[1]
