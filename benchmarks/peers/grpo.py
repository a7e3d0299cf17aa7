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

import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.peers.work import STEPS, Work, in_turns, measure, ours, reward_of, step_clock, works_of

FORMS = ("trl", "unshared", "shared")


def trl(work: Work, folder: Path) -> list[float]:
    """CPU-seconds of each step, the first included. They contain the handing over of rollouts and rewards, which is
    small."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from tests.tiny_models import tiny_tokenizer

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

    clock, whole = step_clock(), work.prompts * work.samples
    batch = work.batch or whole
    with tempfile.TemporaryDirectory() as scratch:
        settings = GRPOConfig(
            output_dir=scratch, use_cpu=True, bf16=False, per_device_train_batch_size=batch,
            gradient_accumulation_steps=whole // batch,
            num_generations=work.samples, max_steps=STEPS + 1, max_completion_length=work.response,
            gradient_checkpointing=False, beta=0.0, learning_rate=1e-6, report_to="none", save_strategy="no",
            logging_strategy="no", disable_tqdm=True, shuffle_dataset=False, scale_rewards="none",
        )  # fmt: skip
        rows = Dataset.from_list([{"prompt": str(number)} for number in range(work.prompts)] * (STEPS + 1))
        trainer = GRPOTrainer(
            str(folder), reward_funcs=reward_of(work), args=settings, train_dataset=rows,
            processing_class=tiny_tokenizer(), rollout_func=rollout,
        )  # fmt: skip
        trainer.add_callback(clock)
        trainer.train()
    return clock.seconds


def main(
    hidden: int = 256,
    layers: int = 8,
    vocabulary: int = 2048,
    prompts: int = 8,
    samples: int = 8,
    repeats: int = 3,
    trl_batch: Annotated[int, typer.Option(help="TRL's samples in one forward pass. 0: all.")] = 0,
    case: Annotated[list[str] | None, typer.Option(help="PROMPT:RESPONSE, may be repeated.")] = None,
    form: Annotated[str, typer.Option(hidden=True, help="Measure this form here.")] = "",
) -> None:
    works = works_of(
        case, hidden=hidden, layers=layers, vocabulary=vocabulary, prompts=prompts, samples=samples, batch=trl_batch
    )
    if form:
        mine = partial(ours, algorithm={"name": "grpo"}, train={"share_prompts": form == "shared"})
        print("RESULT", json.dumps(measure(works[0], trl if form == "trl" else mine)))
        return
    in_turns("benchmarks.peers.grpo", works, FORMS, repeats)


if __name__ == "__main__":
    typer.run(main)
