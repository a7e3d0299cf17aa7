"""Mixtures of experts: the router, its load-balancing loss, and metrics of the routers' work in a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_model_config

from megatron_srpo.core.metrics import Max, Mean, Metric
from megatron_srpo.core.tensors import PackedBatch
from megatron_srpo.mcore.context import gather_parts, positions_by_rank
from megatron_srpo.mcore.groups import Topology
from megatron_srpo.mcore.replay import DIFFERENT, FREE, NOT_REPLAYED, RowReplay

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection

if not hasattr(moe_utils, "te_general_gemm"):
    moe_utils.te_general_gemm = None  # Megatron 0.16.1 imports this name also without Transformer Engine


class CountingRouter(TopKRouter):
    """Megatron's router, which also counts its choices in training passes.

    `seen` is [2, E] float64, summed over the tokens since the last `take`: how many tokens each of the E experts got,
    and its probabilities before the choice. Padding is routed, and not counted."""

    def __init__(
        self, config: TransformerConfig, pg_collection: ProcessGroupCollection | None = None, **more: object
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection, **more)
        self.seen: torch.Tensor | None = None
        self.tokens = 0
        self.router_replay = RowReplay()  # Megatron's name

    def routing(self, logits: torch.Tensor, *args: object, **kwargs: object) -> tuple[torch.Tensor, torch.Tensor]:
        probs, chosen = super().routing(logits, *args, **kwargs)
        if self.training and torch.is_grad_enabled():  # counts a token once even if its activations are recomputed
            with torch.no_grad():
                shares = logits.detach().reshape(-1, logits.shape[-1]).softmax(-1)
                seen = torch.stack([self._of_tokens(chosen).sum(0).double(), self._of_tokens(shares).sum(0).double()])
                self.seen = seen if self.seen is None else self.seen + seen
                self.tokens += shares.shape[0] - self.router_replay.padded
        return probs, chosen

    def _of_tokens(self, values: torch.Tensor) -> torch.Tensor:
        """`values` [T, E] of the row that is being routed, 0 at its padding."""
        padding = self.router_replay.padding
        return values if padding is None else values.masked_fill(padding[:, None], 0)

    def _apply_aux_loss(
        self, probs: torch.Tensor, scores_for_aux_loss: torch.Tensor, routing_map: torch.Tensor, *unused: object,
        **also_unused: object,
    ) -> torch.Tensor:  # fmt: skip
        """Megatron's hook: add this rank's part of the row's loss times the row's tokens, padding left out, to the
        objective. `set_balancing` has the rest of the factor. Megatron's own loss counts padding, of which the rows of
        an interleaved pipeline have much, and its factor differs between 0.16 and 0.19."""
        choices = reduce_from_tensor_model_parallel_region(self._of_tokens(routing_map).sum(0), self.tp_cp_group)
        shares = self._of_tokens(scores_for_aux_loss).sum(0)
        loss = self.num_experts * (choices * shares).sum() / choices.sum().clamp(min=1)
        return moe_utils.MoEAuxLossAutoScaler.apply(probs, self.config.moe_aux_loss_coeff * loss)

    def take(self) -> tuple[torch.Tensor, int]:
        """Return what was counted on this rank ([2, E] and the number of tokens), and set the counts to zero."""
        seen, tokens = self.seen, self.tokens
        self.seen, self.tokens = None, 0
        return (torch.zeros(2, self.num_experts, dtype=torch.float64) if seen is None else seen), tokens


def expert_layer_mlp(config: TransformerConfig, *, transformer_engine: bool) -> ModuleSpec:
    """The Megatron spec of a layer's experts, with our router."""
    spec = get_moe_module_spec(
        use_te=transformer_engine, num_experts=config.num_moe_experts, moe_grouped_gemm=config.moe_grouped_gemm
    )
    # Megatron Core 0.19 returns a partial, 0.16 a ModuleSpec.
    parts = spec.keywords["submodules"] if isinstance(spec, partial) else spec.submodules
    parts.router = CountingRouter
    return spec


def is_expert(parameter: torch.nn.Parameter) -> bool:
    """Whether the parameter belongs to an expert. Its gradient is then summed over `Topology.expert_dp_group`."""
    return not getattr(parameter, "allreduce", True)


def mark_experts(model: torch.nn.Module) -> None:
    """Mark the experts' parameters as such. Without expert parallelism Megatron does not, and would sum their gradients
    over the data-parallel ranks only, and miss the tokens of other tensor-parallel ranks.

    Their optimizer state is sharded over all ranks with a copy, so no slice of it is a duplicate. Transformer Engine's
    grouped products do not say so for whole experts (expert tensor parallel 1), and Megatron would leave the slices of
    all tensor-parallel ranks but the first out of the gradient norm.
    """
    for layer in _expert_layers(model):
        for parameter in layer.experts.parameters():
            parameter.allreduce = False
            parameter.tensor_model_parallel = True


def _expert_layers(model: torch.nn.Module) -> Iterator[MoELayer]:
    return (module for module in model.modules() if isinstance(module, MoELayer))


def give_experts(
    model: list[torch.nn.Module], topology: Topology, config: TransformerConfig, rows: Sequence[PackedBatch], *,
    record: bool = False,
) -> int:  # fmt: skip
    """Before a pass: give every router the experts of this rank's tokens of the rows, and which of these are padding.
    With `record` let it keep what it chooses. Returns this rank's number of tokens in the rows if any experts are
    given, else 0."""
    if not config.num_moe_experts:
        return 0
    parts, padding, tokens = [], [], 0
    for row in rows:  # packed here, and not kept
        parts.append(_own_tokens(row.experts, row, topology, config))
        padding.append(_own_tokens(row.is_padding, row, topology, config))
        tokens += row.input_ids.numel()
    replays = any(part is not None for part in parts)
    for layer, number in _numbered_expert_layers(model):
        given = [None if part is None else part[:, number] for part in parts] if replays else []
        layer.router.router_replay.begin(given, record=record, padding=padding)
    return tokens // (topology.cp_size * _token_ranks(topology, config)) if replays else 0


def forget_experts(model: list[torch.nn.Module]) -> None:
    """After a pass: the routers are as they were before `give_experts`."""
    for layer, _ in _numbered_expert_layers(model):
        layer.router.router_replay.end()


def chosen_experts(
    model: list[torch.nn.Module], topology: Topology, config: TransformerConfig, rows: Sequence[PackedBatch]
) -> list[torch.Tensor]:
    """After a pass with `record`: the experts of every row, [T, layers with experts, experts of a token] int16 in host
    memory. The layers of other pipeline stages are FREE. The ranks that share a row call it together."""
    layers = list(_numbered_expert_layers(model))
    count = sum(config.moe_layer_freq)
    found = []
    for place, row in enumerate(rows):
        whole = torch.full((row.input_ids.numel(), count, config.moe_router_topk), FREE, dtype=torch.int16)
        if layers:
            own = torch.stack([layer.router.router_replay.recorded[place] for layer, _ in layers], 1)
            own = own.to(topology.device, torch.int32)  # gloo and NCCL send no int16
            if _token_ranks(topology, config) > 1:
                pieces = [torch.empty_like(own) for _ in range(topology.tp_size)]
                dist.all_gather(pieces, own, group=topology.tp_group)
                own = torch.cat(pieces)
            if topology.cp_size > 1:
                own = gather_parts(own, row.cu_seqlens.to(own.device), topology.cp_group)
            whole[:, [number for _, number in layers]] = own.cpu().to(torch.int16)
        found.append(whole)
    return found


def _own_tokens(
    values: torch.Tensor | None, row: PackedBatch, topology: Topology, config: TransformerConfig
) -> torch.Tensor | None:
    """The part of a row's `values` [T, …] that belongs to the tokens which this rank routes."""
    if values is None:
        return None
    if topology.cp_size > 1:
        values = values[positions_by_rank(row.cu_seqlens.cpu(), topology.cp_size)[topology.cp_rank]]
    ranks = _token_ranks(topology, config)
    return values.chunk(ranks)[topology.tp_rank] if ranks > 1 else values


def _token_ranks(topology: Topology, config: TransformerConfig) -> int:
    """Number of tensor-parallel ranks over which sequence parallelism spreads the tokens before a router."""
    return topology.tp_size if config.sequence_parallel else 1


def _numbered_expert_layers(model: list[torch.nn.Module]) -> Iterator[tuple[MoELayer, int]]:
    """This rank's layers with experts, and the number of each among all of the model's layers with experts."""
    for piece in model:
        if not get_model_config(piece).num_moe_experts:  # a walk over all modules at every pass costs milliseconds
            continue
        for layer in _expert_layers(piece):
            yield layer, sum(layer.config.moe_layer_freq[: layer.layer_number - 1])


def set_balancing(config: TransformerConfig, coefficient: float, tokens: int) -> None:
    """Make the next training step add `coefficient` · Σ row loss · row tokens / `tokens` to its objective.

    A row's loss is E · Σ_e f_e · p_e, summed over layers, where f_e is expert e's share of the choices and p_e its mean
    probability. `tokens` is the number of tokens of all rows, padding left out. The router multiplies a row's loss by
    the row's tokens.
    """
    config.moe_aux_loss_coeff = coefficient / max(1, tokens)


def count_tokens(rows: Sequence[PackedBatch]) -> int:
    """The tokens of these rows without padding."""
    return sum(row.input_ids.numel() - (0 if row.is_padding is None else int(row.is_padding.sum())) for row in rows)


def router_metrics(
    model: list[torch.nn.Module], topology: Topology, config: TransformerConfig, *, replayed: int
) -> dict[str, Metric]:
    """Metrics of the routers' choices since the last call, over all ranks; {} for a dense model. All ranks call it.

    A metric is the mean over layers, or the worst layer if its name ends in "_max". With a perfect balance, load and
    loss are 1. `replayed` is what `give_experts` returned for the pass.
    """
    if not config.num_moe_experts:
        return {}
    experts = config.num_moe_experts
    counted = torch.zeros(config.num_layers, 2 * experts + 1, dtype=torch.float64)
    for piece in model:
        for layer in _expert_layers(piece):
            seen, tokens = layer.router.take()
            counted[layer.layer_number - 1, :-1] = seen.flatten().cpu()
            counted[layer.layer_number - 1, -1] = tokens
    dist.all_reduce(counted, group=topology.control_group)  # each token is counted on one rank, each layer on one stage
    counted = counted[counted[:, -1] > 0]
    if not len(counted):
        return {}
    choices, shares, tokens = counted[:, :experts], counted[:, experts:-1], counted[:, -1]
    differences = _differences(model, topology, replayed)
    if differences and choices.sum() != tokens.sum() * config.moe_router_topk:
        raise RuntimeError("the experts to use again name one expert twice for a token: the engine's record is broken")
    load = choices.max(1).values / choices.mean(1)
    balance = experts * (choices / choices.sum(1, keepdim=True) * shares / tokens[:, None]).sum(1)
    return {
        "moe/load_max_over_mean": Mean(float(load.mean())),
        "moe/load_max_over_mean_max": Max(float(load.max())),
        "moe/idle_experts": Mean(float((choices == 0).double().mean())),
        "moe/balance_loss": Mean(float(balance.mean())),
        "moe/dropped_fraction": Mean(float(1 - choices.sum() / (tokens.sum() * config.moe_router_topk))),
        **differences,
    }


def _differences(model: list[torch.nn.Module], topology: Topology, replayed: int) -> dict[str, Metric]:
    """How often the routers would have chosen other experts than those that they were given: share of their decisions,
    and of the tokens with such a decision in one layer at least. {} if no rank was given any."""
    of_token = torch.full((replayed,), NOT_REPLAYED, dtype=torch.int32)
    decisions = torch.zeros(2, dtype=torch.float64)
    for layer, _ in _numbered_expert_layers(model):
        if replayed:
            compared = torch.cat(layer.router.router_replay.compared).cpu().int()
            of_token = torch.maximum(of_token, compared)
            decisions += torch.stack([(compared == DIFFERENT).sum(), (compared != NOT_REPLAYED).sum()])
    if replayed and topology.pp_size > 1:  # each stage knows its own layers
        of_token = of_token.to(topology.device)
        dist.all_reduce(of_token, dist.ReduceOp.MAX, group=topology.pp_group)
    tokens = torch.stack([(of_token == DIFFERENT).sum(), (of_token != NOT_REPLAYED).sum()]).cpu().double()
    counts = torch.cat([decisions, tokens])  # each token counts once on every stage, which changes no share
    dist.all_reduce(counts, group=topology.control_group)
    if not counts[1]:
        return {}
    return {
        "moe/choices_differ": Mean(float(counts[0] / counts[1])),
        "moe/tokens_differ": Mean(float(counts[2] / counts[3])),
    }
