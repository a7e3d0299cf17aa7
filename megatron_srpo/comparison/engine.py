"""The rollout engine's traces of prompts."""

from __future__ import annotations

from pathlib import Path

from megatron_srpo.comparison.trace import Trace
from megatron_srpo.rollout import prompt_traces


def engine_traces(hf_dir: Path, prompts: list[list[int]], dtype: str, device: str) -> list[Trace]:
    """A trace of each prompt, with log-probs of the likeliest next tokens. Raises UserError with the engine's
    reason."""
    return [Trace(**fields) for fields in prompt_traces(hf_dir, prompts, dtype, device)]
