"""Predicts the memory of one GPU, part by part: what is always there, and what each phase of an iteration adds.

weights      in the model's dtype, in Megatron DDP's parameter buffer; with LoRA also the adapters, and gradients,
             optimizer, shadow and checkpoints are of adapters alone
gradients    fp32 (DistributedDataParallelConfig.grad_reduce_in_fp32), complete on every data-parallel rank
optimizer    fp32 main parameters (for bf16 models; those of fp32 models are views of the weights) and Adam's two
             moments, sharded over data- and context-parallel ranks (ZeRO stage 1; Rajbhandari et al. 2020); with
             optimizer.offload one piece of it
shadow       fp32 weights of the teacher and of the reference, as many as the method has, sharded like the optimizer
activations  see activations.py
head         hidden states, logits and log-probs of the last stage, and what it holds of the teacher
engine …     the share of a colocated vLLM: weights, KV cache, its own activations
publish      two gathered buckets, this rank's part of each, and the full tensors of one parameter (bridge/export.py)
checkpoint   saving: one whole fp32 parameter at a time. Loading: copies of the gate and up projections, which Megatron
             stores apart; fp32 state goes through the host, one kind at a time (mcore/checkpoint.py).
             What both copy to the host is counted by node (saving_host_bytes, loading_host_bytes)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from megatron_srpo.plan.activations import LOGITS_MIB, layer_bytes, stage_activations
from megatron_srpo.plan.architecture import Architecture
from megatron_srpo.plan.hardware import Machine
from megatron_srpo.plan.layout import Layout, stage_layers
from megatron_srpo.plan.parameters import fullest_stage, published_adapters, stage_parameters, trained_parameters
from megatron_srpo.plan.sharing import kept_keys
from megatron_srpo.plan.workload import Workload

OPTIMIZER_PIECE = 2**28  # bytes; mcore/host_state.py's PIECE, whose module needs torch
PHASES = ("generate", "swap", "score", "train", "publish", "save", "load")  # of a run, in which memory differs
SWAPPED_BYTES = 2.0 * 4 * 2**22  # two fp32 pieces that a swap holds (mcore/shadow.py: EXCHANGED)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on the fullest GPU of one role. `lines` add up to `total`, in the phase that needs most."""

    lines: dict[str, float]
    limit: float
    kv_cache: float  # of one engine rank's KV cache, a line where it is colocated
    notes: list[str] = field(default_factory=list)
    host_loading: float = 0.0  # bytes of a node's host memory that the training ranks need to load a checkpoint
    host_state: float = 0.0  # and those of optimizer and shadow, where these are kept there
    host_saving: float = 0.0  # and those from a save until its files are written
    host_scores: float = 0.0  # and those of what scoring passes keep of the teacher for a train step
    host_turns: float = 0.0  # and those of the trainer's tensors while engines generate, kept from the first turn on
    host_engines: float = 0.0  # and those of the weights of sleeping engines
    phases: dict[str, float] = field(default_factory=dict)  # bytes of every phase, on the stage that needs most in it

    @property
    def host(self) -> dict[str, float]:
        """Bytes of a node's host memory, in words. All but those of loading may be needed at once."""
        return {
            "saving a checkpoint": self.host_saving,
            "loading a checkpoint": self.host_loading,
            "optimizer and shadow": self.host_state,
            "the trainer's copies for turns": self.host_turns,
            "weights of sleeping engines": self.host_engines,
            "the teacher's scores": self.host_scores,
        }

    @property
    def total(self) -> float:
        return sum(self.lines.values())

    @property
    def fits(self) -> bool:
        return self.total <= self.limit and not self.notes


def persistent_lines(
    arch: Architecture, layout: Layout, stage: int, *, shadows: int = 1, sharding: tuple[int, int] | None = None
) -> dict[str, float]:
    """Bytes of weights, gradients, optimizer and shadows (the EMA teacher, a reference policy) on a rank of a stage."""
    part = trained_parameters(arch, layout, stage)
    held = stage_parameters(arch, layout, stage).whole + (part.whole if layout.lora_rank else 0)
    by, experts_by = sharding or (layout.sharding, layout.expert_sharding)
    shard = part.ordinary / by + part.experts / experts_by
    state = state_bytes(layout)
    optimizer = state * shard
    if layout.optimizer_on_host:  # a piece at a time (mcore/host_state.py), and at least one slice of a parameter
        optimizer = min(optimizer, max(OPTIMIZER_PIECE, state * largest_parameter(arch, layout)))
    return {
        "weights": layout.dtype_bytes * held,
        "gradients": 4.0 * part.whole,
        "optimizer": optimizer,
        "shadow": 0.0 if layout.shadow_on_host else 4.0 * shard * shadows,
    }


def state_bytes(layout: Layout) -> int:
    """Bytes of the optimizer's state per parameter of a shard."""
    return 12 if layout.dtype_bytes == 2 else 8


def largest_parameter(arch: Architecture, layout: Layout) -> float:
    """Numbers of the largest parameter that a rank trains. Data-parallel ranks share what they train as one flat run of
    numbers, so that the slice of one of them can be a whole parameter."""
    largest = max(arch.vocab * arch.hidden, 2 * arch.hidden * max(arch.ffn, arch.expert_ffn))
    if layout.lora_rank:
        largest = layout.lora_rank * max(arch.hidden, arch.query, arch.ffn, arch.expert_ffn)
    return largest / layout.tensor


def host_state_bytes(arch: Architecture, layout: Layout, machine: Machine, *, shadows: int = 1) -> float:
    """Host memory of a node for what is kept there all the time: the optimizer's state and the shadows."""
    each = state_bytes(layout) * layout.optimizer_on_host + 4 * shadows * layout.shadow_on_host
    return each * fullest_stage(arch, layout)[1] * min(machine.node, layout.training_gpus)


def leaving_bytes(arch: Architecture, layout: Layout, stage: int, *, shadows: int = 1) -> float:
    """Bytes of a rank that move to the host while engines generate: weights, shadows and optimizer, as far as they are
    not there anyway (mcore/policy.py::on_host)."""
    lines = persistent_lines(arch, layout, stage, shadows=shadows)
    return lines["weights"] + lines["shadow"] + (0.0 if layout.optimizer_on_host else lines["optimizer"])


def turns_host_bytes(arch: Architecture, layout: Layout, machine: Machine, *, shadows: int = 1) -> float:
    """Page-locked host memory of a node for these moves. It is allocated once and kept (mcore/host_offload.py)."""
    if not layout.trainer_leaves:
        return 0.0
    stages = range(layout.pipeline)
    most = max(leaving_bytes(arch, layout, stage, shadows=shadows) for stage in stages)
    return most * min(machine.node, layout.training_gpus)


def sleeping_host_bytes(arch: Architecture, layout: Layout, machine: Machine) -> float:
    """Host memory of a node for the weights of engines that sleep. After rollouts they are dropped, unless publishes
    bring adapters alone; after an evaluation they are kept (rollout/vllm/colocated.py)."""
    if not (layout.colocated and layout.engine_sleeps):
        return 0.0
    return engine_weights(arch, layout) * min(machine.node, layout.gpus)


def engine_weights(arch: Architecture, layout: Layout) -> float:
    """Bytes of an engine rank's weights. vLLM has a tied head once."""
    return layout.dtype_bytes * arch.parameters / layout.engine_tensor


def kv_bytes_a_token(arch: Architecture, layout: Layout) -> float:
    """Keys and values of all layers on one engine rank; key-value heads are repeated where there are more ranks."""
    groups = max(1.0, arch.groups / layout.engine_tensor)
    return 2 * arch.layers * groups * arch.head_dim * layout.dtype_bytes


def publish_bytes(arch: Architecture, layout: Layout) -> float:
    """Two buckets gathered, and this rank's part of each; the embedding, if larger, is one of them; then the full
    tensors of one parameter. Without tensor and pipeline parallelism tensors are views."""
    if layout.tensor == layout.pipeline == layout.expert == 1:
        return 0.0
    largest = max(arch.vocab * arch.hidden, 2 * arch.hidden * max(arch.ffn, arch.expert_ffn)) * layout.dtype_bytes
    gathered = max(layout.bucket_bytes, largest) + layout.bucket_bytes
    if adapters := published_adapters(arch, layout)[0]:
        largest = layout.lora_rank * max(arch.hidden, arch.ffn, arch.query) * layout.dtype_bytes
        gathered = min(2 * layout.bucket_bytes, adapters * layout.dtype_bytes)
    return gathered * (1 + 1 / layout.tensor) + largest


def saving_bytes(arch: Architecture, layout: Layout) -> float:
    """One whole fp32 parameter of this rank, which a save gathers from the data-parallel ranks."""
    return 4.0 * largest_parameter(arch, layout)


def loading_bytes(arch: Architecture, layout: Layout, stage: int) -> float:
    """Copies of a rank's gate and up projections, in the model's dtype, when a checkpoint is loaded."""
    if layout.lora_rank:
        return 0.0  # the factors of gate and up are apart
    layers = stage_layers(arch.layers, layout)[stage]
    mlps = layers * arch.mlp_matrices / layout.tensor + stage_parameters(arch, layout, stage).experts
    return layout.dtype_bytes * mlps * 2 / 3


def loading_host_bytes(arch: Architecture, layout: Layout, machine: Machine) -> float:
    """Host memory of a node while its ranks load a checkpoint: the whole fp32 tensors, of one kind of state, of the
    parameters that a rank has a slice of. The first and the last slice of a rank may be parts of large tensors."""
    whole, share = fullest_stage(arch, layout)
    most = min(4.0 * whole, 4.0 * share + 2 * saving_bytes(arch, layout))
    return most * min(machine.node, layout.training_gpus)


def saving_host_bytes(arch: Architecture, layout: Layout, machine: Machine, *, shadows: int = 1) -> float:
    """Host memory of a node from a save until its files are written: every rank copies the chunks that it writes of
    weights, main parameters, both moments and every shadow (mcore/checkpoint_copies.py), into pageable memory.

    Megatron distributes the chunks over all data-parallel ranks, the largest ones first. A rank gets its share, or
    one of the largest chunks where these are larger than a share.
    """
    share = (4.0 * (3 + shadows) + layout.dtype_bytes) * fullest_stage(arch, layout)[1]
    uneven = layout.sharding > 1
    return max(share, saving_bytes(arch, layout) if uneven else 0.0) * min(machine.node, layout.training_gpus)


def training_memory(
    arch: Architecture, layout: Layout, workload: Workload, machine: Machine, *, rows: int, path: str = "te",
    logits_mib: int = LOGITS_MIB,
) -> MemoryPlan:  # fmt: skip
    """The fullest pipeline stage of a training GPU; `rows` packed rows a data-parallel rank and optimizer step."""
    layers = stage_layers(arch.layers, layout)
    stages = sorted({0, layers.index(max(layers)), layout.pipeline - 1})
    found = [_phases(arch, layout, workload, machine, stage, rows, path, logits_mib) for stage in stages]
    lines = max((phase for phases in found for phase in phases.values()), key=lambda phase: sum(phase.values()))
    totals = {name: max(sum(phases[name].values()) for phases in found) for name in PHASES}
    cache = colocated_cache(arch, layout, machine)
    notes = cache_problem(arch, layout, workload, cache) if layout.colocated else []
    return MemoryPlan(
        lines, machine.usable, max(0.0, cache), notes,
        host_loading=loading_host_bytes(arch, layout, machine),
        host_state=host_state_bytes(arch, layout, machine, shadows=workload.shadows),
        host_saving=saving_host_bytes(arch, layout, machine, shadows=workload.shadows),
        host_scores=scores_host_bytes(arch, layout, workload, machine, rows=rows),
        host_turns=turns_host_bytes(arch, layout, machine, shadows=workload.shadows),
        host_engines=sleeping_host_bytes(arch, layout, machine),
        phases=totals,
    )  # fmt: skip


def colocated_cache(arch: Architecture, layout: Layout, machine: Machine) -> float:
    """Bytes that a colocated engine's share leaves for its KV cache; negative if the share is too small."""
    if not layout.colocated:
        return 0.0
    return layout.engine_memory * machine.memory - engine_weights(arch, layout) - engine_activations(arch, layout)


def teacher_head_bytes(arch: Architecture, layout: Layout, workload: Workload) -> float:
    """The copies of LM heads with which the train pass finds the student's top-k ids. A teacher that is the student
    itself, or differs from it in adapters alone, has the student's head."""
    copies = 2 if workload.joins_heads else int(workload.mode != "live" and not layout.lora_rank)
    return copies * layout.dtype_bytes * math.ceil(arch.vocab / layout.tensor) * arch.hidden


def train_pass_finds_topk(arch: Architecture, layout: Layout, workload: Workload) -> bool:
    """Whether it does (losses/objective.py::one_student_pass)."""
    budget = workload.teacher_head_mib * 2**20
    return workload.topk > 0 and workload.distilled > 0 and 0 < budget >= teacher_head_bytes(arch, layout, workload)


def teacher_bytes(
    arch: Architecture, layout: Layout, workload: Workload, *, logits_mib: int = LOGITS_MIB
) -> tuple[float, float]:
    """What the last stage holds of the teacher for a row, in a (scoring pass, train pass), besides log-probs at ids.

    A scoring pass returns a copy, of which the trained positions are copied once more. The train pass has the row's
    scores, the part of them at trained positions, and of these the distilled ones.
    """
    if workload.distilled == 0:
        return 0.0, 0.0
    w, whole_row = layout.dtype_bytes, 1 + layout.context  # a part and the row that context-parallel ranks gather
    hidden = w * layout.max_tokens * arch.hidden
    heads = teacher_head_bytes(arch, layout, workload)
    score = train = 0.0
    if workload.joins_heads:  # both heads, and the initial one on its way; twice its hidden states, halves, both joined
        score, train = 1.5 * heads + 7 * hidden, heads
    if workload.full_vocabulary:  # in training also the student's logits uncut, and their gradient
        logits = w * layout.max_tokens * math.ceil(arch.vocab / layout.tensor)
        return score + whole_row * logits - min(logits, logits_mib * 2**20), train + 3 * logits
    if train_pass_finds_topk(arch, layout, workload):
        if workload.joins_heads:
            return score, train + 3 * 2 * hidden
        return heads + whole_row * hidden, heads + 3 * hidden
    return score, train


def scores_host_bytes(arch: Architecture, layout: Layout, workload: Workload, machine: Machine, *, rows: int) -> float:
    """Host memory of a node for the teacher's hidden states or logits, from the scoring pass to their step, and once
    more in the packed rows of a step: logits of all distilled tokens of its ranks, hidden states of those of one step.
    """
    scored = workload.distilled_tokens * (1 + workload.imbalance) / layout.data  # in one pass
    scored, kept = scored / (workload.steps if workload.scores_each_step else 1), scored / workload.steps
    width = 0
    if workload.full_vocabulary and workload.distilled > 0:
        width, kept = math.ceil(arch.vocab / layout.tensor), scored
    elif train_pass_finds_topk(arch, layout, workload):
        width = arch.hidden * (2 if workload.joins_heads else 1)
    packed = rows * layout.max_tokens * layout.context
    values = (kept + packed) * width
    if workload.joins_heads:  # the initial model's head, and its hidden states until the teacher pass is over
        initial = math.ceil(arch.vocab / layout.tensor) * arch.hidden
        values = initial + kept * width + max(packed * width, scored * arch.hidden)
    last_stage = min(machine.node, layout.training_gpus // layout.pipeline)
    return layout.dtype_bytes * values * last_stage


def _phases(
    arch: Architecture, layout: Layout, workload: Workload, machine: Machine, stage: int, rows: int, path: str,
    logits_mib: int,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """The lines of every phase on a stage, by the names of PHASES."""
    ids = 1 + (workload.topk if workload.distilled > 0 else 0)
    trained, seen = kept_keys(workload, layout, path=path)
    held, head = stage_activations(
        arch, layout, stage, layout.max_tokens, rows, path=path, ids=ids, logits_mib=logits_mib, keys=trained
    )
    scored = layout.max_tokens * layer_bytes(arch, layout, path=path, keys=seen).whole, head
    if (
        layout.overlap_grad_reduce and not layout.lora_rank and stage == layout.pipeline - 1
    ):  # losses/linear.py: zeros for DDP
        head += layout.dtype_bytes * arch.vocab * arch.hidden / layout.tensor
    if stage == layout.pipeline - 1:
        more = teacher_bytes(arch, layout, workload, logits_mib=logits_mib)
        scored, head = (scored[0], scored[1] + more[0]), head + more[1]
    engine: dict[str, float] = {}
    if layout.colocated:
        cache = max(0.0, colocated_cache(arch, layout, machine))
        engine = {
            "engine weights": engine_weights(arch, layout),
            "engine work": engine_activations(arch, layout),
            "KV cache": cache,
        }
    idle = persistent_lines(arch, layout, stage, shadows=workload.shadows)
    idle |= dict.fromkeys(("activations", "loss and logits", "publish", "checkpoint"), 0.0)
    generating = dict.fromkeys(idle, 0.0) if layout.trainer_leaves else idle
    # An engine that wakes up loads the new weights before it allocates its cache again.
    asleep, woken = ({}, engine | {"KV cache": 0.0}) if engine and layout.engine_sleeps else (engine, engine)
    phases = {
        "generate": (generating, engine),
        "swap": (idle | {"activations": SWAPPED_BYTES if workload.swaps else 0.0}, asleep),
        "score": (idle | {"activations": scored[0], "loss and logits": scored[1]}, asleep),
        "train": (idle | {"activations": held, "loss and logits": head}, asleep),
        "publish": (idle | {"publish": publish_bytes(arch, layout)}, woken),
        "save": (idle | {"checkpoint": saving_bytes(arch, layout)}, woken),
        "load": (idle | {"checkpoint": loading_bytes(arch, layout, stage)}, {}),  # before the engine starts
    }
    return {name: _with_overheads(ours, theirs, machine) for name, (ours, theirs) in phases.items()}


def _with_overheads(ours: dict[str, float], engine: dict[str, float], machine: Machine) -> dict[str, float]:
    """Add fragmentation and reserved memory. Only the trainer's memory fragments: the engine's share is fixed."""
    return ours | {"fragmentation": machine.fragmentation * sum(ours.values()), "reserved": machine.reserved} | engine


def engine_activations(arch: Architecture, layout: Layout, batch_tokens: int = 8192) -> float:
    """An estimate of vLLM's working memory: the widest layer of a prefill batch, the logits of its sequences (as in
    vLLM's profile run), and captured CUDA graphs."""
    width = max(arch.ffn, arch.experts_per_token * arch.expert_ffn)
    step = batch_tokens * (4 * arch.hidden + 3 * width / layout.engine_tensor) * layout.dtype_bytes
    return step + 256 * arch.vocab * 4 * 2 + 1.0 * 2**30


def cache_problem(arch: Architecture, layout: Layout, workload: Workload, cache: float) -> list[str]:
    """The reason why the KV cache is too small, as a list of at most one line."""
    longest = workload.prompt_max + workload.response_max
    if cache < longest * kv_bytes_a_token(arch, layout):
        return [
            f"engine TP{layout.engine_tensor}: {max(0.0, cache) / 2**30:.1f} GiB are left for the KV cache, one "
            f"response of {longest} tokens needs {longest * kv_bytes_a_token(arch, layout) / 2**30:.1f}"
        ]
    return []


def engine_memory(arch: Architecture, layout: Layout, workload: Workload, machine: Machine) -> MemoryPlan:
    """Memory of a GPU that only generates."""
    budget = layout.server_memory * machine.memory
    weights, working = engine_weights(arch, layout), engine_activations(arch, layout)
    cache = budget - weights - working
    lines = {"weights": weights, "engine work": working, "KV cache": max(0.0, cache)}
    lines["publish"] = float(max(layout.bucket_bytes, arch.vocab * arch.hidden * layout.dtype_bytes))
    return MemoryPlan(lines, machine.usable, max(0.0, cache), cache_problem(arch, layout, workload, cache))
