"""The typed models: every key, its type, its default and, in the comment beside it, what it means.

Types are strict: "3" is no number and 1 is no boolean (an integer where a number is wanted is fine). 0 switches an
optional number off (TOML has no null). `reference.py` reads the comments.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from megatron_srpo.algorithms.section import AnyAlgorithm, algorithm
from megatron_srpo.core.section import Folder, Section

Resettable = Literal["optimizer", "teacher", "data", "rng"]


class RunConfig(Section):
    name: str = "srpo"  # shown in the log and in the trackers
    output_dir: Folder = "runs/srpo"  # metrics, checkpoints, the trained model in hf/
    seed: int = Field(0, ge=0, lt=2**31)  # of data order, sampling and routing
    iterations: int = Field(100, ge=1)  # generate, score, train, publish: once each
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: CUDA where there is a GPU
    control_timeout_minutes: float = Field(120, gt=0)  # how long ranks wait for the driver
    watchdog_minutes: float = Field(30, ge=0)  # nothing moves for so long: every rank says where it is; 0 = off


class ModelConfig(Section):
    path: Folder  # a Hugging Face folder: config.json, safetensors, tokenizer
    tokenizer: Folder = ""  # another folder for the tokenizer; "" = path
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of weights and activations; the optimizer is fp32
    hidden_dropout: float = Field(0.0, ge=0, lt=1)  # of the training pass; the scoring passes never drop
    attention_dropout: float = Field(0.0, ge=0, lt=1)
    recompute: Literal["none", "selective", "full"] = "none"  # again in the backward pass: the MLPs, or whole layers
    recompute_layers: int = Field(0, ge=0)  # with "full": the first so many layers of each stage's piece; 0 = all
    fp8: Literal["off", "hybrid", "e4m3"] = "off"  # products in 8 bits; needs Transformer Engine and a GPU that has it


class ParallelConfig(Section):
    tensor_model_parallel_size: int = Field(1, ge=1)  # ranks that share every layer
    pipeline_model_parallel_size: int = Field(1, ge=1)  # ranks that share the stack of layers
    virtual_pipeline_model_parallel_size: int = Field(1, ge=1)  # pieces of the stack a rank; > 1: interleaved schedule
    context_parallel_size: int = Field(1, ge=1)  # ranks that share every sequence, for long ones
    expert_model_parallel_size: int = Field(1, ge=1)  # ranks that share the experts of a layer; may span TP, CP and DP
    expert_tensor_parallel_size: int = Field(1, ge=1)  # ranks that share every expert
    sequence_parallel: bool = False  # norms and residuals split over tensor-parallel ranks
    overlap_grad_reduce: bool = False  # gradients are summed over data-parallel ranks during the last backward pass


class DataConfig(Section):
    train: str | list[str]  # jsonl or parquet files
    test: str | list[str] = []  # the held-out files, for evaluation
    prompt_key: str = "prompt"  # field with a text or a list of chat messages
    answer_key: str = "answer"  # field that the reward compares with
    kind_key: str = "kind"  # field that names the reward
    system_key: str = "system"  # optional field with the system message
    kind: str = ""  # the reward of rows that have no kind of their own
    on_bad_row: Literal["error", "skip"] = "error"  # skip: counted in the log
    max_prompt_length: int = Field(2048, ge=1)  # tokens, chat template included
    overlong_prompts: Literal["drop", "error"] = "drop"  # drop: counted in the log
    shuffle: bool = True  # by seed and epoch
    chat_template_kwargs: dict[str, Any] = {}  # e.g. { enable_thinking = false }


class RolloutConfig(Section):
    rollout_batch_size: int = Field(32, ge=1)  # prompts an iteration
    n_samples_per_prompt: int = Field(8, ge=1)  # responses a prompt: the group
    max_response_length: int = Field(8192, ge=1)  # tokens
    temperature: float = Field(1.0, gt=0)  # of training samples; the trainer scores at the same one
    top_p: float = Field(1.0, gt=0, le=1)  # training needs 1: see eval.top_p
    top_k: int = Field(0, ge=0)  # 0 = off; training needs 0
    placement: Literal["colocated", "servers"] = "colocated"  # in the training ranks, or vLLM servers beside them
    tensor_parallel_size: int = Field(1, ge=1)  # ranks an engine; need not be the trainer's
    gpu_memory_utilization: float = Field(0.5, gt=0, lt=1)  # the engine's share of a GPU
    cpu_kv_cache_gib: float = Field(1.0, gt=0)  # of an engine on a CPU
    max_num_seqs: int = Field(256, ge=1)  # responses that an engine works on at once
    max_num_batched_tokens: int = Field(0, ge=0)  # of one step of an engine, prompts included; 0: vLLM's own choice
    enforce_eager: bool = False  # no CUDA graphs, no compilation
    sleep_while_training: bool = False  # a colocated engine frees its GPU memory until it generates
    max_refills: int = Field(0, ge=0)  # batches drawn in place of groups all right or all wrong; 0 = train on those too
    mismatch_warning: float = Field(0.05, ge=0)  # mean |Δ log-prob| trainer vs engine that warns
    # placement = "servers"
    num_servers: int = Field(1, ge=1)  # that we start, on the driver's machine
    servers: list[str] = []  # addresses of running ones instead: http://HOST:PORT
    server_host: str = "127.0.0.1"  # the address that ours listen on
    server_port: int = Field(0, ge=0, le=65535)  # of the first, the next ones count up; 0 = free ones
    server_devices: list[int] = []  # GPUs of ours; [] = those after the training ranks'
    server_start_seconds: float = Field(900, gt=0)  # until a server must answer first
    server_timeout_seconds: float = Field(60, gt=0)  # until a server that gives no sign of life counts as lost
    request_timeout_seconds: float = Field(3600, gt=0)  # for one response
    max_server_restarts: int = Field(3, ge=0)  # of one server, without a response in between
    weight_transfer: Literal["auto", "gloo", "nccl"] = "auto"  # how weights travel; auto: NCCL on GPUs
    in_flight: Literal["finish", "pause", "abort"] = "finish"  # what a publish does with requests that run
    max_staleness: int = Field(0, ge=0)  # publishes that a sample may be behind the policy it trains; 0 = exact


class BridgeConfig(Section):
    bucket_mib: int = Field(32, ge=1)  # of weights gathered at a time; two are held, and a larger tensor is one alone
    verify_every: int = Field(50, ge=0)  # publishes from one verification by checksums to the next; 1 = all, 0 = none


class TeacherConfig(Section):
    mode: Literal["ema", "frozen", "live", "trust_region"] = "ema"  # average, initial, current, or initial moved by μ
    update_rate: float = Field(0.05, gt=0, le=1)  # μ of ema, teacher ← (1 − μ) teacher + μ student, and of trust_region
    offload: bool = False  # keep the teacher's (and the reference's) weights in host memory; for GPUs
    max_prompt_length: int = Field(0, ge=0)  # tokens, enriched; 0 = data.max_prompt_length + rollout's response
    feedback_with_solution: bool = False  # show feedback also when a correct sibling exists
    template: str = "{question}{solution}{feedback}\n\n{instruction}"  # of the last user message
    solution_section: str = "\n\nHere is a correct solution from an earlier attempt:\n\n{solution}"
    feedback_section: str = "\n\nFeedback on a failed attempt:\n\n{feedback}"
    instruction: str = "Now solve the original question correctly."


class RewardConfig(Section):
    functions: dict[str, str] = {}  # kind -> "module:function" or "path/file.py:function"; adds to the built-in ones
    workers: int = Field(2, ge=1, le=1024)  # processes that score responses: of all ranks, at least one an engine
    timeout_seconds: float = Field(10.0, gt=0)  # for one response
    memory_mib: int = Field(2048, ge=0)  # address space of a worker above its start; 0 = no limit
    failure_score: float = 0.0  # score of a time-out or crash


class OptimizerConfig(Section):
    lr: float = Field(5e-6, gt=0)
    warmup_steps: int = Field(0, ge=0)  # optimiser steps from 0 to lr
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # after the warm-up; the others go down to min_lr
    min_lr: float = Field(0.0, ge=0)
    weight_decay: float = Field(0.01, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    clip_grad: float = Field(1.0, ge=0)  # 0 = off


class TrainConfig(Section):
    prompts_per_mini_batch: int = Field(0, ge=0)  # prompts an optimiser step; 0 = the whole batch
    max_tokens_per_gpu: int = Field(18432, ge=1)  # × context_parallel_size: a packed row; the longest teacher row fits
    logits_memory_mib: int = Field(2048, ge=1)  # logits that exist at a time; rows that need more make them twice
    max_skipped_steps: int = Field(10, ge=0)  # so many steps in a row without a finite gradient end the run; 0 = never
    moe_aux_loss_coef: float = Field(0.0, ge=0)  # of the routers' load-balancing loss, by row; 0 = off, 0.001 is usual
    offload_while_generating: bool = False  # the trainer leaves the GPU while engines have their turn
    skip_zero_advantage: bool = True  # do not forward samples whose gradient is exactly zero; the loss is the same


class CheckpointConfig(Section):
    every: int = Field(50, ge=0)  # iterations; 0 = only at the end
    keep: int = Field(2, ge=1)  # the newest ones
    keep_best: str = ""  # a metric whose best checkpoint is kept too, e.g. "eval/accuracy"; "-name": the least is best
    asynchronous: bool = True  # training goes on while a checkpoint is written
    resume: bool = True  # from output_dir/checkpoints, if there is one
    allow_reset: list[Resettable] = []  # what a resumed run may start anew where it cannot be continued


class EvalConfig(Section):
    every: int = Field(0, ge=0)  # iterations; 0 = off during training
    n_samples: int = Field(1, ge=1)  # k of avg@k, pass@k, maj@k
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_prompts: int = Field(0, ge=0)  # 0 = the whole split


class ObserveConfig(Section):
    tensorboard: bool = True  # in output_dir/tensorboard
    wandb: bool = False  # Weights & Biases
    wandb_project: str = "megatron-srpo"
    wandb_mode: Literal["online", "offline"] = "offline"
    rollout_texts: int = Field(1, ge=0)  # prompts an iteration whose responses are kept whole in rollouts.jsonl
    progress: Literal["auto", "live", "plain", "off"] = "auto"  # auto: live in a terminal, else lines


class Config(Section):
    run: RunConfig = RunConfig()
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    bridge: BridgeConfig = BridgeConfig()
    algorithm: AnyAlgorithm = algorithm()
    teacher: TeacherConfig = TeacherConfig()
    reward: RewardConfig = RewardConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    observe: ObserveConfig = ObserveConfig()

    @property
    def row_budget(self) -> int:
        """Tokens of the largest packed row, over all the ranks that share it."""
        return self.train.max_tokens_per_gpu * self.parallel.context_parallel_size

    @property
    def drops_zero_gradient(self) -> bool:
        """Whether samples that no loss term gives a gradient need no pass: the routers' load balancing gives them
        one."""
        return self.train.skip_zero_advantage and not self.train.moe_aux_loss_coef
