"""A GRPO step of ours beside TRL's: CPU-seconds and memory on the same model, prompts, responses and rewards.

    pip install --target DIR -r benchmarks/peers/requirements.txt --no-deps accelerate datasets multiprocess dill xxhash
    PYTHONPATH=DIR python -m benchmarks.peers.grpo [--case 240:16] [--samples 8] [--repeats 3]

A case is PROMPT:RESPONSE in tokens; all prompts and all responses have that length, so neither side pads. Nothing is
generated: both get the same made-up tokens, half of the responses are right. A step is one forward and backward pass
over all samples and one AdamW update, in fp32 on one thread. TRL pads the samples of a forward pass (--trl-batch); ours
packs rows of 4,096 tokens.
Each form runs in a process of its own, in turns: ours with and without shared prompts, and TRL.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import typer

from benchmarks.peers.work import Work, command, ours, trl_settings, trl_steps


def trl(work: Work, folder: Path) -> list[float]:
    from trl import GRPOConfig, GRPOTrainer

    prompts, responses = work.tokens()

    def rollout(given: list[str], trainer: Any) -> dict[str, list]:
        """The dataset names its prompts by number, each `samples` times in a row."""
        numbers = [int(text) for text in given]
        seen = {number: iter(responses[number]) for number in set(numbers)}
        return {
            "prompt_ids": [prompts[number] for number in numbers],
            "completion_ids": [next(seen[number]) for number in numbers],
            "logprobs": None,
        }

    with tempfile.TemporaryDirectory() as scratch:
        settings = GRPOConfig(**trl_settings(work, scratch), beta=0.0, scale_rewards="none")
        trainer = partial(GRPOTrainer, args=settings, rollout_func=rollout)
        return trl_steps(work, folder, trainer, lambda made: None)


grpo = partial(ours, algorithm={"name": "grpo"})
FORMS = {name: partial(grpo, train={"share_prompts": name == "shared"}) for name in ("unshared", "shared")}

if __name__ == "__main__":
    typer.run(command("benchmarks.peers.grpo", trl, FORMS))
