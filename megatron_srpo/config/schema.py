"""The typed models: every key with its type, its default, its limits and, in the docstring under it, its meaning.

Types are strict: "3" is not a number and 1 is not a boolean, but an integer is accepted where a number is expected.
0 switches an optional number off, because TOML has no null. `reference.py` writes the docstrings to
docs/configuration.md. A docstring says first what the key does, then its unit, then its default and limits.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from megatron_srpo.algorithms.section import AnyAlgorithm, algorithm
from megatron_srpo.core.section import Folder, Section

Resettable = Literal["optimizer", "teacher", "data", "rng"]


class RunConfig(Section):
    name: str = "srpo"
    """Name of the run in the log and in TensorBoard and Weights & Biases. {benchmark} and {method} stand for
    run.benchmark and run.method."""
    output_dir: Folder = "runs/srpo"
    """Folder for metrics, checkpoints and, in `hf/`, the trained model. It is created if it does not exist. {benchmark}
    and {method} stand for run.benchmark and run.method, so that runs of a grid do not share a folder."""
    benchmark: str = ""
    """Name of the benchmark, for run.name, run.output_dir and reports. Letters, digits, ".", "_" and "-"."""
    method: str = ""
    """Name of the method, for run.name, run.output_dir and reports, for example of an ablation. Letters, digits, ".",
    "_" and "-". Empty takes algorithm.name."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of the data order, of sampling and of the choice of teachers."""
    iterations: int = Field(100, ge=1)
    """Number of iterations of the whole run. Each one generates, scores, trains and publishes weights once."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the trainer and of the engines it starts. "auto" takes CUDA if a GPU is visible, else the CPU."""
    control_timeout_minutes: float = Field(120, gt=0)
    """Minutes that a rank waits for the others in a collective, for example while rank 0 generates or scores. The run
    fails after that."""
    watchdog_minutes: float = Field(30, ge=0)
    """After this many minutes without progress every rank prints its phase and stack. 0 switches it off."""

    @field_validator("benchmark", "method")
    @classmethod
    def _part_of_a_path(cls, value: str) -> str:
        if value and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value):
            raise ValueError('expected a name of letters, digits, ".", "_" and "-", because folders are named after it')
        return value


class ModelConfig(Section):
    path: Folder
    """Hugging Face folder of the initial model: config.json, safetensors and the tokenizer."""
    tokenizer: Folder = ""
    """Folder of the tokenizer if it is not in `path`. Empty means `path`."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Data type of weights and activations. The optimizer always keeps fp32 main weights and moments."""
    hidden_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout probability on hidden states in the train pass. Scoring passes never drop anything."""
    attention_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout probability on attention weights in the train pass. Scoring passes never drop anything."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recomputation in the backward pass. "selective" recomputes the MLPs and experts, "full" recomputes
    whole layers."""
    recompute_layers: int = Field(0, ge=0)
    """Number of layers to recompute in each pipeline stage (in each virtual stage if stages are interleaved), counted
    from its first layer. Needs recompute = "full". 0 recomputes all layers."""
    fp8: Literal["off", "hybrid", "e4m3"] = "off"
    """FP8 format of matrix products. It needs Transformer Engine and a GPU with FP8 support."""


LoraTarget = Literal[
    "attention", "mlp", "experts", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
]
PROJECTIONS = {"attention": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}


class LoraConfig(Section):
    rank: int = Field(0, ge=0)
    """Rank r of the adapters. Above 0 only the adapters are trained and the weights of model.path stay as they are. 0
    trains all weights."""
    alpha: float = Field(32.0, gt=0)
    """The adapters' product B · A is multiplied by alpha / rank, or by alpha / sqrt(rank) with rslora."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout probability on the input of the adapters in the train pass. Scoring passes never drop anything."""
    targets: list[LoraTarget] = ["attention", "mlp"]
    """Which projections get an adapter. "attention" means q_proj, k_proj, v_proj and o_proj, "mlp" means gate_proj,
    up_proj and down_proj of layers without experts, "experts" means the same three of every expert. peft's names of
    single projections of attention and MLP are accepted as well."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank (rank-stabilised LoRA). Use it for ranks of 64 and more."""
    path: Folder = ""
    """Folder of a peft adapter to start from. Its rank, alpha and targets must be those of this section. Empty starts
    with new adapters, whose B is zero."""
    export: Literal["adapter", "merged"] = "adapter"
    """What the run writes to `hf/` in its output folder at its end: peft's adapter folder, or a Hugging Face model with
    the adapters merged into its weights."""

    publish: Literal["auto", "adapter", "merged"] = "auto"
    """What an iteration publishes to the engines: the adapters alone, which vLLM then applies, or the whole model with
    the adapters merged into its weights. "auto" takes "adapter", and "merged" for models with experts and for ranks
    above 512. "adapter" works for adapters on the attention of models with experts too, on GPUs, but not for adapters
    on experts."""

    @field_validator("targets", mode="before")
    @classmethod
    def _one_target(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @property
    def scale(self) -> float:
        """The factor of B · A."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    @property
    def projections(self) -> tuple[str, ...]:
        """peft's names of the targeted projections of attention and dense MLPs, in the model's order."""
        named = {name for target in self.targets for name in PROJECTIONS.get(target, (target,))}
        return tuple(name for names in PROJECTIONS.values() for name in names if name in named)

    @property
    def servable(self) -> bool:
        """Whether vLLM can apply the adapters, at least on GPUs."""
        return not self.experts and self.rank <= 512

    def published(self, experts: int) -> LoraConfig | None:
        """The adapters that publishes bring to the engines of a model with this number of experts per layer (0: dense),
        or None if they bring whole models."""
        alone = self.publish == "adapter" or (self.publish == "auto" and self.servable and not experts)
        return self if self.rank and alone else None

    @property
    def experts(self) -> bool:
        """Whether the experts get adapters."""
        return "experts" in self.targets


class ParallelConfig(Section):
    tensor_model_parallel_size: int = Field(1, ge=1)
    """Number of ranks that split every layer (TP)."""
    pipeline_model_parallel_size: int = Field(1, ge=1)
    """Number of pipeline stages, each with a part of the layers (PP)."""
    virtual_pipeline_model_parallel_size: int = Field(1, ge=1)
    """Number of virtual stages per pipeline stage (VPP). Above 1 the interleaved schedule is used."""
    context_parallel_size: int = Field(1, ge=1)
    """Number of ranks that split every sequence (CP). Use it for long sequences."""
    expert_model_parallel_size: int = Field(1, ge=1)
    """Number of ranks that share the experts of a layer (EP). They are taken from the TP, CP and DP ranks."""
    expert_tensor_parallel_size: int = Field(1, ge=1)
    """Number of ranks that split every expert (expert TP)."""
    sequence_parallel: bool = False
    """Split norms and residuals over the tensor-parallel ranks. Needs tensor_model_parallel_size > 1, and is required
    there for models with experts."""
    overlap_grad_reduce: bool = False
    """Reduce gradients over the data-parallel ranks while the last backward pass of a step still runs."""


class DataConfig(Section):
    train: str | list[str]
    """Training data: one or several files, .jsonl, .parquet, or .json (JSON Lines or one list of rows)."""
    test: str | list[str] = []
    """Held-out data for evaluation: one or several files, as in data.train."""
    prompt_key: str = "prompt"
    """Field of a row with the prompt: a string, or a list of chat messages. In this key and the other keys of fields,
    dots lead into objects, for example reward_model.ground_truth."""
    answer_key: str = "answer"
    """Field of a row with the answer that the reward function compares with."""
    kind_key: str = "kind"
    """Field of a row that names its reward function."""
    solution_key: str = ""
    """Field of a row with a worked solution, which the teacher source "solution" shows (algorithm.teachers). Rows may
    leave it out. Empty means that no row has one."""
    system_key: str = "system"
    """Field of a row with its system message. Rows may leave it out."""
    kind: str = ""
    """Reward function of rows that do not name one. Empty means that every row must name one."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What to do with a row that cannot be read. "error" refuses the run, "skip" leaves the row out and logs the
    count."""
    max_prompt_length: int = Field(2048, ge=1)
    """Longest prompt in tokens, including the chat template and the schemas of tools."""
    overlong_prompts: Literal["drop", "error"] = "drop"
    """What to do with a prompt over max_prompt_length. "drop" leaves it out and logs the count, "error" refuses the
    run."""
    shuffle: bool = True
    """Shuffle the training rows. The order depends on run.seed and the epoch."""
    chat_template_kwargs: dict[str, Any] = {}
    """Extra arguments of the tokenizer's chat template, for example { enable_thinking = false }."""


class RolloutConfig(Section):
    rollout_batch_size: int = Field(32, ge=1)
    """Number of prompts per iteration."""
    n_samples_per_prompt: int = Field(8, ge=1)
    """Number of responses per prompt. They form one group."""
    max_response_length: int = Field(8192, ge=1)
    """Longest response in tokens. Of an episode: all turns and all answers of the environment together."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature of training samples. The trainer divides its logits by the same number."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus sampling of training samples. Training requires 1. For evaluation use eval.top_p."""
    top_k: int = Field(0, ge=0)
    """Top-k sampling of training samples. Training requires 0, which means off."""
    placement: Literal["colocated", "servers"] = "colocated"
    """Where the engines run. "colocated" runs vLLM inside the training ranks, "servers" uses vLLM servers in processes
    of their own."""
    tensor_parallel_size: int = Field(1, ge=1)
    """Tensor-parallel size of one engine. It may differ from the trainer's."""
    gpu_memory_utilization: float = Field(0.5, gt=0, lt=1)
    """Fraction of a GPU's memory that an engine may use, as in vLLM. Raise it to 0.9 for servers on GPUs of their own;
    slurm/ does so for --rollout-nodes."""
    cpu_kv_cache_gib: float = Field(1.0, gt=0)
    """Size in GiB of the KV cache of an engine on a CPU."""
    max_num_seqs: int = Field(256, ge=1)
    """Largest number of responses that one engine generates at the same time."""
    max_num_batched_tokens: int = Field(0, ge=0)
    """Token budget of one engine step, prompt tokens included. 0 keeps vLLM's own default."""
    speculative_tokens: int = Field(0, ge=0, le=16)
    """Speculative decoding: the largest number of tokens that an engine drafts for a response and verifies in one step.
    It drafts what followed the same n-gram earlier. On a CPU responses and log-probs stay the same. 0 switches it
    off."""
    enforce_eager: bool = False
    """Run the engine without CUDA graphs and without compilation."""
    sleep_while_training: bool = False
    """Free the GPU memory of a colocated engine while the trainer trains."""
    max_refills: int = Field(0, ge=0)
    """Dynamic sampling: how many more batches may be generated per iteration to replace groups whose responses are all
    correct, or all wrong with nothing that could teach them. 0 trains on these groups too."""
    routing_replay: Literal["auto", "off", "rollout", "old"] = "auto"
    """Which experts the trainer uses for a token of a model with experts. "rollout" uses those that the engine chose
    when it generated the token (R3). "old" uses those that the trainer chose when it computed the old log-probs, in
    every later optimizer step of the iteration (R2). With "off" each pass makes its own choice. "auto" takes "rollout"
    for models with experts."""
    mismatch_warning: float = Field(0.05, ge=0)
    """Warn if trainer and engine log-probs differ by more than this on average, in nats per token. 0 switches it
    off."""
    start_mismatch_limit: float = Field(0.0, ge=0)
    """Refuse to start if trainer and engine log-probs differ by more than this on average before the first iteration,
    in nats per token. 0 takes the limit of the dtype: 0.01 for float32, 0.15 for bfloat16, 0.3 with model.fp8."""
    num_servers: int = Field(1, ge=1)
    """Number of servers that the run starts on the machine of rank 0. For placement = "servers"."""
    servers: list[str] = []
    """Addresses of external servers, http://HOST:PORT, to use instead of starting some. For placement = "servers"."""
    server_host: str = "127.0.0.1"
    """Address on which the servers that the run starts listen."""
    server_port: int = Field(0, ge=0, le=65535)
    """Port of the first server that the run starts. The others take the next ports. 0 takes free ports."""
    server_devices: list[int] = []
    """GPUs of the servers that the run starts. An empty list takes the GPUs after those of the training ranks."""
    server_environment: list[str] = []
    """Names of further environment variables that the servers inherit. Otherwise they inherit only what Python, CUDA,
    the network libraries and vLLM need, and no keys."""
    server_start_seconds: float = Field(900, gt=0)
    """Seconds that a server may take to start."""
    server_timeout_seconds: float = Field(60, gt=0)
    """Seconds without an answer to a health check after which a server counts as lost."""
    request_timeout_seconds: float = Field(3600, gt=0)
    """Seconds that one response may take."""
    max_server_restarts: int = Field(3, ge=0)
    """How many times in a row a server may be lost and restarted before it is given up. A response resets the count."""
    weight_transfer: Literal["auto", "gloo", "nccl"] = "auto"
    """Backend that sends weights to the servers. "auto" takes NCCL on GPUs and gloo on CPUs."""
    in_flight: Literal["finish", "pause", "abort"] = "finish"
    """What a publish does with running requests. "finish" waits for them, "pause" continues them with the new weights,
    "abort" cancels and resends them."""
    max_staleness: int = Field(0, ge=0)
    """Number of batches that servers may generate ahead of the training. A sample is then at most this many publishes
    older than the policy it trains. With partial_tokens: largest age in publishes of a response's first token when it
    is trained. 0 is exact on-policy training."""
    partial_tokens: int = Field(0, ge=0)
    """Partial rollouts, for placement = "colocated": engines generate in rounds, in which every response gets at most
    this many tokens. An iteration ends its rounds when rollout_batch_size groups are complete, and trains on these. All
    other responses keep their tokens and go on in the next iteration. Needs max_staleness. 0 completes every response
    in the iteration that starts it."""
    partial_groups: int = Field(0, ge=0)
    """With partial_tokens: number of groups that are started beyond rollout_batch_size. As many stay under way between
    two iterations, so the mean age of a trained response is partial_groups / rollout_batch_size publishes. 0 takes half
    of rollout_batch_size."""

    @property
    def extra_groups(self) -> int:
        """Groups that stay under way between two iterations."""
        return (self.partial_groups or -(-self.rollout_batch_size // 2)) if self.partial_tokens else 0

    def replay(self, experts: int) -> Literal["off", "rollout", "old"]:
        """routing_replay, resolved for a model with this number of experts per layer; 0 is a dense model."""
        if not experts:
            return "off"
        return "rollout" if self.routing_replay == "auto" else self.routing_replay


BUCKET_MIB = {"cpu": 32, "cuda": 256}  # by device, for bridge.bucket_mib = 0


class BridgeConfig(Section):
    bucket_mib: int = Field(0, ge=0)
    """Size in MiB of one gather bucket when weights are exported. Two buckets are alive at once; a larger tensor is a
    bucket of its own. 0 takes 256 on GPUs, where a bucket has a fixed cost, and 32 on CPUs, whose caches are small."""
    verify_every: int = Field(50, ge=0)
    """Verify every n-th publish by checksums on both sides, starting with the first. 1 verifies all, 0 none."""


class TeacherConfig(Section):
    mode: Literal["ema", "refresh", "frozen", "live", "trust_region"] = "ema"
    """Weights of the self-teacher. "ema" is a moving average of the student's weights, "refresh" a copy that takes the
    student's weights from time to time, "frozen" the initial weights, "live" the current ones. "trust_region" mixes the
    logits of the initial and the current model."""
    update_rate: float = Field(0.05, gt=0, le=1)
    """Rate μ. With "ema" the teacher becomes (1 − μ) · teacher + μ · student at each update. With "trust_region" its
    logits are (1 − μ) · initial + μ · current."""
    update_every: Literal["step", "iteration"] = "step"
    """When the "ema" teacher is updated: after each optimizer step, or once after the last one of an iteration, as in
    SDPO's code. They differ only if train.prompts_per_mini_batch makes several steps. train.score_every decides when it
    scores."""
    refresh_every: int = Field(10, ge=1)
    """Number of iterations between two refreshes of a "refresh" teacher."""
    refresh_when: Literal["always", "improved"] = "always"
    """Condition of a refresh. "improved" copies the student only if its mean reward is above those at all earlier
    refreshes, its responses have not become much shorter (refresh_min_length), and at most 10 % more of them are
    cut."""
    refresh_min_length: float = Field(0.8, ge=0, le=1)
    """With refresh_when = "improved": shortest mean response length that allows a refresh, as a share of the longest
    one at an earlier refresh, or at the start."""
    offload: bool = False
    """Keep the weights of the teacher and of the reference in host memory. Useful on GPUs only."""
    max_prompt_length: int = Field(0, ge=0)
    """Longest teacher prompt in tokens, with the solution, the feedback and the words of the templates. A solution that
    does not fit loses its middle and keeps its end. 0 means data.max_prompt_length + rollout.max_response_length + the
    words of the templates, as far as train.max_tokens_per_gpu and the model's positions allow."""
    routing_replay: bool = False
    """With rollout.routing_replay = "rollout": use the experts that the engine chose for a response also when the
    teacher and the reference score it. Tokens of a teacher's prompt choose for themselves, and where feedback stands
    between turns (feedback_at) so do those of the environment."""
    feedback_with_solution: bool = False
    """Show feedback to the teacher even if it sees the solution of a correct sibling. Needs algorithm.use_feedback."""
    feedback_at: Literal["prompt", "turn"] = "prompt"
    """Where the teacher reads feedback on an episode of several turns. "prompt" shows the last feedback of the episode
    in the first prompt. "turn" shows the feedback on each turn right before that turn: in the first prompt for the
    first turn, else at the end of the message that the turn answers."""
    template: str = "{question}{solution}{feedback}\n\n{instruction}"
    """Template of the teacher's last user message."""
    solution_section: str = "\n\nHere is a correct solution from an earlier attempt:\n\n{solution}"
    """Text of {solution} in the template. It is left out if no solution is shown."""
    feedback_section: str = "\n\nFeedback on a failed attempt:\n\n{feedback}"
    """Text of {feedback} in the template. It is left out if no feedback is shown."""
    instruction: str = "Now solve the original question correctly."
    """Text of {instruction} in the template."""


class RewardConfig(Section):
    functions: dict[str, str] = {}
    """Your own reward functions by kind, as "module:function" or "path/file.py:function". A path is relative to the
    folder in which the run starts. The built-in functions stay available."""
    mcq_format: Literal["strict", "lenient"] = "strict"
    """How the answer of a response of kind "mcq" is found. "strict" requires <answer>LETTER</answer>. "lenient" finds
    it as SDPO's code does: after the last <answer>, or from the start without that tag, up to </answer> or the end. Use
    it to compare scores with those of the SDPO and SRPO papers."""
    workers: int = Field(2, ge=1, le=1024)
    """Number of processes that score responses, over all ranks. They are shared among the engines; each engine has at
    least one."""
    timeout_seconds: float = Field(10.0, gt=0)
    """Seconds that the score of one response may take."""
    memory_mib: int = Field(2048, ge=0)
    """Address space in MiB that a worker may use beyond what it has at its start. 0 means no limit."""
    environment: list[str] = []
    """Names of environment variables, for example the key of a service, that the workers inherit. Otherwise they
    inherit only what Python and its libraries need, and no keys."""
    failure_score: float = Field(0.0, ge=-1e12, le=1e12)
    """Score of a response whose reward function or environment raised, timed out or crashed."""


class EnvironmentConfig(Section):
    classes: dict[str, str] = {}
    """Environments by kind of row: "tools", "python", "textarena", "openenv", "verifiers", or your own class as
    "module:Class" or "path/file.py:Class". A path is relative to the folder in which the run starts. Rows of other
    kinds are answered in one turn."""
    arguments: dict[str, dict[str, Any]] = {}
    """Arguments of the environments' constructors, by kind."""
    max_turns: int = Field(8, ge=1)
    """Largest number of the model's turns in an episode. An episode that needs more is cut."""
    max_turn_tokens: int = Field(0, ge=0)
    """Longest turn of the model in tokens. 0 means as much as rollout.max_response_length leaves. All turns and all
    answers of the environment together have at most rollout.max_response_length tokens."""
    history: Literal["split", "keep"] = "split"
    """What to do if the chat template rewrites earlier turns. "split" begins a new training sample with the rewritten
    text, as a server would send it. "keep" continues the tokens as they are. If the template rewrites nothing, both
    are the same."""
    processes: int = Field(256, ge=1)
    """Largest number of episodes that run at a time on one engine, each in a process of its own. Fewer than
    rollout.max_num_seqs leaves the engine waiting."""
    step_timeout_seconds: float = Field(30.0, gt=0)
    """Seconds that an environment may take to start or to answer a turn."""
    memory_mib: int = Field(2048, ge=0)
    """Address space in MiB that an episode's process may use beyond what it has at its start. 0 means no limit."""
    interpreter: Folder = ""
    """Python of another virtual environment, in which environments run. Use it for libraries that cannot be installed
    together with vLLM. Empty takes the trainer's own."""
    variables: list[str] = []
    """Names of environment variables, for example the key of a service, that environments inherit. Otherwise they
    inherit only what Python and its libraries need, and no keys."""


class OptimizerConfig(Section):
    lr: float = Field(5e-6, gt=0)
    """Learning rate of Adam after the warm-up."""
    warmup_steps: int = Field(0, ge=0)
    """Number of optimizer steps in which the learning rate rises linearly from 0 to lr."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate schedule after the warm-up. "linear" and "cosine" decay to min_lr at the end of the run."""
    min_lr: float = Field(0.0, ge=0)
    """Learning rate at the end of the run, for the schedules that decay."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled weight decay (AdamW) of weight matrices and embeddings. For norm scales and biases see
    decay_norms_and_biases."""
    decay_norms_and_biases: bool = False
    """Apply the weight decay to norm scales and biases too. Megatron and transformers do not. Set it to true to compare
    with a trainer that decays all parameters, or to continue a run that did."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Decay rate of Adam's first moment."""
    beta2: float = Field(0.999, ge=0, lt=1)
    """Decay rate of Adam's second moment."""
    eps: float = Field(1e-8, gt=0)
    """Term that Adam adds to the denominator."""
    clip_grad: float = Field(1.0, ge=0)
    """Largest global gradient norm. Larger gradients are scaled down to it. 0 switches it off."""
    offload: bool = False
    """Keep Adam's moments, and the fp32 main parameters of a bf16 model, in host memory. Each optimizer step copies
    them to the device and back in pieces of 256 MiB; the result is the same. It frees 12 bytes per parameter of a
    rank's shard (8 for an fp32 model), which the host's memory must hold. Useful on GPUs only."""


class TrainConfig(Section):
    prompts_per_mini_batch: int = Field(0, ge=0)
    """Number of prompts per optimizer step. It must divide rollout.rollout_batch_size. 0 takes the whole batch."""
    score_every: Literal["iteration", "step"] = "iteration"
    """When the student's top-k ids and the teachers' log-probs are computed. "iteration" computes them once, before the
    first optimizer step. "step" computes them again before each optimizer step, for its mini-batch and with the weights
    of that moment, which swaps the teacher's weights in for every step. The two differ only if prompts_per_mini_batch
    makes several steps. Old log-probs and those of the reference model are computed once per iteration with both."""
    share_prompts: bool = True
    """Compute the tokens that the prompts of a group have in common once per packed row, for all its responses in that
    row. The loss and its gradients are the same up to rounding. It has no effect with dropout, with moe_aux_loss_coef,
    or with Transformer Engine and context parallelism together."""
    max_tokens_per_gpu: int = Field(18432, ge=1)
    """Token budget of one packed row per GPU. A row holds this number times context_parallel_size tokens, and the
    longest teacher prompt with its response must fit."""
    logits_memory_mib: int = Field(2048, ge=1)
    """Memory limit for logits in MiB. Logits of a row that exceed it are computed in chunks and computed again in the
    backward pass."""
    teacher_head_mib: int = Field(2048, ge=0)
    """Memory limit in MiB on a device for a copy of the teacher's LM head (this rank's shard). With the copy, the train
    pass finds the student's top-k ids itself in the steps whose policy has not moved, which saves a forward pass over
    the distilled samples and takes one hidden state of host memory per distilled token. The result is the same. 0 makes
    no copy."""
    max_skipped_steps: int = Field(10, ge=0)
    """Stop with a checkpoint after this many optimizer steps in a row without a finite gradient. 0 never stops."""
    collapse_share: float = Field(0.5, ge=0, lt=1)
    """Warn that responses collapse if the mean length of all and of correct responses over 10 iterations falls below
    this share of its highest value so far. docs/algorithms.md lists further conditions of this warning. 0 switches it
    off."""
    stop_on_collapse: bool = False
    """Stop with a checkpoint at this warning."""
    moe_aux_loss_coef: float = Field(0.0, ge=0)
    """Coefficient of the load-balancing loss of the expert routers, computed per row. A usual value is 0.001. It needs
    lora.rank = 0, because adapters train no routers. 0 switches it off."""
    offload_while_generating: bool = False
    """Move the trainer's weights and optimizer state to host memory while colocated engines generate. Needs
    rollout.sleep_while_training."""
    skip_zero_advantage: bool = True
    """Do not forward samples whose gradient is exactly zero. The loss does not change."""


class CheckpointConfig(Section):
    every: int = Field(50, ge=0)
    """Number of iterations between two checkpoints. The last iteration is always saved. 0 saves only there."""
    keep: int = Field(2, ge=1)
    """Number of newest checkpoints to keep."""
    keep_best: str = ""
    """Metric whose best checkpoint is kept as well, for example "eval/accuracy". A leading "-" means that lower is
    better. Empty switches it off."""
    asynchronous: bool = True
    """Write checkpoints in a background thread while the training continues."""
    retry_minutes: float = Field(10.0, ge=0)
    """How long the run tries again, in minutes, if the disk does not take its last checkpoint."""
    fallback_dir: Folder = ""
    """Folder on another disk for the last checkpoint, or for its weights, if output_dir does not take it within
    checkpoint.retry_minutes. Several runs may share it: each writes into a folder of its own there. Empty means
    none."""
    resume: bool = True
    """Continue from the newest checkpoint in output_dir/checkpoints, if one exists."""
    allow_reset: list[Resettable] = []
    """Parts of the state that a resumed run may start from scratch if it cannot restore them."""


class EvalConfig(Section):
    every: int = Field(0, ge=0)
    """Number of iterations between two evaluations on data.test. 0 does not evaluate during the training."""
    n_samples: int = Field(1, ge=1)
    """Number of responses per prompt: the k of avg@k, pass@k and maj@k."""
    temperature: float = Field(1.0, ge=0)
    """Sampling temperature of the evaluation. 0 is greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus sampling of the evaluation. 1 means off."""
    max_prompts: int = Field(0, ge=0)
    """Evaluate only the first prompts of the split, up to this number. 0 evaluates all."""


class ObserveConfig(Section):
    tensorboard: bool = True
    """Write TensorBoard files to output_dir/tensorboard."""
    wandb: bool = False
    """Log to Weights & Biases."""
    wandb_project: str = "megatron-srpo"
    """Project in Weights & Biases."""
    wandb_mode: Literal["online", "offline"] = "offline"
    """Whether Weights & Biases uploads during the run ("online") or writes to output_dir for a later sync."""
    rollout_texts: int = Field(1, ge=0)
    """Number of prompts per iteration whose responses are written in full to rollouts.jsonl."""
    progress: Literal["auto", "live", "plain", "off"] = "auto"
    """Progress display. "auto" draws a live display in a terminal and prints plain lines elsewhere."""


class Config(Section):
    run: RunConfig = RunConfig()
    model: ModelConfig
    lora: LoraConfig = LoraConfig()
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    bridge: BridgeConfig = BridgeConfig()
    algorithm: AnyAlgorithm = algorithm()
    teacher: TeacherConfig = TeacherConfig()
    reward: RewardConfig = RewardConfig()
    environment: EnvironmentConfig = EnvironmentConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    observe: ObserveConfig = ObserveConfig()

    @property
    def writes_adapter(self) -> bool:
        """Whether the run's result is an adapter, and not a whole model."""
        return self.lora.rank > 0 and self.lora.export == "adapter"

    @property
    def fallback_folder(self) -> str:
        """This run's folder in checkpoint.fallback_dir, named after its output folder; "" without one."""
        if not self.checkpoint.fallback_dir:
            return ""
        output = Path(self.run.output_dir).resolve()
        digest = hashlib.blake2b(str(output).encode(), digest_size=4).hexdigest()
        return str(Path(self.checkpoint.fallback_dir) / f"{output.name}-{digest}")

    @property
    def row_budget(self) -> int:
        """Tokens of the largest packed row, over all the ranks that share it."""
        return self.train.max_tokens_per_gpu * self.parallel.context_parallel_size

    @property
    def drops_zero_gradient(self) -> bool:
        """Whether samples that no loss term gives a gradient need no pass: the routers' load balancing gives them
        one."""
        return self.train.skip_zero_advantage and not self.train.moe_aux_loss_coef
