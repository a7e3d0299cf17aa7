"""What the types cannot say: contradictions between keys, the model folder, the number of ranks.

Nothing here imports torch: a wrong configuration is refused in the first second.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_srpo.config.schema import Config, ConfigError

ARCHITECTURES = ("Qwen3ForCausalLM", "LlamaForCausalLM")


def check(config: Config, hf_config: dict[str, Any] | None = None, world_size: int | None = None) -> None:
    """Raise one ConfigError that lists every contradiction: in the configuration, with the model, with the ranks."""
    problems = [*_batches(config), *_lengths(config), *_sampling(config), *_rest(config)]
    if hf_config is not None:
        problems += _model(config, hf_config)
    if world_size is not None:
        problems += _ranks(config, world_size)
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise ConfigError(f"the configuration has {count}\n" + "\n".join(f"  {problem}" for problem in problems))


def read_model_folder(path: str) -> dict[str, Any]:
    """config.json of a Hugging Face folder that has safetensors; ConfigError says what is missing."""
    folder = Path(path)
    if not folder.is_dir():
        raise ConfigError(f"model.path = {path!r}: no such folder. Expected a Hugging Face model on this machine.")
    try:
        hf = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"model.path = {path!r}: has no config.json. Expected a Hugging Face model folder.") from None
    except ValueError as error:
        raise ConfigError(f"{folder / 'config.json'}: not valid JSON ({error}). Fetch the model again.") from None
    if not any(folder.glob("*.safetensors")):
        pickled = next((file.name for pattern in ("*.bin", "*.pt") for file in sorted(folder.glob(pattern))), None)
        cure = (
            f"it has {pickled}: convert it with AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)"
            if pickled
            else "fetch the model again, weights included"
        )
        raise ConfigError(f"model.path = {path!r}: has no weights. Expected *.safetensors; {cure}.")
    return hf


def _batches(config: Config) -> Iterator[str]:
    batch, mini = config.rollout.rollout_batch_size, config.train.prompts_per_mini_batch
    if mini and batch % mini:
        yield (
            f"rollout.rollout_batch_size = {batch} is not divisible by train.prompts_per_mini_batch = {mini}: "
            f"choose a divisor of {batch}, or 0 for the whole batch"
        )
    if config.rollout.n_samples_per_prompt == 1:
        yield (
            "rollout.n_samples_per_prompt = 1: a group of one has no sibling and its advantage is always 0; "
            "expected at least 2"
        )


def _lengths(config: Config) -> Iterator[str]:
    prompt, response, budget = (
        config.data.max_prompt_length, config.rollout.max_response_length, config.train.max_tokens_per_gpu,
    )  # fmt: skip
    if prompt + response > budget:
        yield (
            f"data.max_prompt_length + rollout.max_response_length = {prompt + response} does not fit a row of "
            f"train.max_tokens_per_gpu = {budget}: raise the budget, or lower one of the lengths"
        )
    teacher = config.teacher.max_prompt_length or prompt + response
    if config.algorithm.name != "grpo" and teacher + response > budget:
        yield (
            f"the teacher's prompt ({teacher} tokens) and rollout.max_response_length = {response} do not fit a row of "
            f"train.max_tokens_per_gpu = {budget}: raise it to at least {teacher + response}, or set a smaller "
            "teacher.max_prompt_length"
        )


def _sampling(config: Config) -> Iterator[str]:
    if config.rollout.top_p < 1 or config.rollout.top_k > 0:
        yield (
            f"rollout.top_p = {config.rollout.top_p}, rollout.top_k = {config.rollout.top_k}: training rollouts must "
            "come from the whole distribution, or the importance weights against the engine are biased; "
            "set top_p = 1.0 and top_k = 0 (eval.top_p is free)"
        )


def _rest(config: Config) -> Iterator[str]:
    parallel, optimizer = config.parallel, config.optimizer
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size == 1:
        yield (
            "parallel.sequence_parallel = true with tensor_model_parallel_size = 1: there is nothing to split; "
            "set it to false, or raise tensor_model_parallel_size"
        )
    if parallel.context_parallel_size > 1:
        yield (
            f"parallel.context_parallel_size = {parallel.context_parallel_size}: context parallelism is not there yet; "
            "set 1 and use tensor parallelism with sequence_parallel for long responses"
        )
    if optimizer.min_lr > optimizer.lr:
        yield f"optimizer.min_lr = {optimizer.min_lr} is above optimizer.lr = {optimizer.lr}: lower it"
    if optimizer.warmup_steps > config.run.iterations * max(1, config.rollout.rollout_batch_size):
        yield f"optimizer.warmup_steps = {optimizer.warmup_steps} is longer than the run: lower it"
    if config.eval.every and not config.data.test:
        yield f"eval.every = {config.eval.every}, but data.test is empty: name the held-out file, or set eval.every = 0"


def _model(config: Config, hf: dict[str, Any]) -> Iterator[str]:
    name = (hf.get("architectures") or [None])[0]
    if name not in ARCHITECTURES:
        yield f"model.path: config.json is for {name!r}; supported are {', '.join(ARCHITECTURES)}"
        return
    parallel, algorithm = config.parallel, config.algorithm
    heads = hf["num_attention_heads"]
    groups, layers = hf.get("num_key_value_heads") or heads, hf["num_hidden_layers"]
    sizes = (
        ("num_attention_heads", heads),
        ("num_key_value_heads", groups),
        ("intermediate_size", hf["intermediate_size"]),
    )
    for key, where in (
        ("parallel.tensor_model_parallel_size", parallel.tensor_model_parallel_size),
        ("rollout.tensor_parallel_size", config.rollout.tensor_parallel_size),
    ):
        for what, size in sizes:
            if size % where:
                yield f"{key} = {where} does not divide the model's {what} = {size}: choose a common divisor"
    if layers % parallel.pipeline_model_parallel_size:
        yield (
            f"parallel.pipeline_model_parallel_size = {parallel.pipeline_model_parallel_size} does not divide the model's "
            f"num_hidden_layers = {layers}"
        )
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        yield f"model.path: rope type {kind!r} is not supported yet; expected the default rotary embedding"
    longest = config.data.max_prompt_length + config.rollout.max_response_length
    if longest > hf["max_position_embeddings"]:
        yield (
            f"data.max_prompt_length + rollout.max_response_length = {longest} is above the model's "
            f"max_position_embeddings = {hf['max_position_embeddings']}: lower one of them"
        )
    if algorithm.name != "grpo" and algorithm.distillation_topk > hf["vocab_size"]:
        yield (
            f"algorithm.distillation_topk = {algorithm.distillation_topk} is above the model's vocabulary of "
            f"{hf['vocab_size']}: lower it, or 0 for the full vocabulary"
        )
    if hf.get("attention_bias") or hf.get("mlp_bias"):
        yield "model.path: attention_bias or mlp_bias is true; models with biases are not supported yet"


def _ranks(config: Config, world_size: int) -> Iterator[str]:
    parallel = config.parallel
    model_ranks = (
        parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size
    )
    if world_size % model_ranks:
        yield (
            f"{world_size} rank(s) cannot be divided by tensor × pipeline × context parallel size = {model_ranks}: start "
            f"a multiple of {model_ranks} (torchrun --nproc-per-node), or lower the sizes"
        )
    if world_size % config.rollout.tensor_parallel_size:
        yield (
            f"{world_size} rank(s) cannot be divided by rollout.tensor_parallel_size = "
            f"{config.rollout.tensor_parallel_size}"
        )
