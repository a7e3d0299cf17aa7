"""Adapters in plain float64: transformers' model with peft's adapters, in one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tests.routed_reference import load

if TYPE_CHECKING:
    from peft import PeftModel

NAMES = {
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "mlp": ["gate_proj", "up_proj", "down_proj"],
}


def make_adapter(model: Path, folder: Path, *, targets: list[str], rank: int = 4, alpha: int = 8, seed: int = 0,
                 dtype: torch.dtype = torch.float32, rslora: bool = False) -> Path:  # fmt: skip
    """Save a peft adapter with random factors, B included. peft makes the folder."""
    from peft import LoraConfig, get_peft_model

    named = [name for target in targets for name in NAMES.get(target, [target])]
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=named, task_type="CAUSAL_LM", use_rslora=rslora)
    adapted = get_peft_model(load(model, dtype), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    adapted.save_pretrained(folder)
    return folder


def load_adapted(model: Path, adapter: Path) -> PeftModel:
    """transformers' model in float64 with a trainable adapter from a folder."""
    from peft import PeftModel

    return PeftModel.from_pretrained(
        load(model), str(adapter), is_trainable=True, autocast_adapter_dtype=False
    ).eval().double()  # fmt: skip


def adapter_tensors(adapted: PeftModel, of=lambda parameter: parameter) -> dict[str, torch.Tensor]:
    """The factors, or `of` each, by our names."""
    return {
        name.removeprefix("base_model.model.").replace(".default.", "."): of(parameter)
        for name, parameter in adapted.named_parameters()
        if "lora_" in name
    }


def read_folder(folder: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """adapter_config.json and the tensors of a peft folder."""
    from safetensors.torch import load_file

    return json.loads((folder / "adapter_config.json").read_text()), load_file(folder / "adapter_model.safetensors")
