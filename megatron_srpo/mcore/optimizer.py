"""Megatron's distributed optimizer: builds it, steps it, and gives its state by model parameter.

The optimizer is always the distributed one: each data-parallel rank keeps its shard of the fp32 main parameters
and of Adam's moments. Everything else that is kept per parameter (the teacher's shadow) uses the same sharding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.utils import get_model_config

from megatron_srpo.config import OptimizerConfig
from megatron_srpo.mcore.host_state import PIECE, HostState


@dataclass(frozen=True)
class ParameterShard:
    """One model parameter and this data-parallel rank's flat slice of it in the optimizer."""

    parameter: torch.nn.Parameter  # the model's parameter: the whole tensor-parallel shard
    main: torch.Tensor  # [stop − start] fp32, this rank's slice of the main parameter
    start: int  # where the slice starts in the flattened parameter
    stop: int
    state: dict[str, torch.Tensor]  # Adam's state of the slice

    @property
    def model(self) -> torch.Tensor:
        """The same slice of the model's parameter, in its dtype. It is the same memory as `main` if the model is
        fp32."""
        return self.parameter.data.view(-1)[self.start : self.stop]


def _own(shards: Iterable[ParameterShard]) -> list[torch.Tensor]:
    """The tensors of these shards that can leave the device: not the main parameters of an fp32 model, which are the
    model's memory, and not torch's counts of steps, which are on the host."""
    found = []
    for shard in shards:
        found += [shard.main] if shard.parameter.dtype != torch.float32 else []
        found += [value for value in shard.state.values() if value.dim()]
    return found


def _pieces(mains: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """The main parameters in groups of at most PIECE bytes, moments included; a larger one is a group of its own."""
    piece: list[torch.Tensor] = []
    size = 0
    for main in mains:
        if piece and size + 12 * main.numel() > PIECE:
            yield piece
            piece, size = [], 0
        piece.append(main)
        size += 12 * main.numel()
    if piece:
        yield piece


def learning_rate(step: int, config: OptimizerConfig, total_steps: int) -> float:
    """The learning rate of optimizer step `step` (0-based): a linear warm-up, then the schedule down to min_lr."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    done = min(1.0, (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps))
    left = 1.0 - done if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return config.min_lr + (config.lr - config.min_lr) * left


class ShardedOptimizer:
    """Adam on the shards of a model. The model has several pieces under an interleaved pipeline."""

    def __init__(
        self, model: list[torch.nn.Module], config: OptimizerConfig, *, overlap_grad_reduce: bool = False
    ) -> None:
        megatron_config = get_model_config(model[0])
        self.config = config
        reduction = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=True, overlap_grad_reduce=overlap_grad_reduce
        )
        self.model = [DistributedDataParallel(megatron_config, reduction, piece) for piece in model]
        if overlap_grad_reduce:
            for piece in self.model:
                for parameter in piece.parameters():
                    parameter.awaited = True  # DDP waits for the gradients of all parameters of a bucket
            waits = [piece.no_sync for piece in self.model]  # gradients are reduced with the last row only
            megatron_config.no_sync_func = waits if len(waits) > 1 else waits[0]
        self._megatron = get_megatron_optimizer(
            MegatronOptimizerConfig(
                optimizer="adam",
                lr=config.lr,
                weight_decay=config.weight_decay,
                adam_beta1=config.beta1,
                adam_beta2=config.beta2,
                adam_eps=config.eps,
                clip_grad=config.clip_grad,
                bf16=megatron_config.bf16,
                params_dtype=megatron_config.params_dtype,
                use_distributed_optimizer=True,
            ),
            self.model,
            use_gloo_process_groups=False,  # only Megatron's own checkpoints of an optimizer use them
        )
        for group in self._megatron.param_groups:  # foreach would allocate temporaries of all parameters at once
            if "foreach" in group:
                group["foreach"] = False
            if not config.decay_norms_and_biases:
                group["weight_decay"] *= group.get("wd_mult", 1.0)  # Megatron marks them 0; its scheduler would do this
        megatron_config.grad_scale_func = self._megatron.scale_loss
        parts = getattr(self._megatron, "chained_optimizers", [self._megatron])
        # Without any trained parameter of its kind (LoRA on experts alone) Megatron's part is a stub without state.
        self._parts = [part for part in parts if not getattr(part, "is_stub_optimizer", False)]
        self._host = HostState() if config.offload else None
        if self._host:
            self._host.leave(_own(self.shards()))

    def zero_grad(self) -> None:
        for piece in self.model:
            piece.zero_grad_buffer()
        self._megatron.zero_grad()

    @torch.no_grad()
    def step(self, lr: float) -> float:
        """Clip the gradients and take a step. Returns the gradient norm. If the norm is not finite, no parameter
        changes."""
        for group in self._megatron.param_groups:
            group["lr"] = lr * group.get("lr_mult", 1.0)
        self._megatron.prepare_grads()
        norm = float(self._megatron.get_grad_norm())
        if not math.isfinite(norm):
            return norm
        for part in self._parts:
            parameters = part.get_parameters()
            if self.config.clip_grad > 0 and parameters:
                clip_grad_by_total_norm_fp32(parameters, max_norm=self.config.clip_grad, total_norm=norm)
        if self._host:
            self._step_in_pieces()
            self.gather_model()
        else:
            self._megatron.step_with_ready_grads()
        return norm

    def _step_in_pieces(self) -> None:
        """Adam's step with a piece of the state on the device at a time. Adam is elementwise, so the result is the
        same."""
        shards = {shard.main: shard for shard in self.shards()}
        for adam in (part.optimizer for part in self._parts if part.optimizer is not None):
            groups = [(group, group["params"], group.get("step")) for group in adam.param_groups]
            for group, _, _ in groups:
                group["params"] = []
            for group, mains, count in groups:
                for piece in _pieces(mains):
                    group["params"] = piece
                    group.pop("step", None)
                    if count is not None:  # a fused Adam counts every call
                        group["step"] = count
                    self._step_piece(adam, [shards[main] for main in piece])
                group["params"] = []
            for group, mains, _ in groups:
                group["params"] = mains

    def _step_piece(self, adam: torch.optim.Optimizer, shards: list[ParameterShard]) -> None:
        assert self._host is not None
        with self._host.present(_own(shards)):
            adam.step()
            for shard in shards:
                shard.model.copy_(shard.main)
        self._host.leave(tensor for tensor in _own(shards) if tensor.untyped_storage().nbytes())  # the first moments

    def present(self, *tensors: torch.Tensor) -> AbstractContextManager[None]:
        """Inside this block the values of main parameters and of Adam's state can be used. With optimizer.offload they
        are in host memory otherwise."""
        return self._host.present(tensors) if self._host else nullcontext()

    @torch.no_grad()
    def reload_main_from_model(self) -> None:
        """Copy the model's parameters, into which weights were loaded, to the fp32 main parameters."""
        for shard in self.shards():
            with self.present(shard.main):
                shard.main.copy_(shard.model)

    @torch.no_grad()
    def publish_main_to_model(self) -> None:
        """Copy the main slices into the model, and gather the whole parameters from all ranks."""
        for shard in self.shards():
            with self.present(shard.main):
                shard.model.copy_(shard.main)
        self.gather_model()

    def gather_model(self) -> None:
        """Gather the whole parameters of the model from the slices that each rank has written."""
        for piece in self.model:
            for buckets in [*piece.bucket_groups, *piece.expert_parallel_bucket_groups]:
                if buckets.intra_distributed_optimizer_instance_size > 1:
                    buckets.start_param_sync(force_sync=True)

    def shards(self) -> Iterator[ParameterShard]:
        """This rank's slices, in the same order on every call. Parameters of which this data-parallel rank holds
        nothing are left out."""
        for part in self._parts:
            for parameter, (group, index) in part.model_param_group_index_map.items():
                span = part._get_model_param_range_map(parameter)["param"]
                main = part.optimizer.param_groups[group]["params"][index]
                yield ParameterShard(parameter, main, span.start, span.end, part.optimizer.state[main])

    def tensors(self) -> Iterator[torch.Tensor]:
        """The main parameters, then Adam's state, which exists from the first step on."""
        yield from (shard.main.detach() for shard in self.shards())
        yield from (value for shard in self.shards() for value in shard.state.values())

    def gradients(self) -> Iterator[torch.Tensor]:
        """The buffers of the gradients. Every gradient is a view of one of them."""
        for piece in self.model:
            for buffer in [*piece.buffers, *piece.expert_parallel_buffers]:
                yield buffer.grad_data

    def adam_steps(self) -> int:
        """The number of steps that Adam has taken."""
        if self._counts_by_group:
            steps = {int(group["step"]) for group in self._filled_groups() if "step" in group}
        else:
            steps = {int(shard.state["step"]) for shard in self.shards() if "step" in shard.state}
        assert len(steps) <= 1, f"Adam's step differs between parameters: {steps}"
        return steps.pop() if steps else 0

    def restore_adam(self, steps: int) -> None:
        """Create Adam's state after `steps` steps, with zero moments, which the caller fills.

        torch's Adam counts the steps of each parameter in a tensor of its own. A shared tensor would be incremented
        once for each parameter. Fused optimizers count the steps of a group, in an entry that they create in their
        first step.
        """
        for shard in self.shards():
            for moment in ("exp_avg", "exp_avg_sq"):
                if self._host and moment in shard.state:
                    self._host.forget(shard.state[moment])
                shard.state[moment] = torch.zeros_like(shard.main)
                if self._host:
                    self._host.leave([shard.state[moment]])
            if not self._counts_by_group:
                shard.state["step"] = torch.tensor(float(steps))
        if self._counts_by_group:
            for group in self._filled_groups():
                group["step"] = steps

    @property
    def _counts_by_group(self) -> bool:
        """Whether this is a fused Adam (Transformer Engine's, Apex's). The class tells; a new optimizer has no counts
        that could."""
        adams = [part.optimizer for part in self._parts if part.optimizer is not None]
        return not all(isinstance(adam, torch.optim.Adam) for adam in adams)  # AdamW is an Adam

    def _filled_groups(self) -> list[dict[str, Any]]:
        """The groups of which this rank has parameters. Fused optimizers skip the others and do not count their
        steps."""
        return [group for group in self._megatron.param_groups if group["params"]]
