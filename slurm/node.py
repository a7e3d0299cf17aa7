"""The one task that a step has on a node: python -m slurm.node --record FILE [--scratch FOLDER] -- COMMAND …

`{node}` in the arguments is this node's number. It runs COMMAND and leaves its exit code in FILE. To Slurm, an end that
the command has explained (exit_codes.TOLD) is a good one, so that the other nodes can end by themselves; any other end
is a bad exit, at which Slurm ends the step. With --scratch, COMMAND has a temporary folder of its own there.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_srpo.core import streams
from megatron_srpo.core.exit_codes import TOLD
from megatron_srpo.run.stopping import hold_requeue


def main(arguments: Sequence[str]) -> int:
    node = os.environ["SLURM_NODEID"]
    filled = [part.replace("{node}", node) for part in arguments]
    split = filled.index("--")
    options, command = _parse(filled[:split]), filled[split + 1 :]
    hold_requeue()  # Slurm signals every process of a step: all that start from here leave it to the training loop
    signal.signal(signal.SIGTERM, lambda number, frame: None)  # the command gets it too: wait for its end
    with _temporary(options.scratch) as added:
        environment = {**os.environ, **added}
        code = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, check=False).returncode
    code = code if code >= 0 else 128 - code
    options.record.write_text(f"{code}\n")
    return 0 if code in TOLD else code


@contextlib.contextmanager
def _temporary(scratch: Path | None) -> Iterator[dict[str, str]]:
    """Variables that name a folder which is made here and removed afterwards, never one that was there before. (Slurm
    itself sets TMPDIR to /tmp where the folder that it names is absent.)"""
    if scratch is None:
        yield {}
        return
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="srpo-job-", dir=scratch, ignore_cleanup_errors=True) as made:
        yield {"TMPDIR": made}


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="slurm.node")
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--scratch", type=Path)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    streams.guard()
    sys.exit(main(sys.argv[1:]))
