"""The one task that a step has on a node: python -m slurm.node --record FILE [--scratch FOLDER] [--interface NAME]
-- COMMAND …

`{node}` in the arguments is this node's number. It runs COMMAND and leaves its exit code in FILE. To Slurm, an end that
the command has explained (exit_codes.TOLD) is a good one, so that the other nodes can end by themselves; any other end
is a bad exit, at which Slurm ends the step. With --scratch, COMMAND has a temporary folder of its own there. With
--interface, an engine over several nodes finds this node at the address of that interface (VLLM_HOST_IP); vLLM itself
would take the interface of the default route, which on a cluster is often one that other nodes cannot reach. gloo gets
the interface's full name (GLOO_SOCKET_IFNAME), because it knows neither NCCL's lists nor its signs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from megatron_srpo.core import streams
from megatron_srpo.core.exit_codes import TOLD, UNHEALTHY
from megatron_srpo.run.stopping import hold_requeue

VLLM_ADDRESS, GLOO_INTERFACE = "VLLM_HOST_IP", "GLOO_SOCKET_IFNAME"


def main(arguments: Sequence[str]) -> int:
    node = os.environ["SLURM_NODEID"]
    filled = [part.replace("{node}", node) for part in arguments]
    split = filled.index("--")
    options, command = _parse(filled[:split]), filled[split + 1 :]
    hold_requeue()  # Slurm signals every process of a step: all that start from here leave it to the training loop
    signal.signal(signal.SIGTERM, lambda number, frame: None)  # the command gets it too: wait for its end
    code = _run(options, command)
    options.record.write_text(f"{code}\n")
    return 0 if code in TOLD else code


def _run(options: argparse.Namespace, command: Sequence[str]) -> int:
    added = {}
    if options.interface:
        interface, address = interface_of(options.interface)
        if not address:
            known = ", ".join(psutil.net_if_addrs())
            return _unhealthy(
                f"SRPO_INTERFACE = {options.interface}: no such interface has an address; the node has {known}"
            )
        found = {VLLM_ADDRESS: address, GLOO_INTERFACE: interface}
        added = {name: value for name, value in found.items() if name not in os.environ}  # what the site has set stays
    if problem := _scratch_problem(options.scratch):
        return _unhealthy(f"SRPO_SCRATCH = {options.scratch}: {problem}")
    with _temporary(options.scratch) as folder:
        environment = {**os.environ, **added, **folder}
        code = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, check=False).returncode
    return code if code >= 0 else 128 - code


def _unhealthy(problem: str) -> int:
    host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    print(f"{host}: {problem}", file=sys.stderr, flush=True)
    return UNHEALTHY


def _scratch_problem(scratch: Path | None) -> str:
    """Why no temporary folder can be made there, or ""."""
    if scratch is None:
        return ""
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=scratch):
            return ""
    except OSError as error:
        return f"nothing can be written there ({error.strerror})"


def interface_of(names: str) -> tuple[str, str]:
    """Name and address of the first of these interfaces, separated by commas, that has an address; "" and "" if none
    has. A name stands for all that begin with it, as in NCCL_SOCKET_IFNAME. IPv4 goes before IPv6, link-local addresses
    are left out."""
    found = psutil.net_if_addrs()
    for name in names.removeprefix("=").split(","):
        matching = [name] if name in found else sorted(other for other in found if other.startswith(name))
        for family in (socket.AF_INET, socket.AF_INET6):
            for interface in matching:
                for entry in found[interface]:
                    if entry.family == family and not entry.address.startswith("fe80"):
                        return interface, entry.address
    return "", ""


@contextlib.contextmanager
def _temporary(scratch: Path | None) -> Iterator[dict[str, str]]:
    """Variables that name a folder which is made here and removed afterwards, never one that was there before. (Slurm
    itself sets TMPDIR to /tmp where the folder that it names is absent.)"""
    if scratch is None:
        yield {}
        return
    with tempfile.TemporaryDirectory(prefix="srpo-job-", dir=scratch, ignore_cleanup_errors=True) as made:
        yield {"TMPDIR": made}


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="slurm.node")
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--interface", default="")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    streams.guard()
    sys.exit(main(sys.argv[1:]))
