"""What a vLLM engine is started with: our settings, and the arguments of vLLM that follow from them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_srpo.bridge import BridgeError, read_config
from megatron_srpo.config import LoraConfig, RolloutConfig
from megatron_srpo.config.check import CPU_HEAD_DIMS
from megatron_srpo.families import ModelShape
from megatron_srpo.rollout.engine import RolloutError
from megatron_srpo.rollout.vllm.adapter_loader import adapter_arguments

KV_SPACE = "VLLM_CPU_KVCACHE_SPACE"
V2_RUNNER = "VLLM_USE_V2_MODEL_RUNNER"  # vLLM's variable
# By name, because the module imports vLLM, which the trainer of servers does not.
CPU_WORKER = "megatron_srpo.rollout.vllm.cpu_worker.NamedCPUWorker"
RECORDING_WORKER = "megatron_srpo.rollout.vllm.expert_recorder.RecordingCPUWorker"
RECORDING_SCHEDULER = "megatron_srpo.rollout.vllm.expert_recorder.RecordingScheduler"
ANSWER_DRAFTS = "megatron_srpo.rollout.vllm.speculation.AnswerDrafts"
NGRAMS = (4, 2)  # tokens that must have been seen before a drafted one: the longer n-gram counts first
Arguments = dict[str, "str | int | float | bool | Mapping[str, str | int] | list[str]"]


@dataclass(frozen=True)
class EngineSettings:
    """The settings of one engine. `shared_memory` names its blocks (tensor-parallel engines on CPUs). `adapters`: those
    that it serves on the weights of its folder; None if publishes bring whole models."""

    hf_dir: str
    tokenizer: str
    dtype: str
    rollout: RolloutConfig
    max_model_len: int
    seed: int
    device: str
    shared_memory: str = ""
    adapters: LoraConfig | None = None

    @property
    def records_experts(self) -> bool:
        """Whether the engine returns the experts of every token."""
        return self.rollout.replay(model_shape(self.hf_dir).experts) == "rollout"


def qualified_name(cls: type) -> str:
    """The dotted name by which another process imports a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def check_model(
    hf_dir: str, rollout: RolloutConfig, max_model_len: int, device: str, adapters: LoraConfig | None = None
) -> None:  # fmt: skip
    """Refuse a model that vLLM would refuse deep inside its start. Raises RolloutError."""
    try:
        shape = ModelShape.from_hf(read_config(hf_dir))
    except BridgeError as error:
        raise RolloutError(str(error)) from None
    size = rollout.tensor_parallel_size
    if device == "cpu" and shape.head_dim not in CPU_HEAD_DIMS:
        raise RolloutError(
            f"the model in {hf_dir} has head_dim {shape.head_dim}: on a CPU, vLLM takes "
            f"{', '.join(map(str, CPU_HEAD_DIMS))}. Use another model, or a GPU."
        )
    if device == "cpu" and adapters is not None and shape.experts:
        raise RolloutError(
            'lora.publish = "adapter": on a CPU, vLLM serves no adapters for models with experts. Set it to "auto" or '
            '"merged".'
        )
    heads, groups = shape.heads, shape.groups
    ffn = 0 if all(shape.expert_layers) else shape.ffn  # 0: no layer has it
    if heads % size or ffn % size or (groups % size and size % groups):
        divided = f"{heads} attention heads" + (f" and intermediate_size ({ffn})" if ffn else "")
        raise RolloutError(
            f"rollout.tensor_parallel_size = {size} does not fit the model in {hf_dir}: it must divide the {divided}, "
            f"and divide the {groups} key-value heads or be a multiple of them. Choose another."
        )
    if device != "cpu" and rollout.replay(shape.experts) == "rollout" and os.environ.get(V2_RUNNER) in ("0", "false"):
        raise RolloutError(
            f"{V2_RUNNER} = {os.environ[V2_RUNNER]}: vLLM returns the experts of tokens only under its Model Runner "
            "V2, and the trainer uses them (rollout.routing_replay). Unset it, or set rollout.routing_replay = "
            '"old" or "off".'
        )
    step = rollout.max_num_batched_tokens
    if device == "cpu" and 0 < step < max_model_len:
        raise RolloutError(
            f"rollout.max_num_batched_tokens = {step}: on a CPU vLLM cannot cut a prompt into parts, so expected 0 or "
            f"at least data.max_prompt_length + rollout.max_response_length = {max_model_len}. Raise it, or lower one "
            "of those."
        )
    if shape.max_positions and max_model_len > shape.max_positions:
        raise RolloutError(
            f"prompt and response together may be {max_model_len} tokens long, the model in {hf_dir} ends at "
            f"{shape.max_positions} (max_position_embeddings): lower data.max_prompt_length or "
            "rollout.max_response_length."
        )


def model_shape(hf_dir: str) -> ModelShape:
    """The numbers of the model in a folder."""
    return ModelShape.from_hf(read_config(hf_dir))


def engine_arguments(settings: EngineSettings) -> Arguments:
    """The arguments that an engine in this process and a server share, by their Python names."""
    rollout, cpu = settings.rollout, settings.device == "cpu"
    arguments: Arguments = {
        "model": settings.hf_dir,
        "tokenizer": settings.tokenizer,
        "dtype": settings.dtype,
        "seed": settings.seed,
        "max_model_len": settings.max_model_len,
        "max_num_seqs": rollout.max_num_seqs,
        "tensor_parallel_size": rollout.tensor_parallel_size,
        "enforce_eager": rollout.enforce_eager or (cpu and os.environ.get("TORCHDYNAMO_DISABLE") == "1"),
        "enable_prefix_caching": True,
        "logprobs_mode": "processed_logprobs",  # of the distribution that is sampled from, after temperature
    }
    if rollout.max_num_batched_tokens:
        arguments["max_num_batched_tokens"] = rollout.max_num_batched_tokens
    if cpu:
        # After a part of a prompt vLLM takes back a step of the request's generator, which a CPU generator cannot do.
        arguments["enable_chunked_prefill"] = False
        arguments["kv_cache_memory_bytes"] = int(rollout.cpu_kv_cache_gib * 2**30)
        # Samples share the whole blocks of their prompt, and turns those of their conversation. vLLM's own choice on a
        # CPU, 128 tokens, leaves most of them to be computed again; its kernel takes multiples of 32.
        arguments["block_size"] = 32
        arguments["worker_cls"] = CPU_WORKER
    else:
        arguments["gpu_memory_utilization"] = rollout.gpu_memory_utilization
    if settings.adapters is not None:
        arguments |= adapter_arguments(settings.adapters)
    if rollout.speculative_tokens:
        arguments["speculative_config"] = _speculation(rollout.speculative_tokens, cpu)
        arguments["per_request_spec_decode_metrics"] = "summary"
    if settings.records_experts and cpu:
        # Compiled code would not call the recorder.
        arguments |= {"worker_cls": RECORDING_WORKER, "scheduler_cls": RECORDING_SCHEDULER, "enforce_eager": True}
    elif settings.records_experts:
        arguments["enable_return_routed_experts"] = True
    return arguments


def _speculation(tokens: int, cpu: bool) -> Mapping[str, str | int]:
    """vLLM's settings of speculative decoding. On GPUs its own n-grams, from the request's tokens alone."""
    if cpu:
        return {"method": "custom_class", "model": ANSWER_DRAFTS, "num_speculative_tokens": tokens}
    return {
        "method": "ngram_gpu", "num_speculative_tokens": tokens,
        "prompt_lookup_max": max(NGRAMS), "prompt_lookup_min": min(NGRAMS),
    }  # fmt: skip


def command_line(arguments: Mapping[str, object]) -> list[str]:
    """The same arguments as options of vLLM's command line: --name=value, and --name or --no-name for a switch. A
    mapping is JSON."""
    options = []
    for name, value in arguments.items():
        option = name.replace("_", "-")
        if isinstance(value, Mapping):
            options.append(f"--{option}={json.dumps(value)}")
        elif isinstance(value, list):
            options += [f"--{option}", *map(str, value)]
        elif isinstance(value, bool):
            options.append(f"--{option}" if value else f"--no-{option}")
        else:
            options.append(f"--{option}={value}")
    return options
