"""The engine servers of a node: python -m slurm.serve --hosts A,B --port P --gpus N --size S -- COMMAND …

`python -m megatron_srpo serve` for every S of the node's N GPUs, on the node's address and ports that count up: COMMAND
with `--host` and `--port`. A server that ends is started again, RESTARTS times in all on a node; training waits for it
and sends it the weights. One that refuses its configuration ends them all, as SIGTERM does.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from megatron_srpo.core import exit_codes, streams

RESTARTS = 3
LOOK_SECONDS = 0.5
END_SECONDS = 20


class Server:
    """One server process, of GPUs of its own."""

    def __init__(self, command: Sequence[str], host: str, port: int, gpus: Sequence[str], log: Path) -> None:
        self.url = f"http://{host}:{port}"
        self._command = [*command, "--host", host, "--port", str(port)]
        self._environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(gpus)}
        self._log = log
        self.start()

    def start(self) -> None:
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command, env=self._environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def end(self) -> None:
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(END_SECONDS)
        self.process.kill()
        self.process.wait()


def main(arguments: Sequence[str]) -> int:
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: ended.set())
    options, command = parse(arguments)
    node = int(os.environ["SLURM_NODEID"])
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    gpus = visible.split(",") if visible else [str(number) for number in range(options.gpus)]
    servers = []
    for i, (host, port) in enumerate(node_addresses(options, node)):
        own = gpus[i * options.size : (i + 1) * options.size]
        servers.append(Server(command, host, port, own, options.logs / f"engine-{node}-{i}.log"))
        print(f"engine server: {servers[-1].url}", flush=True)
    code = watch(servers, ended)
    for server in servers:
        server.end()
    return code


def node_addresses(options: argparse.Namespace, node: int) -> list[tuple[str, int]]:
    """Host and port of each server of a node; commands.server_urls says the same of all nodes."""
    count, host = options.gpus // options.size, options.hosts.split(",")[node]
    return [(host, options.port + node * count + i) for i in range(count)]


def watch(servers: list[Server], ended: threading.Event) -> int:
    """Until `ended`, or until a server is not to be started again; the exit code."""
    left = RESTARTS
    while not ended.wait(LOOK_SECONDS):
        for server in servers:
            code = server.process.poll()
            if code is None:
                continue
            print(f"engine server {server.url} ended with exit code {code}", file=sys.stderr, flush=True)
            if code == exit_codes.MISTAKE or left == 0:
                return exit_codes.MISTAKE if code == exit_codes.MISTAKE else 1
            left -= 1
            server.start()
    return exit_codes.DONE


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    split = list(arguments).index("--")
    parser = argparse.ArgumentParser(prog="slurm.serve")
    parser.add_argument("--hosts", required=True, help="addresses of the engine nodes, in order, by comma")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--gpus", type=int, required=True)
    parser.add_argument("--size", type=int, required=True, help="GPUs of a server")
    parser.add_argument("--logs", type=Path, required=True)
    return parser.parse_args(arguments[:split]), list(arguments[split + 1 :])


if __name__ == "__main__":
    streams.guard()
    sys.exit(main(sys.argv[1:]))
