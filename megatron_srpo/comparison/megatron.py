"""Megatron: the trainer's own policy at any layout, from the Hugging Face folder or from a checkpoint."""

from __future__ import annotations

import os
import socket
from array import array
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

from megatron_srpo.batching.rows import pack_rows
from megatron_srpo.bridge import load_hf_weights, read_config
from megatron_srpo.comparison.trace import Trace
from megatron_srpo.config import Config
from megatron_srpo.core.records import Padding, Row, Sample, Stream
from megatron_srpo.core.tensors import HeadInput, PackedBatch

if TYPE_CHECKING:
    from megatron_srpo.mcore.policy import Policy


def policy_traces(
    hf_dir: Path, prompts: list[list[int]], config: Config, checkpoint: Path | None
) -> list[Trace] | None:
    """A trace of each prompt on the driver, None on other ranks. All ranks of torchrun call it."""
    from megatron_srpo.mcore import checkpoint as checkpoints
    from megatron_srpo.mcore import groups
    from megatron_srpo.mcore.control import Control
    from megatron_srpo.mcore.device import choose_device
    from megatron_srpo.mcore.policy import Policy

    _alone_if_without_torchrun()
    path = choose_device(config.run.device, groups.local_rank())
    topology = groups.initialize(config.parallel, path, seed=0, timeout_minutes=60)
    try:
        hf = read_config(hf_dir)
        load = partial(load_hf_weights, hf_dir=hf_dir)
        policy = Policy(config, hf, topology, path, load, total_steps=1, trainable=False)
        if checkpoint is not None:
            checkpoints.load(policy, checkpoint)
        watch = _Watch(policy)
        parts = [watch.trace(ids, hf["vocab_size"]) for ids in prompts]
        everywhere = Control(topology).collect(parts)
        if not topology.is_driver:
            return None
        return [_joined([parts[i] for parts in everywhere]) for i in range(len(prompts))]
    finally:
        groups.shutdown()


class _Watch:
    """Keeps what every layer of this rank puts out."""

    def __init__(self, policy: Policy) -> None:
        from megatron_srpo.mcore.model import unwrap

        self._policy = policy
        self._seen: dict[int, torch.Tensor] = {}
        for gpt in map(unwrap, policy.model):
            if gpt.pre_process:
                gpt.embedding.register_forward_hook(partial(self._keep, 0))
            for layer in gpt.decoder.layers:
                layer.register_forward_hook(partial(self._keep, layer.layer_number))

    def _keep(
        self, number: int, module: torch.nn.Module, inputs: object, output: torch.Tensor | tuple[torch.Tensor, ...]
    ) -> None:
        hidden = (output[0] if isinstance(output, tuple) else output).flatten(0, 1).detach()  # [T or T/TP, 1, H]
        topology = self._policy.topology
        if self._policy.runner.config.sequence_parallel:
            parts = [torch.empty_like(hidden) for _ in range(topology.tp_size)]
            dist.all_gather(parts, hidden.contiguous(), group=topology.tp_group)
            hidden = torch.cat(parts)
        self._seen[number] = hidden.float().cpu()

    def trace(self, ids: list[int], vocab_size: int) -> tuple[dict[int, torch.Tensor], torch.Tensor | None]:
        """(hidden states by layer, log-probs) of one prompt as far as this rank has them and is the one to tell."""
        self._seen.clear()
        scored = self._policy.score(_rows(ids, self._policy.padding), partial(_logprobs, vocab_size))
        topology = self._policy.topology
        if topology.tp_rank or topology.dp_rank:
            return {}, None
        hidden = {number: states[: len(ids)] for number, states in self._seen.items()}
        return hidden, scored[0]["logprobs"][: len(ids)] if scored else None


def _logprobs(vocab_size: int, given: HeadInput, row: PackedBatch) -> dict[str, torch.Tensor]:
    """[T, V] over the whole vocabulary, on every tensor-parallel rank."""
    logits = (given.hidden @ given.weight.T).float()  # with the padding, so that all ranks have the same shape
    if given.group is not None:
        parts = [torch.empty_like(logits) for _ in range(given.group.size())]
        dist.all_gather(parts, logits, group=given.group)
        logits = torch.cat(parts, -1)
    return {"logprobs": logits[:, :vocab_size].log_softmax(-1).cpu()}


def _rows(ids: list[int], padding: Padding) -> Sequence[PackedBatch]:
    """One sequence without trained tokens, as packed rows."""
    stream = Stream(array("i", ids), array("i"), np.zeros(0, dtype=bool))
    sample = Sample("", 0, stream, np.zeros(0, dtype=np.float32), 0.0, {})
    return pack_rows([Row((0,), len(ids))] + [Row((), 0)] * (padding.rows - 1), [sample], padding=padding)


def _joined(parts: list[tuple[dict[int, torch.Tensor], torch.Tensor | None]]) -> Trace:
    hidden = {number: states for found, _ in parts for number, states in found.items()}
    (logprobs,) = (found for _, found in parts if found is not None)
    return Trace([hidden[number] for number in sorted(hidden)], logprobs)


def _alone_if_without_torchrun() -> None:
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
