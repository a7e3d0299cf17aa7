"""One vLLM server as a child process: its command line, its environment, its start and its end."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

from megatron_srpo.config import Config, published_adapters
from megatron_srpo.core import loopback
from megatron_srpo.core.environment import inherited
from megatron_srpo.core.exit_codes import exit_words
from megatron_srpo.core.output_log import last_words
from megatron_srpo.rollout.engine import RolloutError
from megatron_srpo.rollout.vllm import parent_watcher
from megatron_srpo.rollout.vllm.client import MODEL_NAME
from megatron_srpo.rollout.vllm.environment import ENGINE_PREFIXES, prepare_environment
from megatron_srpo.rollout.vllm.preload import preload_links
from megatron_srpo.rollout.vllm.settings import (
    KV_SPACE,
    EngineSettings,
    check_model,
    command_line,
    engine_arguments,
    qualified_name,
)
from megatron_srpo.rollout.vllm.token_middleware import TOKEN_VARIABLE, TokenMiddleware
from megatron_srpo.rollout.vllm.worker_extension import TRANSFER_BACKEND, ServerExtension

READ_BYTES = 2**16  # of a log, for its last words
# Our own in-process engines set these for this process, or the server gets them in another way.
NOT_INHERITED = ("VLLM_ENABLE_V1_MULTIPROCESSING", KV_SPACE)


def watched(*command: str) -> list[str]:
    """A command line that runs `command` under a parent watcher."""
    return [sys.executable, "-I", "-S", parent_watcher.__file__, *command]


def free_port(host: str) -> int:
    """A port of `host` that was free a moment ago."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def server_arguments(settings: EngineSettings, host: str, port: int) -> list[str]:
    """The command line of a server, after the interpreter."""
    arguments = engine_arguments(settings) | {
        "served_model_name": MODEL_NAME,
        "host": host,
        "port": port,
        "worker_extension_cls": qualified_name(ServerExtension),
        "weight_transfer_config": json.dumps({"backend": TRANSFER_BACKEND}),
        "middleware": qualified_name(TokenMiddleware),
        "enable_scale_out": True,
        "disable_uvicorn_access_log": True,
        "enable_log_requests": False,
    }
    return ["-m", "vllm.entrypoints.openai.api_server", *command_line(arguments)]


def server_environment(
    token: str, devices: str | None, threads: int | None, named: Sequence[str] = ()
) -> dict[str, str]:  # fmt: skip
    """The environment variables of a server. `devices` is its CUDA_VISIBLE_DEVICES, None on a CPU. `threads` is the
    number of threads of a CPU worker if OMP_NUM_THREADS is not set, None on a GPU, where vLLM chooses. `named` are
    further variables that it inherits (rollout.server_environment)."""
    found = inherited(named, ENGINE_PREFIXES)
    kept = {name: value for name, value in found.items() if name not in NOT_INHERITED}
    package = str(Path(__file__).parents[3])  # the server may run in another folder than the user
    path = os.pathsep.join(filter(None, [package, kept.get("PYTHONPATH", "")]))
    chosen = {
        TOKEN_VARIABLE: token,
        "PYTHONPATH": path,
        "PYTHONUNBUFFERED": "1",
        "VLLM_SERVER_DEV_MODE": "1",  # the routes for weights; TokenMiddleware refuses others
        # Its own processes meet on this machine. The stream of weights has an address of its own.
        "VLLM_HOST_IP": loopback.ADDRESS,
        "GLOO_SOCKET_IFNAME": loopback.interface(),
        "VLLM_LOGGING_LEVEL": os.environ.get("MEGATRON_SRPO_ENGINE_LOG", "WARNING"),
    }
    if devices is not None:
        chosen["CUDA_VISIBLE_DEVICES"] = devices
    if threads is not None:
        chosen["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(threads))
        # An engine with one worker runs it in its own process. vLLM would start another one to choose its threads,
        # which are chosen here.
        chosen["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        if links := preload_links():
            chosen["LD_PRELOAD"] = links
    return kept | chosen


class VllmServerProcess:
    """A server that ends with this process. Every start appends to `log`, beginning with a line of its own."""

    def __init__(self, settings: EngineSettings, environment: dict[str, str], host: str, port: int, log: Path) -> None:
        """With `port` 0 each start takes a free port."""
        self._settings, self._environment, self._log = settings, environment, log
        self._host, self.fixed_port = host, port
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = 0  # where the log of the last start begins, in bytes
        self.url = ""

    def start(self) -> None:
        """Start the process. It answers at `url` some time later."""
        port = self.fixed_port or free_port(self._host)
        host = f"[{self._host}]" if ":" in self._host else self._host
        self.url = f"http://{host}:{port}"
        self._log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, *server_arguments(self._settings, self._host, port)]
        with self._log.open("ab") as log:
            log.write(f"---- start: {self.url}\n".encode())
            self._started_at = log.tell()
            self._process = subprocess.Popen(
                watched(*command), env=self._environment, stdin=subprocess.PIPE, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    @property
    def pid(self) -> int:
        """The process id of its parent watcher, whose session contains all its processes."""
        assert self._process is not None
        return self._process.pid

    def ended(self) -> str | None:
        """How it ended, in words, or None while it runs."""
        code = None if self._process is None else self._process.poll()
        if self._process is not None and code is None:
            return None
        how = "it was not started" if code is None else f"it ended with {exit_words(code)}"
        return f"{how}: {self.last_words()}"

    def port_was_taken(self) -> bool:
        return "address already in use" in self._since_start().lower()

    def last_words(self) -> str:
        """The last lines of its log that tell something, on one line."""
        return f"{last_words(self._since_start()) or 'it has printed nothing'} (log: {self._log})"

    def _since_start(self) -> str:
        """The end of what it has logged since its last start."""
        with suppress(OSError), self._log.open("rb") as log:
            log.seek(max(self._started_at, log.seek(0, os.SEEK_END) - READ_BYTES))
            return log.read().decode(errors="replace")
        return ""

    def ask_to_stop(self) -> None:
        """Make its parent watcher end it; `wait` waits for that."""
        if self._process is not None and self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.close()

    def wait(self, seconds: float = 15.0) -> None:
        """Wait until it has ended, and kill all its processes after `seconds`."""
        if self._process is None:
            return
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            with suppress(OSError):
                os.killpg(self._process.pid, 9)
            self._process.wait()

    def stop(self) -> None:
        self.ask_to_stop()
        self.wait()


def visible_devices(server: int, tensor_parallel_size: int, given: list[int]) -> str:
    """CUDA_VISIBLE_DEVICES of server number `server`, taken from `given`, or from the GPUs after the training ranks'.

    Raises RolloutError when there are too few."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    own = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    everything = own.split(",") if own else [str(i) for i in range(torch.cuda.device_count())]
    pool = [str(device) for device in given] or everything[ranks:]
    mine = pool[server * tensor_parallel_size : (server + 1) * tensor_parallel_size]
    if len(mine) < tensor_parallel_size:
        raise RolloutError(
            f"rollout.num_servers × tensor_parallel_size wants more GPUs than there are: {len(everything)} GPUs are "
            f"visible, the first {ranks} belong to the training ranks. Start fewer ranks or servers, or name the GPUs: "
            "rollout.server_devices"
        )
    return ",".join(mine)


def check_address(host: str, port: int, host_option: str = "--host", port_option: str = "--port") -> None:
    """Raise RolloutError, with the option that gave it, if a server cannot listen there: vLLM itself would find out
    when it has loaded the model."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise RolloutError(
                f"{port_option} {port}: another program listens on it at {host}; choose a free one"
            ) from error
        raise RolloutError(
            f"{host_option} {host}: {error.strerror}; expected an address of this machine, as the run will reach it"
        ) from error


def become_server(config: Config, max_model_len: int, device: str, host: str, port: int) -> None:
    """Replace this process by a vLLM server for runs with this configuration, and by its parent watcher.

    Raises RolloutError without a token."""
    token = os.environ.get(TOKEN_VARIABLE, "")
    if not token:
        raise RolloutError(
            f"{TOKEN_VARIABLE} is not set: set it to a long random text, and to the same one for the run that uses "
            "this server"
        )
    check_address(host, port)
    check_model(config.model.path, config.rollout, max_model_len, device, published_adapters(config))
    tokenizer = config.model.tokenizer or config.model.path
    settings = EngineSettings(
        config.model.path, tokenizer, config.model.dtype, config.rollout, max_model_len, config.run.seed, device,
        adapters=published_adapters(config),
    )  # fmt: skip
    devices, threads = os.environ.get("CUDA_VISIBLE_DEVICES"), None
    if device == "cpu":
        devices, threads = None, max(1, len(os.sched_getaffinity(0)) // config.rollout.tensor_parallel_size)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # prepare_environment counts a training rank's
    prepare_environment(device)
    command = watched(parent_watcher.ALONE, sys.executable, *server_arguments(settings, host, port))
    os.execve(sys.executable, command, server_environment(token, devices, threads, config.rollout.server_environment))
