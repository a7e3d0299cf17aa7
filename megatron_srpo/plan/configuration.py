"""Writes a layout as a configuration for the trainer."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from megatron_srpo.algorithms.base import Algorithm
from megatron_srpo.algorithms.section import name_of
from megatron_srpo.config import BUCKET_MIB, Config, contradictions, listed
from megatron_srpo.config.check import teacher_prompt_length
from megatron_srpo.config.load import to_toml_value
from megatron_srpo.config.schema import PROJECTIONS
from megatron_srpo.core.errors import ConfigError, UserError
from megatron_srpo.core.records import Attempt, Group, Prompt, Reward, Rollout
from megatron_srpo.plan.layout import Layout
from megatron_srpo.plan.workload import Workload


def sections(layout: Layout, workload: Workload, model_path: str) -> dict[str, dict[str, Any]]:
    """The keys whose values follow from the layout and the workload, by section. All other keys keep their defaults."""
    parallel: dict[str, Any] = {
        "tensor_model_parallel_size": layout.tensor,
        "pipeline_model_parallel_size": layout.pipeline,
        "virtual_pipeline_model_parallel_size": layout.virtual,
        "context_parallel_size": layout.context,
        "sequence_parallel": layout.sequence_parallel,
        "overlap_grad_reduce": layout.overlap_grad_reduce,
    }
    if layout.expert * layout.expert_tensor > 1:
        parallel["expert_model_parallel_size"] = layout.expert
        parallel["expert_tensor_parallel_size"] = layout.expert_tensor
    rollout: dict[str, Any] = {
        "rollout_batch_size": workload.prompts,
        "n_samples_per_prompt": workload.samples,
        "max_response_length": workload.response_max,
        "tensor_parallel_size": layout.engine_tensor,
    }
    if layout.colocated:
        rollout |= {
            "gpu_memory_utilization": layout.engine_memory,
            "sleep_while_training": layout.engine_sleeps,
        }
    else:
        rollout |= {
            "placement": "servers",
            "num_servers": layout.engines,
            "gpu_memory_utilization": layout.server_memory,
        }
    return {
        "run": {"iterations": workload.iterations, "device": "cuda"},
        "model": {
            "path": model_path,
            "dtype": "bfloat16" if layout.dtype_bytes == 2 else "float32",
            "recompute": layout.recompute,
            "recompute_layers": layout.recompute_layers,
        },
        **({"lora": {"rank": layout.lora_rank, "targets": lora_targets(layout)}} if layout.lora_rank else {}),
        "parallel": parallel,
        "data": {"train": "runs/data/train.jsonl", "kind": "mcq", "max_prompt_length": workload.prompt_max},
        "rollout": rollout,
        "algorithm": {"name": name_of(teacher=True), "distillation_topk": workload.topk}
        if workload.distilled > 0
        else {"name": name_of(teacher=False)},
        # docs/lora.md: adapters need 10 to 20 times the rate of all weights.
        "optimizer": {"offload": layout.optimizer_on_host} | ({"lr": 5e-5} if layout.lora_rank else {}),
        "teacher": {"max_prompt_length": workload.teacher_prompt_max, "offload": layout.shadow_on_host},
        "train": {
            "prompts_per_mini_batch": -(-workload.prompts // workload.steps),
            "max_tokens_per_gpu": layout.max_tokens,
            "offload_while_generating": layout.trainer_leaves,
        },
    }


def lora_targets(layout: Layout) -> list[str]:
    """lora.targets of the layout, in the words of the configuration where they fit."""
    named = list(layout.lora_projections)
    found = []
    for word, names in PROJECTIONS.items():
        if set(names) <= set(named):
            found.append(word)
            named = [name for name in named if name not in names]
    return [*found, *named, *(["experts"] if layout.lora_experts else [])]


def configuration(layout: Layout, workload: Workload, model_path: str, hf: Mapping[str, object]) -> Config:
    """The configuration, after the trainer's own checks for the layout's number of ranks. UserError if they fail.

    `hf` is the content of the model's config.json.
    """
    try:
        config = Config.model_validate(sections(layout, workload, model_path))
    except ValidationError as error:
        keys = ", ".join(".".join(map(str, problem["loc"])) for problem in error.errors())
        raise UserError(f"plan: this version's trainer does not take {keys}, which {layout.name()} needs") from None
    problems = contradictions(config, dict(hf), layout.training_gpus)
    if problems:
        raise ConfigError(listed(f"plan: the configuration of {layout.name()}", problems))
    return config


def layout_of(config: Config, gpus: int, engine_gpus: int = 0) -> Layout:
    """The configuration's layout on `gpus` GPUs; `engine_gpus` of them only generate."""
    parallel, rollout = config.parallel, config.rollout
    return Layout(
        gpus=gpus,
        tensor=parallel.tensor_model_parallel_size,
        pipeline=parallel.pipeline_model_parallel_size,
        virtual=parallel.virtual_pipeline_model_parallel_size,
        context=parallel.context_parallel_size,
        expert=parallel.expert_model_parallel_size,
        expert_tensor=parallel.expert_tensor_parallel_size,
        recompute=config.model.recompute,
        recompute_layers=config.model.recompute_layers,
        max_tokens=config.train.max_tokens_per_gpu,
        engine_tensor=rollout.tensor_parallel_size,
        engine_gpus=engine_gpus,
        engine_memory=rollout.gpu_memory_utilization,
        server_memory=rollout.gpu_memory_utilization,
        engine_sleeps=rollout.sleep_while_training,
        trainer_leaves=config.train.offload_while_generating,
        shadow_on_host=config.teacher.offload,
        optimizer_on_host=config.optimizer.offload,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        dtype_bytes=2 if config.model.dtype == "bfloat16" else 4,
        lora_rank=config.lora.rank,
        lora_projections=config.lora.projections,
        lora_experts=config.lora.experts,
        lora_merged=None
        if config.lora.publish == "auto" and config.lora.servable
        else config.lora.publish != "adapter",
        bucket_mib=config.bridge.bucket_mib or BUCKET_MIB["cuda"],
        sequence_split=parallel.sequence_parallel,
    )


def own_engine_gpus(config: Config) -> int:
    """GPUs of the servers that the configuration starts or names; 0 if its engines are colocated."""
    rollout = config.rollout
    servers = 0 if rollout.placement == "colocated" else len(rollout.servers) or rollout.num_servers
    return servers * rollout.tensor_parallel_size


def workload_of(config: Config, *, prompt_mean: int = 400, response_mean: int = 2000) -> Workload:
    """The configuration's iteration. The mean lengths, which it does not say, are those of the planner by default."""
    rollout, data = config.rollout, config.data
    drops = config.model.attention_dropout or config.model.hidden_dropout or config.lora.dropout
    return Workload(
        prompts=rollout.rollout_batch_size,
        samples=rollout.n_samples_per_prompt,
        prompt_mean=prompt_mean,
        prompt_max=data.max_prompt_length,
        response_mean=response_mean,
        response_max=rollout.max_response_length,
        teacher_prompt_max=teacher_prompt_length(config),
        steps=-(-rollout.rollout_batch_size // (config.train.prompts_per_mini_batch or rollout.rollout_batch_size)),
        distilled=taught_share(config.algorithm) if config.algorithm.needs.teacher else 0.0,
        correct=1 - Workload.distilled,
        teacher=config.teacher.mode,
        contrast=config.algorithm.needs.contrast,
        scores_each_step=config.train.score_every == "step",
        reference=config.algorithm.needs.reference,
        starts_as_base=config.lora.rank > 0 and not config.lora.path,
        topk=config.algorithm.needs.topk,
        full_vocabulary=config.algorithm.needs.divergence and not config.algorithm.needs.topk,
        iterations=config.run.iterations,
        shares_prompts=config.train.share_prompts and not drops and not config.train.moe_aux_loss_coef,
        teacher_head_mib=0 if drops else config.train.teacher_head_mib,
        engine_sequences=rollout.max_num_seqs,
    )


def taught_share(algorithm: Algorithm) -> float:
    """Share of the responses that a teacher scores, if all can be taught and as many are wrong as srpo distils by
    assumption. The algorithm tells, by its credit of a right and a wrong answer."""
    rollouts = [Rollout(0, i, array("i", [0]), array("f", [0.0]), "", "stop", 0) for i in (0, 1)]
    attempts = [Attempt(one, Reward(float(one.sample)), bool(one.sample), teachable=True) for one in rollouts]
    wrong, right = algorithm.credit(Group(Prompt("plan:0", (), [0], "", ""), attempts))
    share = Workload.distilled * wrong.taught + (1 - Workload.distilled) * right.taught
    return share or Workload.distilled  # a method that teaches nothing at its start may later


def as_toml(layout: Layout, workload: Workload, model_path: str, notes: list[str]) -> str:
    """The text of the file: `notes` as comments, then the keys of `sections`."""
    lines = [f"# {note}" for note in notes]
    for name, keys in sections(layout, workload, model_path).items():
        lines += ["", f"[{name}]", *(f"{key} = {to_toml_value(value)}" for key, value in keys.items())]
    return "\n".join(lines) + "\n"
