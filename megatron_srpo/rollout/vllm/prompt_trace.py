"""Hidden states and log-probs of prompts as vLLM computes them, in a process of their own.

The process keeps vLLM's process groups, threads and memory away from the caller's.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import torch

from megatron_srpo.config import RolloutConfig
from megatron_srpo.core.environment import inherited
from megatron_srpo.rollout.engine import RolloutError
from megatron_srpo.rollout.vllm.environment import ENGINE_PREFIXES, prepare_environment
from megatron_srpo.rollout.vllm.settings import EngineSettings
from megatron_srpo.rollout.vllm.start import start_engine, stop_engine

if TYPE_CHECKING:
    from vllm import LLM

TOP = 20  # log-probs for each position, vLLM's own limit


class PromptTrace(TypedDict):
    """What vLLM computed for a prompt of T tokens."""

    hidden: list[torch.Tensor]  # after the embedding and after every layer: [T, H] fp32
    ids: torch.Tensor  # [T, K] int64, the likeliest next tokens; −1 where there is none
    logprobs: torch.Tensor  # [T, K] fp32, of `ids`


def prompt_traces(hf_dir: Path, prompts: list[list[int]], dtype: str, device: str) -> list[PromptTrace]:
    """A trace of each prompt, from a new process. Raises RolloutError with vLLM's reason."""
    alone = inherited(prefixes=ENGINE_PREFIXES)
    with tempfile.TemporaryDirectory() as folder:
        question, answer = Path(folder, "question.pt"), Path(folder, "answer.pt")
        torch.save({"hf_dir": str(hf_dir), "prompts": prompts, "dtype": dtype, "device": device}, question)
        code = f"import sys; from {__name__} import main; main(*sys.argv[1:])"
        command = [sys.executable, "-c", code, str(question), str(answer)]
        done = subprocess.run(command, env=alone, capture_output=True, text=True)
        if done.returncode != 0:
            last = "\n".join(done.stderr.strip().splitlines()[-5:])
            raise RolloutError(f"vLLM did not run on {hf_dir}; leave it out with --no-vllm.\n{last}")
        return torch.load(answer, weights_only=True)


def main(question: str, answer: str) -> None:
    """Read {hf_dir, prompts, dtype, device} from one file, and write a list of PromptTrace to the other."""
    given = torch.load(question, weights_only=True)
    prepare_environment(given["device"])
    longest = max(map(len, given["prompts"]))
    rollout = RolloutConfig(enforce_eager=True, max_num_seqs=1, cpu_kv_cache_gib=0.25)
    hf_dir, dtype, device = given["hf_dir"], given["dtype"], given["device"]
    llm = start_engine(EngineSettings(hf_dir, hf_dir, dtype, rollout, longest + 1, 0, device))
    try:
        torch.save([_trace(llm, ids) for ids in given["prompts"]], answer)
    finally:
        stop_engine(llm)


def _trace(llm: LLM, ids: list[int]) -> PromptTrace:
    from vllm import SamplingParams

    seen: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, inputs: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        if isinstance(output, tuple):  # a layer leaves the sum with the residual to the next one
            hidden, residual = output
            output = hidden if residual is None else hidden.float() + residual.float()
        seen.append(output[: len(ids)].detach().float().cpu())

    def add_hooks(model: torch.nn.Module) -> list[torch.utils.hooks.RemovableHandle]:
        layers = model.get_submodule("model.layers").children()
        watched = (model.get_submodule("model.embed_tokens"), *layers)
        return [module.register_forward_hook(keep) for module in watched]

    (hooks,) = llm.apply_model(add_hooks)
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
