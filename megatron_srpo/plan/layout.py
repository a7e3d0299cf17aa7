"""Describes how a model and its engines are split over GPUs, and says why a layout is impossible."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from megatron_srpo.config import BUCKET_MIB, LoraConfig
from megatron_srpo.plan.architecture import Architecture

LORA_DEFAULT = LoraConfig()


@dataclass(frozen=True)
class Layout:
    """One way to use the GPUs. Sizes count ranks; there are tensor · pipeline · context · data training ranks.

    Example: Layout(gpus=64, tensor=4, pipeline=2, recompute="full", engine_tensor=1)
    """

    gpus: int  # all GPUs, with those that only generate
    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1  # pieces of a pipeline stage
    context: int = 1
    expert: int = 1  # ranks that share a layer's experts
    expert_tensor: int = 1
    recompute: str = "none"  # none, selective (the MLP), full
    recompute_layers: int = 0  # how many layers of each stage's piece are recomputed; 0 means all
    max_tokens: int = 18432  # tokens of a packed row on one rank
    engine_tensor: int = 1  # tensor-parallel ranks of an engine
    engine_gpus: int = 0  # GPUs that only generate; 0 means that engines share the GPUs of the training ranks
    engine_memory: float = 0.5  # share of a GPU's memory for a colocated engine
    server_memory: float = 0.9  # and for an engine on GPUs of its own
    engine_sleeps: bool = False  # the engine frees its memory during training
    trainer_leaves: bool = False  # the trainer frees its memory while the engine generates
    shadow_on_host: bool = False  # the teacher's average is kept in host memory
    optimizer_on_host: bool = False  # moments and fp32 main parameters are kept in host memory
    overlap_grad_reduce: bool = False  # gradients are reduced during the last backward pass
    dtype_bytes: int = 2  # of weights and activations
    lora_rank: int = 0  # of LoRA adapters; 0 means that all weights are trained
    lora_projections: tuple[str, ...] = LORA_DEFAULT.projections  # that have adapters, without those of experts
    lora_experts: bool = False  # experts have adapters
    lora_merged: bool | None = None  # publishes bring whole models (lora.publish); None: those of models with experts
    bucket_mib: int = BUCKET_MIB["cuda"]  # size of a gather bucket of a publish
    sequence_split: bool = True  # tensor-parallel ranks split norms and residuals too, if there are several

    @property
    def training_gpus(self) -> int:
        return self.gpus - self.engine_gpus

    @property
    def copy(self) -> int:
        """Ranks of one copy of the model."""
        return self.tensor * self.pipeline * self.context

    @property
    def data(self) -> int:
        return self.training_gpus // self.copy

    @property
    def sequence_parallel(self) -> bool:
        return self.tensor > 1 and self.sequence_split

    @property
    def bucket_bytes(self) -> int:
        return self.bucket_mib * 2**20

    @property
    def sharding(self) -> int:
        """Ranks over which the optimizer state of all parameters but the experts' is sharded."""
        return self.data * self.context

    @property
    def expert_sharding(self) -> int:
        """Ranks over which the optimizer state of the experts' parameters is sharded."""
        return max(1, self.training_gpus // (self.expert * self.expert_tensor * self.pipeline))

    @property
    def colocated(self) -> bool:
        return self.engine_gpus == 0

    @property
    def engines(self) -> int:
        return (self.engine_gpus or self.gpus) // self.engine_tensor

    def name(self) -> str:
        """The layout in words, e.g. "TP4 PP2 DP8, full recompute, engines TP1 colocated"."""
        parts = [("TP", self.tensor), ("PP", self.pipeline), ("VPP", self.virtual), ("CP", self.context),
                 ("EP", self.expert), ("DP", self.data)]  # fmt: skip
        shown = " ".join(f"{key}{size}" for key, size in parts if size > 1 or key in ("TP", "DP"))
        where = "colocated" if self.colocated else f"on {self.engine_gpus} own GPUs"
        where += ", in turns" if self.trainer_leaves else ""
        extras = ["no sequence parallelism"] if self.tensor > 1 and not self.sequence_split else []
        extras += [f"{self.recompute} recompute"] if self.recompute != "none" else []
        extras += ["shadow on host"] if self.shadow_on_host else []
        extras += [f"LoRA of rank {self.lora_rank}"] if self.lora_rank else []
        extras += ["optimizer on host"] if self.optimizer_on_host else []
        return ", ".join([shown, *extras, f"engines TP{self.engine_tensor} {where}"])


def stage_layers(layers: int, layout: Layout) -> list[int]:
    """Number of layers of each pipeline stage. If the layers do not divide evenly, pieces in the middle get one more,
    then the first piece, then the last, which has the LM head (mcore/model.py::uneven_layout)."""
    return list(_stage_layers(layers, layout.pipeline, layout.virtual))


@cache  # a search asks millions of times, and there are few answers
def _stage_layers(layers: int, pipeline: int, virtual: int) -> tuple[int, ...]:
    pieces = pipeline * virtual
    each, more = divmod(layers, pieces)
    extra = [*range(1, pieces - 1), 0, pieces - 1][:more]
    return tuple(sum(each + (piece in extra) for piece in range(stage, pieces, pipeline)) for stage in range(pipeline))


def impossible(layout: Layout, arch: Architecture) -> Iterator[str]:
    """The reasons why the model cannot be split like this. The rules are those of the trainer's check."""
    if layout.training_gpus % layout.copy:
        yield f"{layout.copy} ranks a copy do not divide {layout.training_gpus} GPUs"
    for what, size in (("heads", arch.heads), ("key-value heads", arch.groups), ("intermediate size", arch.ffn)):
        if size % layout.tensor:
            yield f"TP {layout.tensor} does not divide {size} {what}"
    if layout.pipeline * layout.virtual > arch.layers:
        yield f"PP {layout.pipeline} × VPP {layout.virtual} is more than {arch.layers} layers"
    if arch.experts:
        ranks = layout.expert * layout.expert_tensor
        if arch.experts % layout.expert:
            yield f"EP {layout.expert} does not divide {arch.experts} experts"
        if layout.training_gpus % (ranks * layout.pipeline):
            yield f"EP {layout.expert} does not divide a stage's {layout.training_gpus // layout.pipeline} ranks"
    elif layout.expert > 1:
        yield "EP without experts"
    if arch.heads % layout.engine_tensor or (arch.groups % layout.engine_tensor and layout.engine_tensor % arch.groups):
        yield f"engine TP {layout.engine_tensor} does not divide {arch.heads} heads"
    for what, size in (("intermediate size", arch.ffn), ("experts' intermediate size", arch.expert_ffn)):
        if size % layout.engine_tensor:
            yield f"engine TP {layout.engine_tensor} does not divide {size}, the {what}"
    if (layout.engine_gpus or layout.gpus) % layout.engine_tensor:
        yield f"engine TP {layout.engine_tensor} does not divide its GPUs"
