"""torchrun --max-restarts: after a fault the ranks find each other again; after a refusal nothing starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_srpo.core import exit_codes

ROOT = Path(__file__).parents[2]
RANK = """
import os, signal, sys
import torch, torch.distributed as dist

attempt, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
with open(os.path.join(sys.argv[1], f"attempt_{attempt}_rank_{rank}"), "w"):
    pass
dist.init_process_group("gloo")
more = dist.new_group(backend="gloo")
if attempt == 0 and rank == 1:
    how = sys.argv[2]
    os.kill(os.getpid(), signal.SIGKILL) if how == "killed" else os._exit(int(how))
value = torch.ones(1)
dist.all_reduce(value, group=more)
os.write(1, f"sum {int(value)}\\n".encode())  # in one piece: the ranks share the pipe
# As mcore/groups.shutdown does. A rank that leaves its gloo threads to the interpreter's exit may end with SIGABRT.
dist.destroy_process_group()
"""


def restarted(folder: Path, how: str) -> tuple[int, int, list[str]]:
    """(exit code, sums that ranks have printed, which ranks were started)."""
    (folder / "rank.py").write_text(RANK)
    started = folder / "started"
    started.mkdir()
    command = [sys.executable, "-m", "megatron_srpo.torchrun", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    result = subprocess.run(
        [*command, str(folder / "rank.py"), str(started), how], cwd=ROOT, capture_output=True, text=True, timeout=200,
        check=False,
    )  # fmt: skip
    return result.returncode, result.stdout.count("sum 2"), sorted(path.name for path in started.iterdir())


def test_ranks_that_are_started_again_after_one_was_killed_find_each_other(tmp_path):
    code, sums, started = restarted(tmp_path, "killed")
    assert (code, sums) == (exit_codes.DONE, 2)
    assert started == [f"attempt_{attempt}_rank_{rank}" for attempt in (0, 1) for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("code", exit_codes.FINAL)
def test_ranks_that_refused_or_stopped_as_asked_are_not_started_again(tmp_path, code):
    assert restarted(tmp_path, str(code)) == (code, 0, ["attempt_0_rank_0", "attempt_0_rank_1"])
