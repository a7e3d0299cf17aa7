"""The typed models: every key, its type, its default and, in the comment beside it, what it means.

Types are strict: "3" is no number and 1 is no boolean (an integer where a number is wanted is fine). 0 switches an
optional number off (TOML has no null). `reference.py` reads the comments.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator


class UserError(ValueError):
    """A mistake of the user, or of the machine: str() is the whole message (expected, got, cure), shown without a
    traceback. Packages raise it, or a subclass."""


class ConfigError(UserError):
    """A configuration that must not be run."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, strict=True, allow_inf_nan=False)


class RunConfig(Section):
    name: str = "srpo"
    output_dir: str = "runs/srpo"
    seed: int = Field(0, ge=0)
    iterations: int = Field(100, ge=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    control_timeout_minutes: float = Field(120, gt=0)  # how long ranks wait for the driver


class ModelConfig(Section):
    path: str  # a Hugging Face folder: config.json, safetensors, tokenizer
    tokenizer: str = ""  # another folder for the tokenizer; "" = path
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    recompute: Literal["none", "full"] = "none"


class ParallelConfig(Section):
    tensor_model_parallel_size: int = Field(1, ge=1)
    pipeline_model_parallel_size: int = Field(1, ge=1)
    context_parallel_size: int = Field(1, ge=1)
    sequence_parallel: bool = False


class DataConfig(Section):
    train: str | list[str]  # jsonl or parquet files
    test: str | list[str] = []
    prompt_key: str = "prompt"
    answer_key: str = "answer"
    kind_key: str = "kind"
    system_key: str = "system"
    kind: str = ""  # the reward of rows that have no kind of their own
    on_bad_row: Literal["error", "skip"] = "error"
    max_prompt_length: int = Field(2048, ge=1)  # tokens, chat template included
    overlong_prompts: Literal["drop", "error"] = "drop"
    shuffle: bool = True
    chat_template_kwargs: dict[str, Any] = {}


class RolloutConfig(Section):
    rollout_batch_size: int = Field(32, ge=1)  # prompts an iteration
    n_samples_per_prompt: int = Field(8, ge=1)
    max_response_length: int = Field(8192, ge=1)
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)  # 0 = off
    placement: Literal["colocated"] = "colocated"
    tensor_parallel_size: int = Field(1, ge=1)
    gpu_memory_utilization: float = Field(0.5, gt=0, lt=1)
    cpu_kv_cache_gib: float = Field(1.0, gt=0)
    max_num_seqs: int = Field(256, ge=1)
    enforce_eager: bool = False
    mismatch_warning: float = Field(0.05, ge=0)  # mean |Δ log-prob| trainer vs engine that warns


class AlgorithmConfig(Section):
    name: Literal["srpo", "grpo", "sdpo", "mix"] = "srpo"
    success_reward_threshold: float = 0.5
    use_feedback: bool = False  # the environment's feedback may teach (when no sibling is correct)
    sibling: Literal["random", "shortest", "least_used"] = "random"
    # GRPO branch
    advantage_std: bool = False
    clip_ratio_low: float = Field(0.2, ge=0, lt=1)
    clip_ratio_high: float = Field(0.28, ge=0)
    dual_clip: float = Field(0.0, ge=0)  # c > 1; 0 = off
    # SDPO branch
    distillation_topk: int = Field(100, ge=0)  # 0 = full vocabulary
    distillation_tail: bool = True
    divergence_alpha: float = Field(0.5, ge=0, le=1)  # 0 forward KL(q‖p), 1 reverse KL(p‖q)
    distill_ratio_clip: float = Field(2.0, ge=0)  # 0 = no ratio
    entropy_beta: float = Field(-1.0)  # β of the dynamic weighting; -1 = the method's own: 1 srpo, else 0
    mix_lambda: float = Field(0.9, ge=0, le=1)
    # both
    rollout_correction: Literal["off", "truncate", "mask", "sequence_mask"] = "truncate"
    rollout_correction_cap: float = Field(2.0, gt=0)
    kl_loss_coef: float = Field(0.0, ge=0)  # k3 to the reference policy (the initial model)
    entropy_coef: float = Field(0.0, ge=0)

    @property
    def beta(self) -> float:
        """β of the dynamic weighting (SRPO §3.2), resolved for the method."""
        if self.entropy_beta >= 0:
            return self.entropy_beta
        return 1.0 if self.name == "srpo" else 0.0

    @field_validator("entropy_beta")
    @classmethod
    def _beta_or_default(cls, value: float) -> float:
        if value < 0 and value != -1:
            raise ValueError("expected a number ≥ 0, or -1 for the method's own value")
        return value

    @field_validator("dual_clip")
    @classmethod
    def _dual_clip_or_off(cls, value: float) -> float:
        if 0 < value <= 1:
            raise ValueError("expected a number > 1 (3 is usual), or 0 to switch it off")
        return value


class TeacherConfig(Section):
    mode: Literal["ema", "frozen", "live"] = "ema"
    update_rate: float = Field(0.05, gt=0, le=1)  # μ: teacher ← (1 − μ) teacher + μ student
    max_prompt_length: int = Field(0, ge=0)  # tokens, enriched; 0 = data.max_prompt_length + rollout's response
    feedback_with_solution: bool = False  # show feedback also when a correct sibling exists
    template: str = "{question}{solution}{feedback}\n\n{instruction}"
    solution_section: str = "\n\nHere is a correct solution from an earlier attempt:\n\n{solution}"
    feedback_section: str = "\n\nFeedback on a failed attempt:\n\n{feedback}"
    instruction: str = "Now solve the original question correctly."


class RewardConfig(Section):
    functions: dict[str, str] = {}  # kind -> "module:function" or "path/file.py:function"; adds to the built-in ones
    workers: int = Field(2, ge=1)
    timeout_seconds: float = Field(10.0, gt=0)  # for one response
    memory_mib: int = Field(2048, ge=0)  # address space of a worker above its start; 0 = no limit
    failure_score: float = 0.0  # score of a time-out or crash


class OptimizerConfig(Section):
    lr: float = Field(5e-6, gt=0)
    warmup_steps: int = Field(0, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    min_lr: float = Field(0.0, ge=0)
    weight_decay: float = Field(0.01, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    clip_grad: float = Field(1.0, ge=0)  # 0 = off


class TrainConfig(Section):
    prompts_per_mini_batch: int = Field(0, ge=0)  # prompts an optimiser step; 0 = the whole batch
    max_tokens_per_gpu: int = Field(16384, ge=1)  # budget of one packed row


class CheckpointConfig(Section):
    every: int = Field(50, ge=0)  # iterations; 0 = only at the end
    keep: int = Field(2, ge=1)
    resume: bool = True  # from output_dir/checkpoints, if there is one


class EvalConfig(Section):
    every: int = Field(0, ge=0)  # iterations; 0 = off during training
    n_samples: int = Field(1, ge=1)  # k of avg@k, pass@k, maj@k
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_prompts: int = Field(0, ge=0)  # 0 = the whole split


class ObserveConfig(Section):
    tensorboard: bool = True
    wandb: bool = False
    wandb_project: str = "megatron-srpo"
    wandb_mode: Literal["online", "offline"] = "offline"
    progress: Literal["auto", "live", "plain", "off"] = "auto"


class Config(Section):
    run: RunConfig = RunConfig()
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    teacher: TeacherConfig = TeacherConfig()
    reward: RewardConfig = RewardConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    observe: ObserveConfig = ObserveConfig()
