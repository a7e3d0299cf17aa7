"""Time of one iteration, line by line, from FLOPs, bytes and a machine's rates.

    products     2 · parameters · tokens for a forward pass; the backward pass takes twice as much (Narayanan et al.
                 2021, §5.1), and a full recompute takes one more forward pass
    attention    2 · queries · context for each token and layer, for both products of causal attention
    elementwise  each saved activation is written once and read once, and its gradient is moved as well
    collectives  bounds of a ring: (n − 1)/n of the bytes for a gather or a scatter, twice that for a reduction
    pipeline     (rows + (stages − 1)/pieces) times the slowest stage (Narayanan et al. 2021, §2.2)
    generation   each step reads the weights, and the keys and values of all running sequences (Pope et al. 2022);
                 waiting sequences fill the engine's free slots

Gradient reduction and parameter gathering do not overlap with computation (docs/design-notes.md, "The LM head belongs
to the objective"), so their times are added.
"""

from __future__ import annotations

import functools
import heapq
import math
from dataclasses import dataclass

from megatron_srpo.plan.activations import LOGITS_MIB, layer_bytes
from megatron_srpo.plan.architecture import Architecture
from megatron_srpo.plan.hardware import Machine
from megatron_srpo.plan.layout import Layout, stage_layers
from megatron_srpo.plan.memory import (
    engine_weights,
    kv_bytes_a_token,
    leaving_bytes,
    state_bytes,
    train_pass_finds_topk,
)
from megatron_srpo.plan.parameters import published_adapters, trained_parameters
from megatron_srpo.plan.sharing import prompt_copies, question_copies
from megatron_srpo.plan.workload import QUANTILES, Workload

# Rank 0's own work, measured by benchmarks/driver.py on one core: seconds for a rollout (routing, planning), for a
# token (pickling), and for the teacher prompts of one question of 280 tokens; other ranks tokenize demonstrations.
DRIVER_ROLLOUT, DRIVER_TOKEN, DRIVER_TEACHER = 6e-5, 4e-9, 1.2e-3
DRIVER_EXPERT_BYTE = 2e-10  # seconds for a byte of the tokens' experts (rollout.routing_replay), measured alike
HOST_LINK = 25e9  # bytes/s between a GPU and its host's memory
GATHER_RATE = 1e9  # bytes/s at which rank 0 receives token ids, log-probs and text, over gloo on Ethernet


@dataclass(frozen=True)
class Pass:
    """One kind of pass of packed rows through the model."""

    tokens: float  # on all data-parallel ranks, without padding
    context: float  # Workload.mean_context
    backward: bool = False


@dataclass(frozen=True)
class TimePlan:
    """Predicted seconds of one iteration. `lines` add up to `total`. `flops` do not include recomputation."""

    lines: dict[str, float]
    flops: float
    train_flops: float
    tokens: float
    rows: int  # packed rows of a data-parallel rank in one optimizer step
    communication: float  # seconds of collectives inside the train step; none of them overlap with computation

    @property
    def total(self) -> float:
        return sum(self.lines.values())


def forward_flops(arch: Architecture, context: float) -> float:
    """FLOPs of one token's forward pass through the layers and the head."""
    layer = 2 * arch.active_matrices + 2 * arch.query * context
    return arch.layers * layer + 2 * arch.vocab * arch.hidden


def student_pass(
    workload: Workload, layout: Layout, *, path: str = "te", share: float = 1.0, backward: bool = False
) -> Pass:
    """A pass over this share of the samples, in which samples share prompts."""
    copies = prompt_copies(workload, layout, path=path, share=share)
    return Pass(workload.shared_tokens(copies, share), workload.shared_context(copies / share), backward)


def teacher_pass(workload: Workload, layout: Layout, *, path: str = "te") -> Pass:
    """The teacher's pass over the distilled samples, which share their question and equal demonstrations."""
    if not workload.taught:
        return Pass(0.0, 0.0)
    copies = question_copies(workload, layout, path=path)
    return Pass(workload.teacher_tokens(copies), workload.teacher_context(copies))


def rows_of(workload: Workload, layout: Layout, tokens: float) -> int:
    """Packed rows of a data-parallel rank in one optimizer step."""
    useful = layout.max_tokens * layout.context * workload.packing
    return max(1, math.ceil(tokens * (1 + workload.imbalance) / layout.data / workload.steps / useful))


def layer_seconds(arch: Architecture, layout: Layout, machine: Machine, context: float, *, path: str) -> float:
    """Seconds of one layer's forward pass of a full row on one rank, without collectives."""
    tokens, t = layout.max_tokens, layout.tensor
    experts = layout.expert_tensor if arch.experts else 1
    ordinary = (arch.attention_matrices + arch.mlp_matrices) / t
    routed = arch.experts_per_token * arch.expert_matrices / experts / (t if layout.sequence_parallel else 1)
    products = 2 * tokens * (ordinary + routed) / machine.product_rate
    attention = 2 * tokens * arch.query / t * context / machine.attention_rate
    elementwise = 2 * tokens * layer_bytes(arch, layout, path=path).whole / machine.memory_rate
    return machine.layer_overhead + products + attention + elementwise


def layer_collectives(arch: Architecture, layout: Layout, machine: Machine, *, backward: bool) -> float:
    """Seconds of communication in one layer's forward or backward pass of a full row on one rank."""
    w, tokens, t = layout.dtype_bytes, layout.max_tokens, layout.tensor
    seconds = 0.0
    if t > 1:  # gather and scatter around attention and MLP, or a reduction, which takes as long as both
        # With sequence parallelism the backward pass gathers inputs again.
        count = 6 if backward and layout.sequence_parallel else 4
        rate = machine.link_rate(t)
        seconds += count * (machine.latency + (t - 1) / t * w * arch.hidden * tokens / rate)
    if layout.context > 1:
        ranks = t * layout.context
        moved = (layout.context - 1) * tokens * 2 * arch.key / t * w
        seconds += (2 if backward else 1) * (machine.latency + moved / machine.link_rate(ranks))
    if layout.expert > 1:  # dispatch and combine
        share = (layout.expert - 1) / layout.expert
        moved = share * tokens / t * arch.experts_per_token * arch.hidden * w
        seconds += 2 * (machine.latency * layout.expert**0.5 + moved / machine.link_rate(layout.expert * t))
    return seconds


def pass_seconds(
    arch: Architecture, layout: Layout, machine: Machine, workload: Workload, work: Pass, *, path: str,
    logits_mib: int = LOGITS_MIB,
) -> tuple[float, float, int]:  # fmt: skip
    """(seconds, seconds of communication among them, rows) of a pass over the rows of one optimizer step."""
    rows = rows_of(workload, layout, work.tokens)
    layers = max(stage_layers(arch.layers, layout))
    forward = layer_seconds(arch, layout, machine, work.context, path=path)
    talk = layer_collectives(arch, layout, machine, backward=False)
    w, tokens = layout.dtype_bytes, layout.max_tokens
    head = 2 * tokens * arch.hidden * arch.vocab / layout.tensor / machine.product_rate
    if layout.tensor > 1:
        head += w * arch.hidden * tokens / machine.link_rate(layout.tensor)
    handover = 0.0
    if layout.pipeline > 1:
        split = layout.tensor if layout.sequence_parallel else 1
        handover = layout.virtual * w * arch.hidden * tokens / split / machine.link_rate(layout.copy)
    if work.backward:
        again = {"none": 0.0, "full": 1.0, "selective": 0.4}[layout.recompute]
        if layout.recompute_layers:
            again *= min(1.0, layout.recompute_layers * layout.virtual / layers)
        talk = talk * (1 + again) + layer_collectives(arch, layout, machine, backward=True)
        own = 2 if layout.lora_rank else 3  # frozen weights have no gradient to compute
        forward *= own + again
        pieces = w * math.ceil(arch.vocab / layout.tensor) * tokens > logits_mib * 2**20
        head *= own + pieces
        handover *= 2
    slots = rows + (layout.pipeline - 1) / layout.virtual
    inside = slots * layers * talk + slots * handover
    return slots * (layers * forward + head) + inside, inside, rows


def optimizer_seconds(arch: Architecture, layout: Layout, machine: Machine) -> tuple[float, float, float]:
    """Seconds of one optimizer step: (reduce-scatter of fp32 gradients, gather of parameters, Adam)."""
    part = trained_parameters(arch, layout, layout.pipeline - 1)
    scatter = gather = 0.0
    for count, ranks in ((part.ordinary, layout.sharding), (part.experts, layout.expert_sharding)):
        if ranks > 1 and count:
            spread = machine.link_rate(ranks * (layout.tensor if count == part.ordinary else 1))
            share, wait = (ranks - 1) / ranks * count / spread, machine.latency * ranks**0.5
            scatter += 4 * share + wait
            gather += layout.dtype_bytes * share + wait
    shard = part.ordinary / layout.sharding + part.experts / layout.expert_sharding
    moved = 2 * state_bytes(layout) * shard / HOST_LINK if layout.optimizer_on_host else 0.0  # to the device and back
    return scatter, gather, (4 * part.whole + 34 * shard) / machine.memory_rate + moved


def swap_seconds(arch: Architecture, layout: Layout, machine: Machine) -> float:
    """Seconds of swapping a shadow in and out again (mcore/shadow.py): slices are written and parameters gathered,
    both twice."""
    part = trained_parameters(arch, layout, layout.pipeline - 1)
    shard = part.ordinary / layout.sharding + part.experts / layout.expert_sharding
    _, gather, _ = optimizer_seconds(arch, layout, machine)
    # bf16 models read fp32 and write bf16; fp32 models exchange both. A slice in host memory comes over the host link.
    written = (6 if layout.dtype_bytes == 2 else 24) * shard / machine.memory_rate
    fetched = 4 * shard / HOST_LINK if layout.shadow_on_host else 0.0
    if layout.optimizer_on_host:  # the student is restored from its main parameters
        fetched += 2 * 4 * shard / HOST_LINK
    return fetched + 2 * (written + gather)


def publish_seconds(arch: Architecture, layout: Layout, machine: Machine) -> float:
    """Seconds of a publish: broadcast over stages and gather over tensor-parallel (and expert-parallel) ranks, bucket
    after bucket, then copies into the engine. Every training rank receives all that is published: the whole model, or
    LoRA adapters alone."""
    adapters, adapter_tensors = published_adapters(arch, layout)
    whole, t = layout.dtype_bytes * (adapters or arch.parameters), layout.tensor
    experts = 0 if adapters else layout.dtype_bytes * arch.layers * arch.experts * arch.expert_matrices
    ordinary, split = whole - experts, layout.expert * layout.expert_tensor
    seconds = 0.0
    for size, ranks in ((ordinary, t), (experts, split)):
        if layout.pipeline > 1:
            seconds += size / ranks / machine.link_rate(layout.copy * (layout.expert if size is experts else 1))
        if ranks > 1:
            seconds += size * (ranks - 1) / ranks / machine.link_rate(ranks)
    if not layout.colocated:  # each training rank sends one copy to each of its servers (weight_stream.sender_of)
        servers = layout.engine_gpus // layout.engine_tensor
        seconds += -(-servers // layout.training_gpus) * whole / machine.link_rate(layout.gpus)
    tensors = adapter_tensors or arch.layers * (9 + 3 * arch.experts)
    loaded = whole if adapters else engine_weights(arch, layout)
    return seconds + 2 * loaded / machine.memory_rate + tensors * 2 * machine.latency


@functools.lru_cache(4096)
def generate_seconds(
    arch: Architecture, machine: Machine, workload: Workload, engines: int, tensor: int, itemsize: int, cache: float
) -> float:
    """Seconds that one of `engines` engines needs for its share of the iteration, on `tensor` ranks with `cache` bytes
    of KV cache each. Each prompt is prefilled once, because its samples share the prefix; then all are decoded."""
    layout = Layout(gpus=tensor, engine_tensor=tensor, dtype_bytes=itemsize)
    mine = workload.rollouts / engines
    lengths = workload.response_lengths()
    count = max(1, min(QUANTILES, round(mine)))  # the number of lengths that represent the sequences
    responses = [lengths[QUANTILES - 1 - (QUANTILES - 1) * i // max(1, count - 1)] for i in range(count)]
    each = kv_bytes_a_token(arch, layout)
    longest = workload.prompt_mean + sum(responses) / count
    slots = max(1.0, min(workload.engine_sequences, cache / each / longest))
    prompts = max(1.0, mine / workload.samples) * workload.prompt_mean
    prefill = prompts * forward_flops(arch, workload.prompt_mean) / layout.engine_tensor / machine.product_rate
    return prefill + _decode(arch, layout, machine, workload, responses, max(1.0, mine / count), slots)


def _decode(
    arch: Architecture, layout: Layout, machine: Machine, workload: Workload, responses: list[int], weight: float,
    slots: float,
) -> float:  # fmt: skip
    """Seconds of continuous batching: finished sequences make room for waiting ones, whose order does not depend on
    their lengths. Each length represents `weight` sequences."""
    each = kv_bytes_a_token(arch, layout)
    stride = next(step for step in (37, 31, 29, 23, 1) if math.gcd(step, len(responses)) == 1)
    waiting = [responses[i * stride % len(responses)] for i in range(len(responses))]
    running: list[tuple[int, int]] = []  # (step at which it ends, step at which it began)
    step, seconds = 0, 0.0
    while waiting or running:
        while waiting and (not running or (len(running) + 1) * weight <= slots):
            heapq.heappush(running, (step + waiting.pop(), step))
        end = running[0][0]
        active = max(1.0, min(slots, len(running) * weight))
        context = workload.prompt_mean + sum(step - began for _, began in running) / len(running) + (end - step) / 2
        seconds += (end - step) * step_seconds(arch, layout, machine, active, context, each)
        step = end
        heapq.heappop(running)
    return seconds


def step_seconds(
    arch: Architecture, layout: Layout, machine: Machine, active: float, context: float, each: float
) -> float:
    """Seconds of a decoding step of `active` sequences with `context` tokens. `each`: bytes of the cache per token."""
    touched = engine_weights(arch, layout)
    if arch.experts:  # only experts that get at least one token are read
        share = 1 - (1 - arch.experts_per_token / arch.experts) ** active
        experts = layout.dtype_bytes * arch.layers * arch.experts * arch.expert_matrices / layout.engine_tensor
        touched -= (1 - share) * experts
    reading = (touched + active * context * each) / machine.memory_rate
    computing = active * forward_flops(arch, context) / layout.engine_tensor / machine.product_rate
    talking = 0.0
    if layout.engine_tensor > 1:
        moved = 2 * active * arch.hidden * layout.dtype_bytes / machine.link_rate(layout.engine_tensor)
        talking = 2 * arch.layers * (machine.latency / 2 + moved)
    return max(reading, computing) + talking + machine.decode_overhead


def driver_seconds(arch: Architecture, workload: Workload) -> float:
    """Seconds in which rank 0 works alone: it gathers, routes, plans and distributes rollouts, with the experts of
    their tokens if there are any."""
    tokens, experts = workload.student_tokens, arch.expert_bytes
    gathered = tokens * (12 + experts) / GATHER_RATE  # ids, log-probs, text and experts
    seconds = workload.rollouts * DRIVER_ROLLOUT + tokens * (DRIVER_TOKEN + experts * DRIVER_EXPERT_BYTE) + gathered
    return seconds + (workload.prompts * DRIVER_TEACHER if workload.distilled else 0.0)


def offload_seconds(arch: Architecture, layout: Layout, *, shadows: int = 1) -> float:
    """Seconds of moving the trainer's memory to the host and back. Gradients are not moved."""
    if not layout.trainer_leaves:
        return 0.0
    stages = {0, layout.pipeline - 1}
    return max(2 * leaving_bytes(arch, layout, stage, shadows=shadows) / HOST_LINK for stage in stages)


def iteration_time(
    arch: Architecture, layout: Layout, machine: Machine, workload: Workload, cache: float, *, path: str = "te",
    logits_mib: int = LOGITS_MIB,
) -> TimePlan:  # fmt: skip
    """The times of all parts of one iteration, which trainer.py runs one after the other."""
    students = student_pass(workload, layout, path=path, backward=True)
    # In the first step the train pass finds the student's top-k ids, if the copy of the teacher's head fits; in the
    # others the pass for old log-probs does, unless every step has scores of its own.
    own = 1.0 if workload.scores_each_step else 1 / workload.steps
    passes = 0.0 if train_pass_finds_topk(arch, layout, workload) else own * (workload.topk > 0)
    scored = student_pass(workload, layout, path=path, share=workload.distilled or 1.0)
    taught, teachers = teacher_pass(workload, layout, path=path), workload.teacher_passes
    seconds_of = functools.partial(
        pass_seconds, arch, layout, machine, workload, path=path, logits_mib=logits_mib
    )  # fmt: skip
    train, talk, rows = seconds_of(students)
    scatter, gather, adam = optimizer_seconds(arch, layout, machine)
    if layout.overlap_grad_reduce:  # it overlaps with the backward pass of the last row
        scatter = max(0.0, scatter - 2 / 3 * train / rows)
    reduce = scatter + gather
    lines = {
        "generate": generate_seconds(
            arch, machine, workload, layout.engines, layout.engine_tensor, layout.dtype_bytes, cache
        ),
        "driver": driver_seconds(arch, workload),
        "score": 0.0,
        "teacher": workload.swaps * swap_seconds(arch, layout, machine),
        "train": workload.steps * (train + reduce + adam),
        "publish": publish_seconds(arch, layout, machine),
        "offload": offload_seconds(arch, layout, shadows=workload.shadows),
    }
    if workload.distilled > 0:
        lines["score"] = passes * workload.steps * seconds_of(scored)[0]
        lines["teacher"] += teachers * workload.steps * seconds_of(taught)[0]
    every = student_pass(workload, layout, path=path)
    if workload.steps > 1:  # old log-probs for every mini-batch but the first
        lines["score"] += (workload.steps - 1) * seconds_of(every)[0]
    if workload.reference:
        lines["teacher"] += workload.steps * seconds_of(every)[0]
    train_flops = (2 if layout.lora_rank else 3) * students.tokens * forward_flops(arch, students.context)
    scoring = passes * scored.tokens * forward_flops(arch, scored.context) if workload.distilled > 0 else 0.0
    scoring += teachers * taught.tokens * forward_flops(arch, taught.context)
    scoring += (1 - 1 / workload.steps) * every.tokens * forward_flops(arch, every.context)
    if workload.reference:
        scoring += every.tokens * forward_flops(arch, every.context)
    return TimePlan(
        lines, train_flops + scoring, train_flops, workload.student_tokens, rows, workload.steps * (talk + reduce)
    )
