"""vLLM, in a process of its own: its groups, threads and memory stay out of the trainer's."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from megatron_srpo.comparison.trace import Trace
from megatron_srpo.core.errors import UserError

WORKER = "megatron_srpo.rollout.prompt_trace"
TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")


def engine_traces(hf_dir: Path, prompts: list[list[int]], dtype: str, device: str) -> list[Trace]:
    """A trace of each prompt, with log-probs of the likeliest next tokens. Raises UserError with vLLM's reason."""
    alone = {name: value for name, value in os.environ.items() if name not in TORCHRUN and "ELASTIC" not in name}
    with tempfile.TemporaryDirectory() as folder:
        asked, told = Path(folder, "asked.pt"), Path(folder, "told.pt")
        torch.save({"hf_dir": str(hf_dir), "prompts": prompts, "dtype": dtype, "device": device}, asked)
        done = subprocess.run([sys.executable, "-m", WORKER, asked, told], env=alone, capture_output=True, text=True)
        if done.returncode != 0:
            last = "\n".join(done.stderr.strip().splitlines()[-5:])
            raise UserError(f"vLLM did not run on {hf_dir}; leave it out with --no-vllm.\n{last}")
        return [Trace(**fields) for fields in torch.load(told, weights_only=True)]
