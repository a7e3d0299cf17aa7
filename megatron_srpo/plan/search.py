"""Tries all layouts of a model on a number of GPUs: which fit, how fast they are, and why the others do not fit."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_srpo.config import LoraConfig
from megatron_srpo.plan.activations import LOGITS_MIB
from megatron_srpo.plan.architecture import Architecture
from megatron_srpo.plan.duration import TimePlan, iteration_time, rows_of, student_pass
from megatron_srpo.plan.hardware import Machine
from megatron_srpo.plan.layout import Layout, impossible
from megatron_srpo.plan.memory import MemoryPlan, engine_memory, training_memory
from megatron_srpo.plan.workload import Workload

POWERS = (1, 2, 4, 8, 16, 32, 64, 128)
ENGINE_SHARES = (0.3, 0.5, 0.7, 0.85)  # shares of a GPU's memory that a colocated engine may get
TURNS = ((False, False), (True, False), (True, True))  # (engine sleeps, trainer is offloaded) while the other works
ABOUT_AS_FAST = 1.03  # predictions do not tell layouts apart whose times differ by less
SPLITS = (4, 2)  # with engines on GPUs of their own, a quarter or half of the GPUs generate


@dataclass(frozen=True)
class Candidate:
    """A layout with its memory, and with its time if it fits."""

    layout: Layout
    memory: MemoryPlan  # of a training GPU
    engine: MemoryPlan | None  # of a GPU that only generates
    time: TimePlan | None
    peak_flops: float  # of one GPU

    @property
    def predicted(self) -> TimePlan:
        """The time of a layout that fits."""
        assert self.time is not None
        return self.time

    @property
    def step_seconds(self) -> float:
        """Seconds of one iteration."""
        return self.predicted.total

    @property
    def mfu(self) -> float:
        """Useful FLOPs of training and scoring, divided by the peak of all GPUs during the whole iteration."""
        return self.predicted.flops / (self.step_seconds * self.layout.gpus * self.peak_flops)

    @property
    def train_mfu(self) -> float:
        """Useful FLOPs of the train step, divided by the peak of the training GPUs during that step."""
        time = self.predicted
        return time.train_flops / (time.lines["train"] * self.layout.training_gpus * self.peak_flops)

    @property
    def tokens_per_second(self) -> float:
        return self.predicted.tokens / self.step_seconds

    @property
    def sync_share(self) -> float:
        """Share of the iteration in which weights or gradients are sent, or rank 0 works alone."""
        lines = self.predicted.lines
        return (lines["publish"] + lines["driver"] + self.predicted.communication) / self.step_seconds

    def gpu_hours(self, iterations: int) -> float:
        return iterations * self.step_seconds * self.layout.gpus / 3600


@dataclass(frozen=True)
class Found:
    """The result of a search.

    `misfits` has, for each way to split the model that never fits, the layout that comes nearest. `impossible` counts
    the layouts that Megatron or the model excludes, by reason.
    """

    best: list[Candidate]
    misfits: list[Candidate]
    impossible: Counter[str]
    tried: int


def evaluate(
    arch: Architecture, layout: Layout, machine: Machine, workload: Workload, *, path: str = "te",
    logits_mib: int = LOGITS_MIB,
) -> Candidate:  # fmt: skip
    """Predict the memory of one layout, and its time if it fits."""
    rows = rows_of(workload, layout, student_pass(workload, layout, path=path).tokens)
    memory = training_memory(arch, layout, workload, machine, rows=rows, path=path, logits_mib=logits_mib)
    engine = None if layout.colocated else engine_memory(arch, layout, workload, machine)
    fits = memory.fits and (engine is None or engine.fits)
    cache = memory.kv_cache if engine is None else engine.kv_cache
    time = None
    if fits:
        time = iteration_time(arch, layout, machine, workload, cache, path=path, logits_mib=logits_mib)
    return Candidate(layout, memory, engine, time, machine.flops)


def search(
    arch: Architecture, gpus: int, machine: Machine, workload: Workload, *, show: int = 5, dtype_bytes: int = 2,
    path: str = "te", lora: LoraConfig | None = None,
) -> Found:  # fmt: skip
    """Search all layouts. The best ones come first, at most `show`, one for each way to split the model. With `lora`
    only its adapters are trained."""
    excluded: Counter[str] = Counter()
    fitting: dict[tuple, Candidate] = {}
    missing: dict[tuple, tuple[float, list[Layout]]] = {}
    tried = 0
    for variants in layouts(arch, gpus, machine, workload, dtype_bytes, lora):
        first, last = variants[0], variants[-1]
        problem = next(impossible(first, arch), None)
        if problem is not None:
            tried += 1
            excluded[problem] += 1
            continue
        cut = (first.tensor, first.pipeline, first.context, first.expert)
        smallest = evaluate(arch, last, machine, workload, path=path)
        if smallest.time is None:  # then none of them fits
            tried += len(variants)
            if cut not in missing or overshoot(smallest) < missing[cut][0]:
                missing[cut] = overshoot(smallest), variants
            continue
        for layout in variants:  # the fastest first: take the first that fits
            tried += 1
            candidate = smallest if layout is last else evaluate(arch, layout, machine, workload, path=path)
            if candidate.time is not None:
                if cut not in fitting or candidate.step_seconds < fitting[cut].step_seconds:
                    fitting[cut] = candidate
                break
    best = _simplest_first(sorted(fitting.values(), key=lambda c: c.step_seconds))[:show]
    nearest = [
        min((evaluate(arch, layout, machine, workload, path=path) for layout in variants), key=overshoot)
        for cut, (_, variants) in missing.items()
        if cut not in fitting
    ]
    misfits = sorted(nearest, key=overshoot)
    return Found(best, misfits, excluded, tried)


def _simplest_first(candidates: list[Candidate]) -> list[Candidate]:
    """The simplest of those that are about as fast as the fastest, then the others, which are sorted by time."""
    if not candidates:
        return []
    near = [one for one in candidates if one.step_seconds <= ABOUT_AS_FAST * candidates[0].step_seconds]
    first = min(near, key=lambda one: (complexity(one.layout), one.step_seconds))
    return [first, *(one for one in candidates if one is not first)]


def complexity(layout: Layout) -> int:
    """How many mechanisms a layout uses: each of them can go wrong, and has to be understood."""
    sizes = (layout.tensor, layout.pipeline, layout.virtual, layout.context, layout.expert)
    switches = (
        layout.recompute != "none", layout.engine_sleeps, layout.trainer_leaves, layout.shadow_on_host,
        layout.optimizer_on_host, not layout.colocated, layout.engine_tensor > 1,
    )  # fmt: skip
    return sum(size > 1 for size in sizes) + sum(switches)


def fewest_gpus(
    arch: Architecture, gpus: int, machine: Machine, workload: Workload, lora: LoraConfig | None = None
) -> Candidate | None:
    """The layout on the smallest number of GPUs, gpus · 2, 4, … 64, on which something fits."""
    for factor in (2, 4, 8, 16, 32, 64):
        found = search(arch, gpus * factor, machine, workload, show=1, lora=lora)
        if found.best:
            return found.best[0]
    return None


def overshoot(candidate: Candidate) -> float:
    """Bytes by which the fullest GPU exceeds its memory."""
    plans = [candidate.memory, *([candidate.engine] if candidate.engine else [])]
    return max(plan.total - plan.limit for plan in plans) + (1e12 if any(plan.notes for plan in plans) else 0)


def layouts(
    arch: Architecture, gpus: int, machine: Machine, workload: Workload, dtype_bytes: int,
    lora: LoraConfig | None = None,
) -> Iterator[list[Layout]]:  # fmt: skip
    """Every layout to try, in lists whose members differ only in what is recomputed or offloaded: the last one does all
    of it, and needs the least memory. Tensor parallelism stays inside a node, and a pipeline stage has at most four
    pieces."""
    for training, engine_gpus in [(gpus, 0), *((gpus - gpus // part, gpus // part) for part in SPLITS)]:
        if training < 1 or (engine_gpus == 0 and training != gpus):
            continue
        for cut in _cuts(arch, training, machine):
            tensor, pipeline, virtual, context, expert = cut
            row = math.ceil(workload.longest_row / (2 * context * tensor)) * 2 * tensor
            base = Layout(
                gpus, tensor, pipeline, virtual, context, expert, max_tokens=row, engine_gpus=engine_gpus,
                dtype_bytes=dtype_bytes,
            )  # fmt: skip
            if lora is not None:
                base = dataclasses.replace(
                    base, lora_rank=lora.rank, lora_projections=lora.projections, lora_experts=lora.experts
                )
            base = dataclasses.replace(base, overlap_grad_reduce=base.sharding > 1)
            yield from _variants(base, machine)


def _cuts(arch: Architecture, training: int, machine: Machine) -> Iterator[tuple[int, int, int, int, int]]:
    most = min(training, arch.layers, 32)
    stages = [size for size in range(1, most + 1) if arch.layers % size == 0 or size in POWERS]
    experts = [size for size in POWERS if arch.experts and arch.experts % size == 0] or [1]
    for tensor in POWERS:
        if tensor > machine.node or arch.groups % tensor:
            continue
        for pipeline in stages:
            for context in (1, 2, 4, 8):
                if training % (tensor * pipeline * context):
                    continue
                pieces = [v for v in (1, 2, 4) if v == 1 or (pipeline > 1 and pipeline * v <= arch.layers)]
                for expert in experts:
                    if training % (expert * pipeline):
                        continue
                    yield from ((tensor, pipeline, virtual, context, expert) for virtual in pieces)


def _variants(base: Layout, machine: Machine) -> Iterator[list[Layout]]:
    """For each size of an engine and each share of memory: the ways to recompute and to offload, the fastest first."""
    shares = ENGINE_SHARES if base.colocated else (0.0,)
    for engine in POWERS[:5]:
        if engine > max(machine.node, 16) or (base.engine_gpus or base.gpus) % engine:
            continue
        for share in shares:
            for sleeps, leaves in TURNS if base.colocated else TURNS[:1]:
                yield [
                    dataclasses.replace(
                        base, recompute=recompute, shadow_on_host=shadow, optimizer_on_host=optimizer,
                        engine_tensor=engine, engine_memory=share, engine_sleeps=sleeps, trainer_leaves=leaves,
                    )
                    for optimizer in (False, True)
                    for recompute in ("none", "selective", "full")
                    for shadow in ((True,) if optimizer else (False, True))
                ]  # fmt: skip
