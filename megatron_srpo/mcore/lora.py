"""LoRA on Megatron's linear layers (Hu et al. 2021): y = W x + scale · B A x, where only A and B are trained.

Every projection of the Hugging Face model has its own A [r, in] and B [out, r], also where Megatron fuses several into
one layer. So names and splits are peft's, and fused layers behave as peft's separate ones:

    layer                  projections             A [r, in]                 B [out, r]
    linear_qkv             q_proj, k_proj, v_proj  whole on every rank       rows split over TP
    linear_fc1             gate_proj, up_proj      whole on every rank       rows split over TP
    linear_proj            o_proj                  columns split over TP     whole on every rank
    linear_fc2             down_proj               columns split over TP     whole on every rank

All communication is at width r. Sequence parallelism multiplies each rank's own tokens with what is whole, and gathers
or scatters them at width r; the gradients of what is whole are then summed over TP by Megatron, which the attribute
`sequence_parallel` asks for. Experts communicate nothing: the dispatcher already sums their results over the ranks that
split them, and `sum_expert_gradients` does so for the gradients of what is whole on these ranks.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron_srpo.config import LoraConfig
from megatron_srpo.mcore.groups import Topology

if TYPE_CHECKING:
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

FUSED = {  # Megatron's layer → the projections that it computes, in order
    "linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "linear_proj": ("o_proj",),
    "linear_fc1": ("gate_proj", "up_proj"),
    "linear_fc2": ("down_proj",),
}
ROW_PARALLEL = ("linear_proj", "linear_fc2")
EXPERTS = ".experts."  # part of the names of experts' layers
MARK = ".adapters."  # part of the names of adapters' parameters


class Adapter(torch.nn.Module):
    """The two factors of one projection, as this rank has them."""

    def __init__(self, rank: int, inputs: int, outputs: int, like: Tensor) -> None:
        super().__init__()
        made = functools.partial(torch.zeros, dtype=like.dtype, device=like.device)
        self.lora_A = torch.nn.Parameter(made(rank, inputs))
        self.lora_B = torch.nn.Parameter(made(outputs, rank))


class AdaptedLinear:
    """What `_adapt` mixes into the class of a linear layer that gets adapters."""

    adapters: torch.nn.ModuleDict  # of Adapter, by projection
    eps: float  # of Transformer Engine's norm inside the layer
    adapters_on: bool
    widths: dict[str, int]  # output rows of every projection of the layer on this rank, adapted or not
    groups: int  # of output rows: in each one the projections' rows lie side by side
    scale: float
    dropout: float
    splits_rows: bool  # row-parallel: the input is split
    splits_tokens: bool  # sequence parallelism around this layer
    group: dist.ProcessGroup | None  # ranks that split the layer; None for one rank
    communicates: bool  # False for experts, whose dispatcher does it

    def forward(self, x: Tensor, *arguments: Any, **named: Any) -> tuple[Tensor, Tensor | None]:
        """The layer's output with the adapters' added. As Megatron's layers: (output, bias to be added later)."""
        output, bias = super().forward(x, *arguments, **named)  # type: ignore[misc]
        if not self.adapters_on:
            return output, bias
        return output + self._low_rank(x), bias

    def _low_rank(self, x: Tensor) -> Tensor:
        if hasattr(self, "layer_norm_weight"):  # Transformer Engine normalises inside the layer
            x = F.rms_norm(x, x.shape[-1:], self.layer_norm_weight, self.eps)
        parts = {name: self._product(adapter, x) for name, adapter in self._factors()}
        return self._joined(parts, next(iter(parts.values())))

    def _factors(self) -> Iterable[tuple[str, Adapter]]:
        return cast("Iterable[tuple[str, Adapter]]", self.adapters.items())

    def _product(self, adapter: Adapter, x: Tensor) -> Tensor:
        """scale · B A x of one projection."""
        inner = F.linear(self._dropped(x), adapter.lora_A)
        if self.group is not None and self.communicates:
            inner = self._exchanged(inner)
        return F.linear(inner * self.scale, adapter.lora_B)

    def _exchanged(self, inner: Tensor) -> Tensor:
        if self.splits_rows:
            reduce = reduce_scatter_to_sequence_parallel_region if self.splits_tokens else (
                reduce_from_tensor_model_parallel_region
            )  # fmt: skip
            return reduce(inner, group=self.group)
        if self.splits_tokens:
            return gather_from_sequence_parallel_region(inner, group=self.group)
        return copy_to_tensor_model_parallel_region(inner, group=self.group)

    def _dropped(self, x: Tensor) -> Tensor:
        if not self.dropout or not self.training:  # type: ignore[attr-defined]
            return x
        # A split input has other values on every rank and needs other masks. Under sequence parallelism Megatron's
        # block has switched to the rank's own generator already.
        own = self.splits_rows and self.group is not None and not self.splits_tokens
        with get_cuda_rng_tracker().fork() if own else nullcontext():
            return F.dropout(x, self.dropout)

    def _joined(self, parts: dict[str, Tensor], like: Tensor) -> Tensor:
        """The projections' outputs [..., rows] in the layer's order of rows; zeros for those without an adapter."""
        found = []
        for name, width in self.widths.items():
            part = parts[name] if name in parts else like.new_zeros(*like.shape[:-1], width)
            found.append(part.unflatten(-1, (self.groups, -1)))
        return torch.cat(found, -1).flatten(-2)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """This rank's W + scale · B A, computed in fp32, in the dtype of W. A new tensor."""
        products = {name: (adapter.lora_B.float() @ adapter.lora_A.float()).T for name, adapter in self._factors()}
        delta = self._joined(products, next(iter(products.values()))).T
        weight: Tensor = self.weight  # type: ignore[attr-defined]
        return torch.add(weight.float(), delta, alpha=self.scale).to(weight.dtype)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict:
        """Megatron's, with the places of the adapters' shards."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[misc]
        own = dict(self.adapters.named_parameters())
        split, axis = ("lora_A", 1) if self.splits_rows else ("lora_B", 0)
        axes = {name: axis for name in own if name.endswith(split)}
        return state | make_sharded_tensors_for_checkpoint(
            own, f"{prefix}adapters.", axes, sharded_offsets, tp_group=self.group or _ONE_RANK,
            dp_cp_group=metadata["dp_cp_group"],
        )  # fmt: skip


class _OneRank:
    """A group of this rank alone, as far as Megatron asks."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1


_ONE_RANK = _OneRank()


@functools.cache
def _adapt(cls: Any) -> Any:
    """The subclass of a linear layer that adds adapters."""
    return type(f"Adapted{cls.__name__}", (AdaptedLinear, cls), {})


# ---- adding adapters to a model --------------------------------------------------------------------------------------


def attach(gpt: GPTModel, settings: LoraConfig, topology: Topology, *, seed: int) -> None:
    """Give the targeted layers new adapters, and freeze everything else. A is drawn as in peft (Kaiming uniform), from
    a generator of its own for each projection, so that it does not depend on the layout; B is zero."""
    gpt.requires_grad_(False)
    for name, layer in list(_targets(gpt, settings)):
        _attach_one(layer, name, settings, topology, seed)
    if gpt.pre_process:
        # Recomputation and pipeline stages need an input that requires a gradient, or would drop those of all adapters
        # behind it.
        gpt.embedding.register_forward_hook(_require_gradient)


def _require_gradient(module: torch.nn.Module, given: object, output: Tensor) -> None:
    if torch.is_grad_enabled():
        output.requires_grad_(True)


def _targets(gpt: GPTModel, settings: LoraConfig) -> Iterator[tuple[str, Any]]:
    """The layers that get adapters, by names with global layer numbers (experts have local ones)."""
    numbers = {str(i): str(layer.layer_number - 1) for i, layer in enumerate(gpt.decoder.layers)}
    for name, layer in gpt.decoder.named_modules(prefix="decoder"):
        parts = name.split(".")
        if parts[-1] not in FUSED or not _projections(name, settings):
            continue
        yield ".".join([*parts[:2], numbers[parts[2]], *parts[3:]]), layer


def _projections(name: str, settings: LoraConfig) -> tuple[str, ...]:
    """The projections of the layer `name` that get an adapter."""
    fused = FUSED[name.rpartition(".")[2]]
    if EXPERTS in name:
        return fused if settings.experts else ()
    return tuple(part for part in fused if part in settings.projections)


def _attach_one(layer: Any, name: str, settings: LoraConfig, topology: Topology, seed: int) -> None:
    leaf, expert = name.rpartition(".")[2], EXPERTS in name
    rows, columns = layer.weight.shape
    size, number, group = (
        (topology.etp_size, topology.etp_rank, _expert_group()) if expert else (
            topology.tp_size, topology.tp_rank, topology.tp_group
        )
    )  # fmt: skip
    config = layer.config
    kind: Any = type(layer)
    layer.__class__ = _adapt(kind)
    layer.widths, layer.groups = _widths(leaf, rows, config, size)
    layer.adapters_on, layer.scale, layer.dropout = True, settings.scale, settings.dropout
    layer.splits_rows, layer.communicates = leaf in ROW_PARALLEL, not expert
    layer.splits_tokens = config.sequence_parallel and size > 1
    layer.group = group if size > 1 else None
    layer.adapters = torch.nn.ModuleDict()
    for part in _projections(name, settings):
        layer.adapters[part] = adapter = Adapter(settings.rank, columns, layer.widths[part], layer.weight)
        _mark(adapter, layer, expert=expert, first=number == 0)
        where = _global_name(name, topology, config)
        _draw(adapter.lora_A, f"{where}.{part}", seed, (number, size) if layer.splits_rows else (0, 1))


def _expert_group() -> dist.ProcessGroup:
    from megatron.core import parallel_state

    return parallel_state.get_expert_tensor_parallel_group()


def _global_name(name: str, topology: Topology, config: TransformerConfig) -> str:
    """The layer's name with the global number of its expert."""
    head, found, tail = name.partition(".local_experts.")
    if not found:
        return name
    number, _, rest = tail.partition(".")
    first = topology.ep_rank * config.num_moe_experts // topology.ep_size
    return f"{head}{found}{int(number) + first}.{rest}"


def _widths(leaf: str, rows: int, config: TransformerConfig, size: int) -> tuple[dict[str, int], int]:
    """The output rows of every projection of a layer on this rank, and the number of groups of rows."""
    if leaf == "linear_qkv":
        groups = config.num_query_groups // size
        keys = groups * config.kv_channels
        return {"q_proj": rows - 2 * keys, "k_proj": keys, "v_proj": keys}, groups
    parts = FUSED[leaf]
    return dict.fromkeys(parts, rows // len(parts)), 1


def _mark(adapter: Adapter, layer: Any, *, expert: bool, first: bool) -> None:
    """Tell Megatron which factor is split, whose gradient is a part of the sum, and what counts in the gradient norm.

    `first`: this rank is the first one of those that split the layer.
    """
    split, whole = (adapter.lora_A, adapter.lora_B) if layer.splits_rows else (adapter.lora_B, adapter.lora_A)
    setattr(split, "tensor_model_parallel", True)  # noqa: B010  # Megatron's attributes
    setattr(split, "partition_dim", 1 if layer.splits_rows else 0)  # noqa: B010
    setattr(split, "partition_stride", 1)  # noqa: B010
    if not expert:
        setattr(whole, "sequence_parallel", layer.splits_tokens)  # noqa: B010
        return
    for parameter in (split, whole):  # as experts.mark_experts
        setattr(parameter, "allreduce", False)  # noqa: B010
        setattr(parameter, "tensor_model_parallel", True)  # noqa: B010
    setattr(whole, "shared", not first)  # noqa: B010  # counts once in the gradient norm
    setattr(whole, "summed_over", layer.group)  # noqa: B010  # see sum_expert_gradients


@torch.no_grad()
def _draw(factor: Tensor, name: str, seed: int, place: tuple[int, int]) -> None:
    """Fill this rank's columns of A with peft's Kaiming uniform numbers. `place`: number of this part, and of parts."""
    if factor.device.type == "meta":
        return
    part, parts = place
    rank, width = factor.shape
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    bound = 1 / math.sqrt(width * parts)  # of kaiming_uniform_(a=sqrt(5))
    whole = torch.empty(rank, width * parts).uniform_(-bound, bound, generator=generator)
    factor.copy_(whole[:, part * width : (part + 1) * width])


# ---- a model with adapters -------------------------------------------------------------------------------------------


def adapted_layers(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers with adapters, by name."""
    return ((name, layer) for name, layer in model.named_modules() if isinstance(layer, AdaptedLinear))


def has_adapters(models: Iterable[torch.nn.Module]) -> bool:
    return any(True for model in models for _ in adapted_layers(model))


def merged_weights(model: torch.nn.Module) -> dict[str, Callable[[], Tensor]]:
    """By the name of a weight with adapters: the function that makes the merged weight."""
    return {f"{name}.weight": layer.merged_weight for name, layer in adapted_layers(model)}


@contextmanager
def adapters_off(models: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Inside this block the model computes without its adapters: it is the base model."""
    layers = [layer for model in models for _, layer in adapted_layers(model)]
    for layer in layers:
        layer.adapters_on = False
    try:
        yield
    finally:
        for layer in layers:
            layer.adapters_on = True


def sum_expert_gradients(models: Iterable[torch.nn.Module]) -> None:
    """Sum the gradients of what is whole on every rank that splits an expert: each rank has its part."""
    for model in models:
        for parameter in model.parameters():
            group = getattr(parameter, "summed_over", None)
            if group is not None:
                dist.all_reduce(getattr(parameter, "main_grad"), group=group)  # noqa: B009  # Megatron's attribute
