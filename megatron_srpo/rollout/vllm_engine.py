"""Starting and stopping one in-process vLLM engine, with one clear message when it cannot start."""

from __future__ import annotations

import gc
import json
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_srpo.config import RolloutConfig
from megatron_srpo.rollout.engine import RolloutError
from megatron_srpo.rollout.guest import nameable_preload, preserved_generators, preserved_settings

CPU_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)  # of vLLM's CPU attention
EXTENSION = "megatron_srpo.bridge.worker.PublishExtension"  # by name: vLLM imports it in its worker
KV_SPACE = "VLLM_CPU_KVCACHE_SPACE"


@dataclass(frozen=True)
class EngineSettings:
    """What an engine is started with. `shared_memory` names its blocks (tensor parallel engines on CPUs)."""

    hf_dir: str
    tokenizer: str
    dtype: str
    rollout: RolloutConfig
    max_model_len: int
    seed: int
    device: str
    shared_memory: str


def check_model(hf_dir: str, rollout: RolloutConfig, max_model_len: int, device: str) -> None:
    """Refuse what vLLM would refuse deep inside. Raises RolloutError."""
    path = Path(hf_dir) / "config.json"
    if not path.exists():
        raise RolloutError(f"{hf_dir} has no config.json: expected a Hugging Face model folder.")
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    heads, size = config["num_attention_heads"], rollout.tensor_parallel_size
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    if device == "cpu" and head_dim not in CPU_HEAD_DIMS:
        raise RolloutError(
            f"the model in {hf_dir} has head_dim {head_dim}: on a CPU, vLLM takes "
            f"{', '.join(map(str, CPU_HEAD_DIMS))}. Use another model, or a GPU."
        )
    groups, ffn = config.get("num_key_value_heads") or heads, config.get("intermediate_size", 0)
    if heads % size or ffn % size or (groups % size and size % groups):
        raise RolloutError(
            f"rollout.tensor_parallel_size = {size} does not fit the model in {hf_dir}: it must divide the {heads} "
            f"attention heads and intermediate_size ({ffn}), and divide the {groups} key-value heads or be a multiple "
            "of them. Choose another."
        )
    step = rollout.max_num_batched_tokens
    if device == "cpu" and 0 < step < max_model_len:
        raise RolloutError(
            f"rollout.max_num_batched_tokens = {step}: on a CPU a prompt is not cut into parts, so expected 0 or at "
            f"least data.max_prompt_length + rollout.max_response_length = {max_model_len}. Raise it, or lower one of "
            "those."
        )
    limit = config.get("max_position_embeddings")
    if limit and max_model_len > limit:
        raise RolloutError(
            f"prompt and response together may be {max_model_len} tokens long, the model in {hf_dir} ends at {limit} "
            "(max_position_embeddings): lower data.max_prompt_length or rollout.max_response_length."
        )


def start_engine(settings: EngineSettings) -> Any:
    """A vllm.LLM inside this process. The trainer's random state, threads and torch settings stay as they are.

    Inside a torch.distributed world every rank must call it, and engines are groups of consecutive ranks. Raises
    RolloutError with vLLM's reason.
    """
    with (
        preserved_settings(),
        nameable_preload(),
        preserved_generators(settings.device),
        _without_kv_variable(),
        _quietly(),
    ):
        from vllm import LLM
        from vllm.v1.engine import core

        if dist.is_initialized():
            _spare_the_world()
        try:
            return LLM(**_arguments(settings))
        except Exception as error:
            core.cleanup_dist_env_and_memory()  # process groups of the half-started engine
            if isinstance(error, ValueError | RuntimeError | OSError):
                raise RolloutError(_why(error, settings)) from error
            raise


def _arguments(settings: EngineSettings) -> dict[str, Any]:
    rollout, cpu = settings.rollout, settings.device == "cpu"
    arguments: dict[str, Any] = {
        "model": settings.hf_dir,
        "tokenizer": settings.tokenizer,
        "dtype": settings.dtype,
        "seed": settings.seed,
        "max_model_len": settings.max_model_len,
        "max_num_seqs": rollout.max_num_seqs,
        "tensor_parallel_size": rollout.tensor_parallel_size,
        "enforce_eager": rollout.enforce_eager or (cpu and os.environ.get("TORCHDYNAMO_DISABLE") == "1"),
        "enable_prefix_caching": True,
        "logprobs_mode": "processed_logprobs",  # of the distribution that is sampled from
        "worker_extension_cls": EXTENSION,
        "use_tqdm_on_load": False,
    }
    if rollout.max_num_batched_tokens:
        arguments["max_num_batched_tokens"] = rollout.max_num_batched_tokens
    if dist.is_initialized():
        # Every rank is a worker already; it takes its device from LOCAL_RANK.
        arguments["distributed_executor_backend"] = "external_launcher"
    if cpu:
        # After a part of a prompt vLLM takes back a step of the request's generator, which one on a CPU cannot do.
        arguments["enable_chunked_prefill"] = False
        arguments["kv_cache_memory_bytes"] = int(rollout.cpu_kv_cache_gib * 2**30)
        arguments["worker_cls"] = "megatron_srpo.rollout.cpu_worker.NamedCPUWorker"
        arguments["additional_config"] = {"shared_memory_name": settings.shared_memory}
    else:
        arguments["gpu_memory_utilization"] = rollout.gpu_memory_utilization
        arguments["enable_sleep_mode"] = True
    return arguments


@contextmanager
def _without_kv_variable() -> Iterator[None]:
    """The configuration decides on the cache's size; vLLM's variable, in whole GiB, would win."""
    value = os.environ.pop(KV_SPACE, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[KV_SPACE] = value


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the warnings of vLLM's imports, of which no user can do anything."""
    log = logging.getLogger("torch._library.triton")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _why(error: Exception, settings: EngineSettings) -> str:
    reason = " ".join(str(error).split()) or type(error).__name__
    cure = "VLLM_LOGGING_LEVEL=INFO shows vLLM's own log."
    if "KV cache" in reason or "kv cache" in reason or "memory" in reason.lower():
        key = "rollout.cpu_kv_cache_gib" if settings.device == "cpu" else "rollout.gpu_memory_utilization"
        cure = f"Change {key}, or lower data.max_prompt_length + rollout.max_response_length. {cure}"
    return f"vLLM did not start on {settings.hf_dir} ({settings.device}): {reason} {cure}"


def stop_engine(llm: Any) -> None:
    """Shut an engine down: memory, process groups, shared memory. The trainer's world stays."""
    llm.llm_engine.engine_core.shutdown()
    gc.collect()


def _spare_the_world() -> None:
    """Let vLLM's clean-up, which also runs when an engine is garbage, leave torch.distributed to the trainer."""
    from vllm.distributed import parallel_state
    from vllm.v1.engine import core

    def leave_groups() -> None:
        gc.unfreeze()  # the engine's start froze what was there
        parallel_state.destroy_model_parallel()
        if parallel_state._WORLD is not None:
            if dist.is_initialized():
                parallel_state._WORLD.destroy()
            parallel_state._WORLD = None
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    core.cleanup_dist_env_and_memory = leave_groups
