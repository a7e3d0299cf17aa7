"""Running packed rows through the pipeline: one function for training, one for scoring.

Megatron scales losses in three places (the schedule divides by micro-batches and multiplies by the context parallel
size, DDP averages over data-parallel ranks, `finalize_model_grads` divides by tokens). Our objective carries its own
global denominators, so all of it is switched off here and nowhere else: `calculate_per_token_loss` makes DDP sum
gradients and leaves the loss alone, and `_sum_gradients` keeps the token division out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.utils import get_model_config

from megatron_srpo.core.metrics import Metrics
from megatron_srpo.core.tensors import HeadInput, LossFunction, PackedBatch, ScoreFunction, chain_of
from megatron_srpo.mcore import lora, rotary
from megatron_srpo.mcore.attention import SharedSeqParams
from megatron_srpo.mcore.context import gather_parts, local_part
from megatron_srpo.mcore.groups import Topology
from megatron_srpo.mcore.model import head_weight


def _sum_gradients(model: list[torch.nn.Module], num_tokens: Any = None, **kwargs: Any) -> None:
    finalize_model_grads(model, None, **kwargs)
    lora.sum_expert_gradients(model)


def _copy(hidden: torch.Tensor) -> torch.Tensor:
    return copy_to_tensor_model_parallel_region(hidden)  # its backward sums over tensor-parallel ranks


def packed_params(row: PackedBatch) -> PackedSeqParams:
    """Megatron's description of a packed row (THD): sequence boundaries, and the largest number of tokens up to the end
    of a sequence, its prefix included."""
    lengths = row.cu_seqlens[1:] - row.cu_seqlens[:-1]
    if not row.prefixes:
        longest = int(lengths.max())
        return PackedSeqParams("thd", row.cu_seqlens, row.cu_seqlens, None, None, longest, longest)
    sizes = lengths.tolist()
    starts = [sum(sizes[i] for i in chain_of(prefix, row.prefixes)) for prefix in row.prefixes]
    rotary.set_starts(row.cu_seqlens, torch.tensor(starts, device=lengths.device))
    return SharedSeqParams.of(row.cu_seqlens, row.prefixes)


class PipelineRunner:
    """Forward and backward of packed rows on this rank's pipeline stage.

    Every rank of a model-parallel group must pass the same rows, and every data-parallel rank the same number.
    """

    def __init__(self, model: list[torch.nn.Module], topology: Topology, vocab_size: int) -> None:
        self.model = model
        self.topology = topology
        self.config = get_model_config(model[0])
        self.config.finalize_model_grads_func = _sum_gradients
        shard = -(-vocab_size // topology.tp_size)
        self.vocab_start = topology.tp_rank * shard
        # Padding of the vocabulary ends here: no loss ever sees it.
        self._real_width = max(0, min(shard, vocab_size - self.vocab_start))

    def _forward(self, rows: Any, model: torch.nn.Module, *, after: Callable[[torch.Tensor, PackedBatch], Any]) -> Any:
        row = part = on_device(next(rows), self.topology.device)
        if self.topology.cp_size > 1:
            part = local_part(row, self.topology.cp_rank, self.topology.cp_size, self.topology.cp_group)
        # fp32_output: bf16 logits stay bf16; the losses compute in fp32 piece by piece.
        keywords = {"fp32_output": False} if self.config.bf16 else {}
        output = model(
            part.input_ids[None], part.position_ids[None], None, packed_seq_params=packed_params(row), **keywords
        )
        return output, partial(self._on_last_stage, row=part, after=after)

    def _on_last_stage(self, output: torch.Tensor, *, row: PackedBatch, after: Any, non_loss_data: bool = False) -> Any:
        hidden, group = output[0], None
        if self.topology.tp_size > 1:  # as Megatron's column-parallel head does before its product
            group = self.topology.tp_group
            gather = gather_from_sequence_parallel_region if self.config.sequence_parallel else _copy
            hidden = gather(hidden)
        weight = head_weight(self.model[-1])
        return after(HeadInput(hidden, weight, self._real_width, self.vocab_start, group), row)

    def _run(self, rows: Sequence[PackedBatch], after: Any, **flags: Any) -> list[Any]:
        first = rows[0]
        return get_forward_backward_func()(
            forward_step_func=partial(self._forward, after=after),
            data_iterator=[_with_first(first, rows) for _ in self.model],
            model=self.model,
            num_microbatches=len(rows),
            seq_length=first.input_ids.numel(),
            micro_batch_size=1,
            **flags,
        )

    def train(self, rows: Sequence[PackedBatch], loss: LossFunction) -> list[Metrics]:
        """Accumulate the gradient of Σ loss(row); returns each row's metrics (last stage; else [])."""

        def after(given: HeadInput, row: PackedBatch) -> Any:
            value, metrics = loss(given, row)
            return value, torch.zeros((), dtype=torch.int, device=given.hidden.device), metrics

        return self._run(rows, after, forward_only=False)

    @torch.no_grad()
    def score(
        self, rows: Sequence[PackedBatch], score: ScoreFunction, at: Sequence[torch.Tensor] | None = None
    ) -> list[dict[str, torch.Tensor]]:
        """`score` of every row without gradient, over the whole row on each context-parallel rank (last stage; else
        []), or at these positions of each row alone. It is moved to host memory row by row."""
        places = iter(at or ())

        def after(given: HeadInput, part: PackedBatch) -> dict[str, torch.Tensor]:
            found, place = score(given, part), next(places, None)
            for name, values in found.items():
                if self.topology.cp_size > 1:
                    whole = part.cu_seqlens * self.topology.cp_size
                    values = gather_parts(values, whole, self.topology.cp_group)
                found[name] = (values if place is None else values[place.to(values.device)]).cpu()
            return found

        return self._run(rows, after, forward_only=True, collect_non_loss_data=True)


def _with_first(first: PackedBatch, rows: Sequence[PackedBatch]) -> Iterator[PackedBatch]:
    """The rows, of which the first is there already: a row is made anew whenever it is asked for."""
    yield first
    for number in range(1, len(rows)):
        yield rows[number]


def on_device(row: PackedBatch, device: torch.device) -> PackedBatch:
    """The row without its experts, which the routers have."""
    row = dataclasses.replace(row, experts=None)
    return row if device.type == "cpu" else row.map(lambda values: values.to(device, non_blocking=True))
