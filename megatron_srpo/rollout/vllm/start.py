"""Starts and stops one vLLM engine in this process, with one clear message when it cannot start."""

from __future__ import annotations

import gc
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megatron_srpo.core.text import clause
from megatron_srpo.rollout.engine import RolloutError
from megatron_srpo.rollout.vllm.process_state import preserved_generators, preserved_settings
from megatron_srpo.rollout.vllm.settings import KV_SPACE, Arguments, EngineSettings, engine_arguments, qualified_name
from megatron_srpo.rollout.vllm.worker_extension import PublishExtension

if TYPE_CHECKING:
    from vllm import LLM


def start_engine(settings: EngineSettings) -> LLM:
    """A vllm.LLM inside this process. The trainer's random state, threads and torch settings stay as they are.

    Inside a torch.distributed world every rank must call it, and engines are groups of consecutive ranks. Raises
    RolloutError with vLLM's reason.
    """
    with preserved_settings(), preserved_generators(settings.device), _without_kv_variable(), _without_warnings():
        from vllm import LLM
        from vllm.v1.engine import core

        if dist.is_initialized():
            _keep_the_trainers_groups()
        try:
            return LLM(**_arguments(settings))
        except Exception as error:
            core.cleanup_dist_env_and_memory()  # the process groups of the half-started engine
            if isinstance(error, ValueError | RuntimeError | OSError):
                raise RolloutError(_explanation(error, settings)) from error
            raise


def _arguments(settings: EngineSettings) -> Arguments:
    """The shared arguments, and those of an engine inside the training ranks."""
    arguments = engine_arguments(settings)
    arguments |= {"worker_extension_cls": qualified_name(PublishExtension), "use_tqdm_on_load": False}
    if dist.is_initialized():
        # Every rank is a worker already; it takes its device from LOCAL_RANK.
        arguments["distributed_executor_backend"] = "external_launcher"
    if settings.device == "cpu":
        from megatron_srpo.rollout.vllm.cpu_worker import SHARED_MEMORY_NAME

        arguments["additional_config"] = {SHARED_MEMORY_NAME: settings.shared_memory}
    else:
        arguments["enable_sleep_mode"] = True
    return arguments


@contextmanager
def _without_kv_variable() -> Iterator[None]:
    """The configuration decides on the cache's size; vLLM's variable, in whole GiB, would win over it."""
    value = os.environ.pop(KV_SPACE, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[KV_SPACE] = value


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Hide the warnings of vLLM's imports, which a user cannot act on."""
    log = logging.getLogger("torch._library.triton")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _explanation(error: Exception, settings: EngineSettings) -> str:
    """vLLM's reason on one line, and what the user can change."""
    reason = " ".join(str(error).split()) or type(error).__name__
    cure = "VLLM_LOGGING_LEVEL=INFO shows vLLM's own log."
    if settings.records_experts and any(word in reason for word in ("AuxOutput", "outed-experts", "routed_experts")):
        cure = f'Without the engine\'s choice of experts it works: rollout.routing_replay = "old" or "off". {cure}'
    if "KV cache" in reason or "kv cache" in reason or "memory" in reason.lower():
        key = "rollout.cpu_kv_cache_gib" if settings.device == "cpu" else "rollout.gpu_memory_utilization"
        cure = f"Change {key}, or lower data.max_prompt_length + rollout.max_response_length. {cure}"
    return f"vLLM did not start on {settings.hf_dir} ({settings.device}): {clause(reason)}. {cure}"


def stop_engine(llm: LLM) -> None:
    """Shut an engine down: memory, process groups and shared memory. The trainer's process groups stay."""
    llm.llm_engine.engine_core.shutdown()
    gc.collect()


def _keep_the_trainers_groups() -> None:
    """Make vLLM's clean-up, which also runs when an engine is garbage collected, destroy vLLM's groups only."""
    from vllm.distributed import parallel_state
    from vllm.v1.engine import core

    def destroy_engine_groups() -> None:
        gc.unfreeze()  # the engine's start froze all objects that existed then
        parallel_state.destroy_model_parallel()
        if parallel_state._WORLD is not None:
            if dist.is_initialized():
                parallel_state._WORLD.destroy()
            parallel_state._WORLD = None
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    core.cleanup_dist_env_and_memory = destroy_engine_groups
