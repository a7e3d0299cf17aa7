"""transformers: what the weights of a Hugging Face folder mean."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_srpo.comparison.trace import Trace


@torch.no_grad()
def reference_traces(hf_dir: Path, prompts: list[list[int]], dtype: torch.dtype) -> list[Trace]:
    """A trace of each prompt, computed on the CPU."""
    from transformers import AutoModelForCausalLM

    # The grouped product of experts wants rows of whole 16 bytes.
    plain = {"experts_implementation": "eager", "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=dtype, **plain).eval()
    seen: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, inputs: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        seen.append(hidden.reshape(-1, hidden.shape[-1]).float())

    for module in (model.get_input_embeddings(), *model.model.layers):
        module.register_forward_hook(keep)
    traces = []
    for ids in prompts:
        seen.clear()
        logits = model(torch.tensor([ids])).logits[0].float()
        traces.append(Trace(list(seen), logits.log_softmax(-1)))
    return traces
