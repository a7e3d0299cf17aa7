"""Mistral (7B v0.2 and later, Nemo, Ministral 8B saved as Mistral): Llama's decoder under another name."""

from __future__ import annotations

from dataclasses import replace

from megatron_srpo.families.llama import LLAMA, decoder_refusals
from megatron_srpo.families.shape import HfConfig


def mistral_refusals(hf: HfConfig) -> list[str]:
    """Llama's, and attention that sees a window of the sequence."""
    window = hf.get("sliding_window", 4096)  # transformers' default
    problems = decoder_refusals(hf)
    if window is not None:
        problems.append(f"sliding_window is {window}; expected null, attention inside a window is not supported")
    return problems


MISTRAL = replace(
    LLAMA,
    name="mistral",
    architectures=("MistralForCausalLM",),
    model_types=("mistral",),
    refusals=mistral_refusals,
)
