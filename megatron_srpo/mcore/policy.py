"""`Policy`: the trained model as the rest of the package sees it, on one rank."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist

from megatron_srpo.config import Config, ParallelConfig
from megatron_srpo.core.metrics import Max, Mean, Metric, Metrics, Total
from megatron_srpo.core.records import Padding
from megatron_srpo.core.tensors import LossFunction, ModelShards, PackedBatch, ScoreFunction, StepStats
from megatron_srpo.families import expert_count
from megatron_srpo.mcore import lora
from megatron_srpo.mcore.device import DevicePath, peak_memory_gib
from megatron_srpo.mcore.experts import (
    chosen_experts,
    count_tokens,
    forget_experts,
    give_experts,
    router_metrics,
    set_balancing,
)
from megatron_srpo.mcore.groups import Topology
from megatron_srpo.mcore.host_offload import HostOffload
from megatron_srpo.mcore.model import build_model, model_shards
from megatron_srpo.mcore.optimizer import ShardedOptimizer, learning_rate
from megatron_srpo.mcore.shadow import WeightShadow
from megatron_srpo.mcore.step import PipelineRunner


def row_padding(topology: Topology, parallel: ParallelConfig, *, tokens: int = 1, shares: bool = False) -> Padding:
    """What the layout asks of packed sequences and rows; a rank's part of a row is a multiple of `tokens`."""
    cp, tp = topology.cp_size, topology.tp_size if parallel.sequence_parallel else 1
    sequence = 2 * cp if cp > 1 else 1
    rows = topology.pp_size if parallel.virtual_pipeline_model_parallel_size > 1 else 1
    return Padding(sequence, math.lcm(sequence, cp * tp * tokens), rows, shares)


def may_share_prompts(config: Config, *, transformer_engine: bool) -> bool:
    """Whether samples of a row may share their prompt. A shared prompt would have one dropout mask, and one vote in the
    balance of experts. Transformer Engine's context parallelism knows no shared prompts."""
    drops = config.model.attention_dropout or config.model.hidden_dropout or config.lora.dropout
    apart = transformer_engine and config.parallel.context_parallel_size > 1
    return config.train.share_prompts and not (drops or config.train.moe_aux_loss_coef or apart)


class Policy:
    """Student, teacher and reference in one model.

    `load_weights(shards)` fills the parameters (the bridge does it); it is called before the optimizer copies them.
    With LoRA it fills the base weights, and the adapters if they do not start new, and returns the base's checksum.
    """

    def __init__(
        self, config: Config, hf_config: dict, topology: Topology, path: DevicePath,
        load_weights: Callable[[ModelShards], str | None], *, total_steps: int, trainable: bool = True,
    ) -> None:  # fmt: skip
        self.topology = topology
        self.total_steps = total_steps
        self._optimizer_config = config.optimizer
        self._teacher_config = config.teacher
        self._balancing = config.train.moe_aux_loss_coef
        self._replays_engine = config.rollout.replay(expert_count(hf_config)) == "rollout"
        vocab = hf_config["vocab_size"]
        model = build_model(
            hf_config, config.model, config.parallel, topology, transformer_engine=path.transformer_engine,
            adapters=config.lora, seed=config.run.seed,
        )  # fmt: skip
        self._starts_as_base = config.lora.rank > 0 and not config.lora.path  # B is zero
        self.base = load_weights(model_shards(model, topology, vocab)) or ""
        """Checksum of the base weights with LoRA, else empty."""
        self.steps = 0  # optimizer steps asked for, skipped ones included
        self._moved = False  # whether a step of this iteration was taken
        self.optimizer = (
            ShardedOptimizer(model, config.optimizer, overlap_grad_reduce=config.parallel.overlap_grad_reduce)
            if trainable
            else None
        )
        self.model = self.optimizer.model if self.optimizer else model
        self.runner = PipelineRunner(self.model, topology, vocab)
        self.shards = model_shards(self.model, topology, vocab)
        self.shadows = self._build_shadows(config) if trainable else {}
        self._host_offload = HostOffload(topology.device)
        # 8-bit products want token counts in multiples of 16.
        tokens = 1 if config.model.fp8 == "off" else 16
        shares = may_share_prompts(config, transformer_engine=path.transformer_engine)
        padding = row_padding(topology, config.parallel, tokens=tokens, shares=shares)
        # A layer's products are about 24·H² operations a token, its causal attention 2·H·n. Context-parallel attention
        # without Transformer Engine has a mask in any case.
        masks = not path.transformer_engine and topology.cp_size == 1
        self.padding = dataclasses.replace(padding, attention_length=12 * hf_config["hidden_size"] if masks else 0)
        if self.padding.shares and path.transformer_engine:
            from megatron_srpo.mcore.te_attention import SharedPromptAttention, verify

            layers = [module for piece in model for module in piece.modules()]
            verify(next(layer for layer in layers if isinstance(layer, SharedPromptAttention)), topology.device)

    def _build_shadows(self, config: Config) -> dict[str, WeightShadow]:
        needs = config.algorithm.needs
        mode = config.teacher.mode if needs.teacher else "live"
        names = ["teacher"] if mode in ("ema", "refresh") else []
        if (needs.reference or mode in ("frozen", "trust_region")) and not self._starts_as_base:
            names.append("reference")
        return {name: WeightShadow(self.optimizer, offload=config.teacher.offload) for name in names}

    def on_host(self) -> AbstractContextManager[None]:
        """Inside this block weights, optimizer state and shadows are in host memory, and the device is free of them and
        of the gradients; they are back in place afterwards, bit for bit. Nothing of the policy may be used inside."""
        shadows = [piece for shadow in self.shadows.values() for piece in shadow.slices]
        own = [tensor for piece in self.model for tensor in [*piece.parameters(), *piece.module.buffers()]]
        return self._host_offload.on_host([*own, *shadows, *self.optimizer.tensors()], self.optimizer.gradients())

    @property
    def vocab_start(self) -> int:
        """First global token id of this rank's vocabulary shard."""
        return self.runner.vocab_start

    def weights(self, which: str) -> AbstractContextManager[None]:
        """Inside the block the model computes with the "student"'s, the "teacher"'s or the "reference"'s weights.

        The reference is the initial model; with new adapters it is the model without them. The teacher is the moving
        average, the initial model ("frozen"), or the student itself ("live" and "trust_region").
        """
        if which == "teacher" and self._teacher_config.mode == "frozen":
            which = "reference"
        if which == "reference" and self._starts_as_base:
            return lora.adapters_off(self.model)
        if which == "reference" or which in self.shadows:
            return self.shadows[which].active()
        return nullcontext()

    def score(
        self, rows: Sequence[PackedBatch], score: ScoreFunction, *, at: Sequence[torch.Tensor] | None = None,
        chosen: list[torch.Tensor] | None = None,
    ) -> list[dict[str, torch.Tensor]]:  # fmt: skip
        """Scores of every row without gradient in host memory, at the positions `at` of each row if they are given; []
        on ranks that are not on the last pipeline stage. To `chosen` are added the experts of every row, as in
        PackedBatch.experts; layers of other stages are −1."""
        self._set_training(False)
        if not rows:
            return []
        give_experts(self.model, self.topology, self.runner.config, rows, record=chosen is not None)
        results = self.runner.score(rows, score, at)
        if chosen is not None:
            chosen += chosen_experts(self.model, self.topology, self.runner.config, rows)
        forget_experts(self.model)
        return results

    def _set_training(self, mode: bool) -> None:
        """Whether dropout is on. Telling all modules again what they know would cost milliseconds a pass."""
        for piece in self.model:
            if piece.training is not mode:
                piece.train(mode)

    def train_step(self, rows: Sequence[PackedBatch], loss: LossFunction) -> StepStats:
        """One optimizer step on Σ loss(row) over all rows of all data-parallel ranks."""
        assert self.optimizer is not None
        self._set_training(True)
        self.optimizer.zero_grad()
        if self._balancing:
            tokens = self.sum_over_data(torch.tensor(float(count_tokens(rows))))
            set_balancing(self.runner.config, self._balancing, int(tokens))
        replayed = give_experts(self.model, self.topology, self.runner.config, rows)
        metrics = self.runner.train(rows, loss)
        on_policy = not self._moved  # what differs then is the engine, not the policy
        lr = learning_rate(self.steps, self._optimizer_config, self.total_steps)
        norm = self.optimizer.step(lr)
        self.steps += 1
        skipped = not math.isfinite(norm)
        if not skipped:
            self._moved = True
            if self._teacher_config.update_every == "step":
                self._update_teacher()
        reduced = self._reduce([*metrics, {"perf/memory_gib_max": Max(peak_memory_gib(self.topology.device))}])
        reduced["actor/lr"] = Mean(lr)
        reduced |= router_metrics(self.model, self.topology, self.runner.config, replayed=replayed)
        if self._replays_engine and on_policy and "moe/tokens_differ" in reduced:
            reduced["rollout_corr/experts_differ"] = reduced["moe/tokens_differ"]
        forget_experts(self.model)
        return StepStats(reduced, norm, skipped)

    def end_iteration(self, *, refresh_teacher: bool = False) -> None:
        """Update the teacher if it is updated once per iteration and a step of this iteration moved the student, or
        copy the student into it."""
        if refresh_teacher:
            self.shadows["teacher"].update(1.0)
        if self._moved and self._teacher_config.update_every == "iteration":
            self._update_teacher()
        self._moved = False

    def _update_teacher(self) -> None:
        if self._teacher_config.mode == "ema" and "teacher" in self.shadows:
            self.shadows["teacher"].update(self._teacher_config.update_rate)

    def sum_over_data(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of `values` over the samples of all ranks: each data-parallel rank's last stage contributes once, all
        ranks get the result. Empty contributions are zeros of the same shape."""
        return self._sum(values, counts=self.topology.cp_rank == 0)

    def _sum(self, values: torch.Tensor, *, counts: bool = True) -> torch.Tensor:
        mine = values.detach().double().to(self.topology.device).clone()
        if not (self.topology.is_last_stage and self.topology.tp_rank == 0 and counts):
            mine.zero_()
        if self.topology.world_size > 1:
            dist.all_reduce(mine)
        return mine

    def _reduce(self, rows: list[Metrics]) -> dict[str, Metric]:
        """The metrics of all rows of all ranks. Ranks that are not on the last pipeline stage have none of them."""
        mine = {name: type(metric) for row in rows for name, metric in row.items()}
        everywhere: list[dict[str, type[Metric]]] = [mine] * self.topology.world_size
        if self.topology.world_size > 1:
            dist.all_gather_object(everywhere, mine, group=self.topology.control_group)
        kinds = {name: kind for part in everywhere for name, kind in part.items()}
        summed = sorted(name for name, kind in kinds.items() if kind is not Max)
        maxima = sorted(name for name, kind in kinds.items() if kind is Max)
        totals, counts = dict.fromkeys(summed, 0.0), dict.fromkeys(summed, 0.0)
        largest = dict.fromkeys(maxima, -math.inf)
        metrics = [(name, metric) for row in rows for name, metric in row.items()]
        for (name, metric), (value, count) in zip(metrics, self._numbers(metrics), strict=True):
            if isinstance(metric, Max):
                largest[name] = max(largest[name], value)
            else:
                totals[name] += value
                counts[name] += count
        sums = torch.tensor([list(totals.values()), list(counts.values())], dtype=torch.float64)
        sums = self._sum(sums).cpu()  # context-parallel ranks each have their tokens' part
        tops = torch.tensor(list(largest.values()), dtype=torch.float64, device=self.topology.device)
        if self.topology.world_size > 1:
            dist.all_reduce(tops, dist.ReduceOp.MAX)
        result: dict[str, Metric] = {}
        for name, total, count in zip(summed, *sums.tolist(), strict=True):
            if kinds[name] is Total:
                result[name] = Total(total)
            elif count > 0:
                result[name] = Mean(total / count)
        return result | {name: Max(top) for name, top in zip(maxima, tops.tolist(), strict=True) if math.isfinite(top)}

    def _numbers(self, metrics: Sequence[tuple[str, Metric]]) -> list[tuple[float, float]]:
        """The value and the count of each, 0 where it has none. The device is waited for once."""
        pairs = [(m.total, m.count) if isinstance(m, Mean) else (m.value, 0.0) for _, m in metrics]
        tensors = [v for pair in pairs for v in pair if isinstance(v, torch.Tensor)]
        tensors = [v.detach().to(self.topology.device, torch.float64) for v in tensors]
        moved = iter(torch.stack(tensors).tolist() if tensors else [])
        flat = [next(moved) if isinstance(v, torch.Tensor) else v for pair in pairs for v in pair]
        return list(zip(flat[::2], flat[1::2], strict=True))
