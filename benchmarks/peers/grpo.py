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

import dataclasses
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.shared_prompts import CASES, timed_step
from benchmarks.step import machine
from benchmarks.teacher_swap import _random_model
from benchmarks.weight_sync import memory
from megatron_srpo.core.errors import UserError

FORMS = ("trl", "unshared", "shared")
STEPS = 3  # timed steps of a process, after one that is not


@dataclasses.dataclass(frozen=True)
class Work:
    """What both sides do."""

    hidden: int
    layers: int
    vocabulary: int
    prompts: int
    samples: int
    prompt: int
    response: int
    batch: int  # TRL's samples in one forward pass; 0: all

    def tokens(self) -> tuple[list[list[int]], list[list[list[int]]]]:
        """The prompts, and each one's responses."""
        rng = np.random.default_rng(0)
        prompts = rng.integers(5, self.vocabulary, (self.prompts, self.prompt)).tolist()
        responses = rng.integers(5, self.vocabulary, (self.prompts, self.samples, self.response)).tolist()
        return prompts, responses


def ours(work: Work, folder: Path, *, shares: bool) -> list[float]:
    """CPU-seconds of each step, the first included."""
    from array import array

    from megatron_srpo.algorithms.routing import route
    from megatron_srpo.batching import plan_batch, share_of
    from megatron_srpo.bridge import load_weights, read_config
    from megatron_srpo.config import Config
    from megatron_srpo.core.records import Attempt, Group, Prompt, Reward, Rollout
    from megatron_srpo.mcore import groups
    from megatron_srpo.mcore.device import choose_device
    from megatron_srpo.mcore.policy import Policy
    from megatron_srpo.run.cli import run_alone

    run_alone()
    config = Config(
        model={"path": str(folder), "dtype": "float32"}, data={"train": "unused"}, algorithm={"name": "grpo"},
        train={"share_prompts": shares}, optimizer={"lr": 1e-6},
    )  # fmt: skip
    path = choose_device("cpu", 0)
    topology = groups.initialize(config.parallel, path, seed=1, timeout_minutes=5)
    policy = Policy(
        config, read_config(folder), topology, path,
        lambda shards: load_weights(shards, folder, config.lora), total_steps=100,
    )  # fmt: skip
    made, old = [], -float(np.log(work.vocabulary))
    for number, (prompt, responses) in enumerate(zip(*work.tokens(), strict=True)):
        group = Group(Prompt(f"train:{number}", (), prompt, "", "exact"), [])
        for sample, ids in enumerate(responses):
            rollout = Rollout(
                number, sample, array("i", ids), array("f", [old] * len(ids)), "", "stop", 0
            )  # fmt: skip
            group.attempts.append(Attempt(rollout, Reward(float(sample % 2)), sample % 2 == 1))
        made.append(group)
    route(made, config.algorithm, seed=0, iteration=1, teacher_prompt=lambda *given: None)
    samples = [group.samples for group in made]
    seconds = []
    for _ in range(STEPS + 1):
        plan = plan_batch(samples, dp_size=1, max_tokens=4096, padding=policy.padding, drop_zero_gradient=True)
        mine, share = share_of([sample for group in samples for sample in group], plan, 0)
        seconds.append(timed_step(config, policy, mine, share)[1])
    return seconds


def trl(work: Work, folder: Path) -> list[float]:
    """CPU-seconds of each step, the first included. They contain the handing over of rollouts and rewards, which is
    small."""
    from datasets import Dataset
    from transformers import TrainerCallback
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

    def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return [float(place % work.samples % 2) for place in range(len(prompts))]

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_begin(self, *given: Any, **named: Any) -> None:
            self.started = time.process_time()

        def on_step_end(self, *given: Any, **named: Any) -> None:
            self.seconds.append(time.process_time() - self.started)

    clock, whole = Clock(), work.prompts * work.samples
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
            str(folder), reward_funcs=reward, args=settings, train_dataset=rows, processing_class=tiny_tokenizer(),
            callbacks=[clock], rollout_func=rollout,
        )  # fmt: skip
        trainer.train()
    return clock.seconds


def measure(work: Work, form: str) -> dict[str, float]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        _random_model(folder, hidden=work.hidden, layers=work.layers, vocabulary=work.vocabulary, dtype="float32")
        Path("/proc/self/clear_refs").write_text("5")
        seconds = trl(work, folder) if form == "trl" else ours(work, folder, shares=form == "shared")
    return {"seconds": statistics.median(seconds[1:]), "peak": memory("VmHWM") / 2**20}


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
    if form:
        prompt, response = map(int, (case or CASES)[0].split(":"))
        work = Work(hidden, layers, vocabulary, prompts, samples, prompt, response, trl_batch)
        print("RESULT", json.dumps(measure(work, form)))
        return
    if importlib.util.find_spec("trl") is None:
        raise UserError(f"trl is not installed: {__doc__.splitlines()[2].strip()}")
    table = Table(
        "prompt : response", "TRL CPU s", "ours, unshared ÷ TRL", "ours ÷ TRL", "TRL MiB", "ours, unshared", "ours"
    )
    sizes = {
        "hidden": hidden,
        "layers": layers,
        "vocabulary": vocabulary,
        "prompts": prompts,
        "samples": samples,
        "trl-batch": trl_batch,
    }
    options = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    for name in case or CASES:
        found: dict[str, list[dict[str, float]]] = {one: [] for one in FORMS}
        for _ in range(repeats):
            for one, results in found.items():
                command = [sys.executable, "-m", "benchmarks.peers.grpo", *options, "--case", name, "--form", one]
                output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                results.append(json.loads(output.rpartition("RESULT")[2]))
        seconds, peak = (
            {one: statistics.median(result[key] for result in results) for one, results in found.items()}
            for key in ("seconds", "peak")
        )
        table.add_row(
            name, f"{seconds['trl']:.2f}", *(f"{seconds[one] / seconds['trl']:.2f}" for one in FORMS[1:]),
            *(f"{peak[one]:,.0f}" for one in FORMS),
        )  # fmt: skip
        Console().print(f"{name}: {seconds['shared'] / seconds['trl']:.2f} of TRL's CPU-seconds")
    Console().print(f"{machine()}; {prompts} prompts × {samples} responses; medians of {repeats} processes in turns")
    Console(width=140).print(table)


if __name__ == "__main__":
    typer.run(main)
