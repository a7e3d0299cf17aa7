"""All layouts of a model on so many GPUs: which fit, how long their iterations take, and why the others do not."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_srpo.plan.architecture import Architecture
from megatron_srpo.plan.duration import TimePlan, iteration_time, rows_of
from megatron_srpo.plan.hardware import Machine
from megatron_srpo.plan.layout import Layout, impossible
from megatron_srpo.plan.memory import MemoryPlan, engine_memory, training_memory
from megatron_srpo.plan.workload import Workload

POWERS = (1, 2, 4, 8, 16, 32, 64, 128)
ENGINE_SHARES = (0.3, 0.5, 0.7, 0.85)  # of a GPU, for a colocated engine
TURNS = ((False, False), (True, False), (True, True))  # who gives up a GPU's memory: the engine, the trainer
SPLITS = (4, 2)  # a quarter or half of the GPUs generate


@dataclass(frozen=True)
class Candidate:
    """A layout with its memory, and its time where it fits."""

    layout: Layout
    memory: MemoryPlan  # a training GPU's
    engine: MemoryPlan | None  # of a GPU that only generates
    time: TimePlan | None
    peak_flops: float  # of one GPU

    @property
    def step_seconds(self) -> float:
        assert self.time is not None
        return self.time.total

    @property
    def mfu(self) -> float:
        """Useful FLOPs of training and scoring ÷ peak of all GPUs during the whole iteration."""
        return self.time.flops / (self.time.total * self.layout.gpus * self.peak_flops)

    @property
    def train_mfu(self) -> float:
        """The same of the train step alone, on the GPUs that train."""
        return self.time.train_flops / (self.time.lines["train"] * self.layout.training_gpus * self.peak_flops)

    @property
    def tokens_per_second(self) -> float:
        return self.time.tokens / self.time.total

    @property
    def sync_share(self) -> float:
        """Share of the iteration in which weights or gradients travel, or the driver works alone."""
        lines = self.time.lines
        return (lines["publish"] + lines["driver"] + self.time.communication) / self.time.total

    def gpu_hours(self, iterations: int) -> float:
        return iterations * self.time.total * self.layout.gpus / 3600


@dataclass(frozen=True)
class Found:
    """What a search saw. `misfits`: the nearest miss of each way to cut the model that never fits."""

    best: list[Candidate]
    misfits: list[Candidate]
    impossible: Counter[str]
    tried: int


def evaluate(
    arch: Architecture, layout: Layout, machine: Machine, workload: Workload, *, path: str = "te"
) -> Candidate:
    """Memory of one layout, and its time if it fits."""
    rows = rows_of(workload, layout, workload.student_tokens)
    memory = training_memory(arch, layout, workload, machine, rows=rows, path=path)
    engine = None if layout.colocated else engine_memory(arch, layout, workload, machine)
    fits = memory.fits and (engine is None or engine.fits)
    cache = memory.kv_cache if engine is None else engine.kv_cache
    time = iteration_time(arch, layout, machine, workload, cache, path=path) if fits else None
    return Candidate(layout, memory, engine, time, machine.flops)


def search(
    arch: Architecture, gpus: int, machine: Machine, workload: Workload, *, show: int = 5, dtype_bytes: int = 2,
    path: str = "te",
) -> Found:  # fmt: skip
    """The quickest layouts first, one for each way to cut the model."""
    nots: Counter[str] = Counter()
    fitting: dict[tuple, Candidate] = {}
    missing: dict[tuple, Candidate] = {}
    tried = 0
    for variants in layouts(arch, gpus, machine, workload, dtype_bytes):
        for layout in variants:  # ever less memory, ever more time: the first that fits is the best of them
            tried += 1
            problem = next(impossible(layout, arch), None)
            if problem is not None:
                nots[problem] += 1
                break
            candidate = evaluate(arch, layout, machine, workload, path=path)
            cut = (layout.tensor, layout.pipeline, layout.context, layout.expert)
            if candidate.time is None:
                known = missing.get(cut)
                if known is None or overshoot(candidate) < overshoot(known):
                    missing[cut] = candidate
                continue
            if cut not in fitting or candidate.step_seconds < fitting[cut].step_seconds:
                fitting[cut] = candidate
            break
    best = sorted(fitting.values(), key=lambda c: c.step_seconds)[:show]
    misfits = sorted((c for cut, c in missing.items() if cut not in fitting), key=overshoot)
    return Found(best, misfits, nots, tried)


def overshoot(candidate: Candidate) -> float:
    """Bytes above the limit of the GPU that is fullest."""
    plans = [candidate.memory, *([candidate.engine] if candidate.engine else [])]
    return max(plan.total - plan.limit for plan in plans) + (1e12 if any(plan.notes for plan in plans) else 0)


def layouts(
    arch: Architecture, gpus: int, machine: Machine, workload: Workload, dtype_bytes: int
) -> Iterator[list[Layout]]:
    """Every layout worth a look, those that differ only in what is recomputed or offloaded together: tensor parallelism
    inside a node, pieces of a stage up to four."""
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
    """For each size of an engine and its share of memory: recompute and offload, the quickest first."""
    shares = ENGINE_SHARES if base.colocated else (0.0,)
    for engine in POWERS[:4]:
        if engine > machine.node or (base.engine_gpus or base.gpus) % engine:
            continue
        for share in shares:
            for sleeps, leaves in TURNS if base.colocated else TURNS[:1]:
                given = {"engine_tensor": engine, "engine_memory": share, "engine_sleeps": sleeps}
                given["trainer_leaves"] = leaves
                yield [
                    dataclasses.replace(base, recompute=recompute, shadow_on_host=host, **given)
                    for recompute in ("none", "selective", "full")
                    for host in (False, True)
                ]
