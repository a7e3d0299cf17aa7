"""One vLLM server as a process of ours: its command, its environment, its life and its end."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import torch

from megatron_srpo.config import Config
from megatron_srpo.rollout.engine import RolloutError
from megatron_srpo.rollout.environment import prepare_environment
from megatron_srpo.rollout.guard import TOKEN_VARIABLE
from megatron_srpo.rollout.guardian import ALONE
from megatron_srpo.rollout.vllm_engine import KV_SPACE, EngineSettings, check_model

MODEL_NAME = "policy"  # under which a server serves it
GUARDIAN = Path(__file__).with_name("guardian.py")
BACKEND = "megatron_srpo"  # bridge.worker_transfer registers it
# What torchrun and our own in-process engines set for this process, and a server must not inherit.
NOT_INHERITED = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK",
    "ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT", "VLLM_ENABLE_V1_MULTIPROCESSING", "LD_PRELOAD",
    KV_SPACE,
)  # fmt: skip
TAIL_LINES = 3


def guarded(*command: str) -> list[str]:
    """A command line that runs `command` under a guardian."""
    return [sys.executable, "-I", "-S", str(GUARDIAN), *command]


def free_port(host: str) -> int:
    """A port of `host` that was free a moment ago."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def server_arguments(settings: EngineSettings, host: str, port: int) -> list[str]:
    """vLLM's command line for a server of ours, after the interpreter."""
    rollout, cpu = settings.rollout, settings.device == "cpu"
    arguments = {
        "model": settings.hf_dir,
        "tokenizer": settings.tokenizer,
        "served-model-name": MODEL_NAME,
        "host": host,
        "port": port,
        "dtype": settings.dtype,
        "seed": settings.seed,
        "max-model-len": settings.max_model_len,
        "max-num-seqs": rollout.max_num_seqs,
        "tensor-parallel-size": rollout.tensor_parallel_size,
        "logprobs-mode": "processed_logprobs",
        "worker-extension-cls": "megatron_srpo.bridge.worker_transfer.ServerExtension",
        "weight-transfer-config": json.dumps({"backend": BACKEND}),
        "middleware": "megatron_srpo.rollout.guard.TokenGuard",
    }
    if cpu:
        arguments["kv-cache-memory-bytes"] = int(rollout.cpu_kv_cache_gib * 2**30)
    else:
        arguments["gpu-memory-utilization"] = rollout.gpu_memory_utilization
    if rollout.max_num_batched_tokens:
        arguments["max-num-batched-tokens"] = rollout.max_num_batched_tokens
    flags = [
        "--enable-scale-out",
        "--enable-prefix-caching",
        "--disable-uvicorn-access-log",
        "--no-enable-log-requests",
    ]
    if cpu:
        flags.append("--no-enable-chunked-prefill")  # see vllm_engine
    if rollout.enforce_eager or (cpu and os.environ.get("TORCHDYNAMO_DISABLE") == "1"):
        flags.append("--enforce-eager")
    named = [f"--{name}={value}" for name, value in arguments.items()]
    return ["-m", "vllm.entrypoints.openai.api_server", *named, *flags]


def server_environment(token: str, devices: str | None, threads: int | None) -> dict[str, str]:
    """What a server finds in its environment. `devices`: CUDA_VISIBLE_DEVICES, None on a CPU; `threads`: of one CPU
    worker, where OMP_NUM_THREADS does not say; None on a GPU, where vLLM chooses."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in NOT_INHERITED and not name.startswith(("TORCHELASTIC_", "TORCH_NCCL_"))
    }
    package = str(Path(__file__).parents[2])  # a server starts in another folder than its user
    path = os.pathsep.join(filter(None, [package, inherited.get("PYTHONPATH", "")]))
    chosen = {
        TOKEN_VARIABLE: token,
        "PYTHONPATH": path,
        "PYTHONUNBUFFERED": "1",
        "VLLM_SERVER_DEV_MODE": "1",  # the routes for weights; TokenGuard keeps them to us
        "VLLM_HOST_IP": "127.0.0.1",  # where its own processes meet
        "VLLM_LOGGING_LEVEL": os.environ.get("MEGATRON_SRPO_ENGINE_LOG", "WARNING"),
    }
    if devices is not None:
        chosen["CUDA_VISIBLE_DEVICES"] = devices
    if threads is not None:
        chosen["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(threads))
        # An engine's only worker lives in its process; vLLM would start one, to choose its threads: done here.
        chosen["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return inherited | chosen


class ServerProcess:
    """A server that dies with us. `log` is appended to; each start writes a line of its own."""

    def __init__(self, settings: EngineSettings, environment: dict[str, str], host: str, port: int, log: Path) -> None:
        """`port` 0: whichever is free at each start."""
        self._settings, self._environment, self._log = settings, environment, log
        self._host, self.fixed_port = host, port
        self._process: subprocess.Popen | None = None
        self._started_at = 0  # byte of the log
        self.url = ""

    def start(self) -> None:
        """Begin to start it; it answers at `url` a while later."""
        port = self.fixed_port or free_port(self._host)
        host = f"[{self._host}]" if ":" in self._host else self._host
        self.url = f"http://{host}:{port}"
        self._log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, *server_arguments(self._settings, self._host, port)]
        with self._log.open("ab") as log:
            log.write(f"---- start: {self.url}\n".encode())
            self._started_at = log.tell()
            self._process = subprocess.Popen(
                guarded(*command), env=self._environment, stdin=subprocess.PIPE, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    @property
    def pid(self) -> int:
        """Of its guardian, whose session holds all its processes."""
        assert self._process is not None
        return self._process.pid

    def ended(self) -> str | None:
        """How it ended, in words, or None while it runs."""
        code = None if self._process is None else self._process.poll()
        if self._process is not None and code is None:
            return None
        return f"it ended with exit code {code}: {self.last_words()}"

    def port_was_taken(self) -> bool:
        return "address already in use" in self._since_start().lower()

    def last_words(self) -> str:
        """The last lines of its log that say something, on one line."""
        lines = [line.strip() for line in self._since_start().splitlines() if line.strip()]
        telling = [line for line in lines if "Error" in line and not line.startswith("File")] or lines
        return " | ".join(line[:300] for line in telling[-TAIL_LINES:]) + f" (log: {self._log})"

    def _since_start(self) -> str:
        with suppress(OSError), self._log.open("rb") as log:
            log.seek(self._started_at)
            return log.read().decode(errors="replace")
        return ""

    def ask_to_stop(self) -> None:
        """Its guardian ends it; `wait` waits for that."""
        if self._process is not None and self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.close()

    def wait(self, seconds: float = 15.0) -> None:
        """Until it has ended; then, or after `seconds`, nothing of it is left."""
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
    """CUDA_VISIBLE_DEVICES of server number `server`: of `given`, or of the GPUs after the training ranks'.

    Raises RolloutError where there are not enough."""
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


def check_address(host: str, port: int) -> None:
    """Raise RolloutError if nothing can listen there: vLLM itself says so after half a minute."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise RolloutError(f"--port {port}: another program listens on it at {host}; choose a free one") from error
        raise RolloutError(
            f"--host {host}: {error.strerror}; expected an address of this machine, as the run will reach it"
        ) from error


def become_server(config: Config, max_model_len: int, device: str, host: str, port: int) -> None:
    """Replace this process by one that holds a server for runs with this configuration, and ends it when it ends.
    Raises RolloutError without a token."""
    token = os.environ.get(TOKEN_VARIABLE, "")
    if not token:
        raise RolloutError(
            f"{TOKEN_VARIABLE} is not set: set it to a long random text, and to the same one for the run that uses "
            "this server"
        )
    check_address(host, port)
    check_model(config.model.path, config.rollout, max_model_len, device)
    tokenizer = config.model.tokenizer or config.model.path
    settings = EngineSettings(
        config.model.path, tokenizer, config.model.dtype, config.rollout, max_model_len, config.run.seed, device, ""
    )
    devices, threads = os.environ.get("CUDA_VISIBLE_DEVICES"), None
    if device == "cpu":
        devices, threads = None, max(1, len(os.sched_getaffinity(0)) // config.rollout.tensor_parallel_size)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # or it would be as many as a training rank's
    prepare_environment(device)
    command = guarded(ALONE, sys.executable, *server_arguments(settings, host, port))
    os.execve(sys.executable, command, server_environment(token, devices, threads))
