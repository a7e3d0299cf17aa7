"""What loads a publish into a worker: whole models, or adapters alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from megatron_srpo.config import LoraConfig
from megatron_srpo.rollout.vllm.adapter_loader import AdapterLoader
from megatron_srpo.rollout.vllm.weight_loader import WeightLoader

if TYPE_CHECKING:
    from vllm.config import VllmConfig

AnyLoader = WeightLoader | AdapterLoader


def make_loader(model: torch.nn.Module, vllm_config: VllmConfig, adapters: LoraConfig | None) -> AnyLoader:
    """The loader of a worker whose publishes are whole models, or these adapters."""
    return WeightLoader(model, vllm_config) if adapters is None else AdapterLoader(model, vllm_config, adapters)
