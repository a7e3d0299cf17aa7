"""Hidden states and log-probs of prompts as vLLM computes them. Runs as a process: `python -m … asked.pt told.pt`."""

from __future__ import annotations

import sys
from typing import Any

import torch

TOP = 20  # log-probs a position, vLLM's own limit


def main(asked: str, told: str) -> int:
    """Read {hf_dir, prompts, dtype, device}; write a list of {hidden, ids, logprobs} (comparison.trace.Trace)."""
    given = torch.load(asked, weights_only=True)
    from megatron_srpo.rollout.environment import prepare_environment

    prepare_environment(given["device"])
    from megatron_srpo.config import RolloutConfig
    from megatron_srpo.rollout.vllm_engine import EngineSettings, start_engine, stop_engine

    longest = max(map(len, given["prompts"]))
    rollout = RolloutConfig(enforce_eager=True, max_num_seqs=1, cpu_kv_cache_gib=0.25)
    llm = start_engine(
        EngineSettings(given["hf_dir"], given["hf_dir"], given["dtype"], rollout, longest + 1, 0, given["device"], "")
    )
    try:
        torch.save([_trace(llm, ids) for ids in given["prompts"]], told)
    finally:
        stop_engine(llm)
    return 0


def _trace(llm: Any, ids: list[int]) -> dict[str, Any]:
    from vllm import SamplingParams

    seen: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, inputs: object, output: Any) -> None:
        if isinstance(output, tuple):  # a layer leaves the sum with the residual to the next one
            hidden, residual = output
            output = hidden if residual is None else hidden.float() + residual.float()
        seen.append(output[: len(ids)].detach().float().cpu())

    def watched(model: torch.nn.Module) -> list[Any]:
        inner = model.model
        return [module.register_forward_hook(keep) for module in (inner.embed_tokens, *inner.layers)]

    (hooks,) = llm.apply_model(watched)
    sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=TOP, logprobs=TOP, detokenize=False)
    (output,) = llm.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)
    for hook in hooks:
        hook.remove()
    positions = [*output.prompt_logprobs[1:], output.outputs[0].logprobs[0]]
    width = max(map(len, positions))
    numbers, values = torch.full((len(ids), width), -1), torch.zeros(len(ids), width)
    for row, found in enumerate(positions):
        for column, (token, entry) in enumerate(found.items()):
            numbers[row, column], values[row, column] = token, entry.logprob
    return {"hidden": seen, "ids": numbers, "logprobs": values}


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
