"""What the comparisons with a peer share: the work, our side of it, and processes in turns."""

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
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.shared_prompts import CASES, HINT, timed_step
from benchmarks.step import machine
from benchmarks.teacher_swap import _random_model
from benchmarks.weight_sync import memory
from megatron_srpo.core.errors import UserError

STEPS = 3  # timed steps of a process, after one that is not
INSTALL = "install it as the first lines of this file say"

Way = Callable[["Work", Path], list[float]]
"""Does the work with the model of a folder, and returns the CPU-seconds of each step, the first included. TRL's contain
the handing over of rollouts and rewards, which is small."""


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

    def is_right(self, sample: int) -> bool:
        """Whether a sample of a group is right: every second one."""
        return sample % 2 == 1

    def demonstration(self, sample: int) -> int:
        """The sibling that TRL shows the teacher of a sample: the first one that is right, and not the sample."""
        return next(j for j in range(self.samples) if self.is_right(j) and j != sample)

    def teacher_prompt(self, number: int, shown: int) -> list[int]:
        """What a teacher reads before the response if it is shown this sample of the group."""
        prompts, responses = self.tokens()
        return [*prompts[number], *responses[number][shown], *[1] * HINT]

    @property
    def trl_batch(self) -> int:
        """TRL's samples in one forward pass."""
        return self.batch or self.prompts * self.samples

    @property
    def options(self) -> list[str]:
        """The command line that makes it."""
        sizes = {key.replace("batch", "trl-batch"): value for key, value in vars(self).items()}
        case = f"{sizes.pop('prompt')}:{sizes.pop('response')}"
        return [part for name, value in sizes.items() for part in (f"--{name}", str(value))] + ["--case", case]


def ours(work: Work, folder: Path, *, algorithm: dict[str, Any], train: dict[str, Any]) -> list[float]:
    """CPU-seconds of each step, the first included."""
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
        model={"path": str(folder), "dtype": "float32"}, data={"train": "unused"}, algorithm=algorithm,
        train=train, optimizer={"lr": 1e-6},
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
            logprobs = array("f", [old] * len(ids))
            rollout = Rollout(number, sample, array("i", ids), logprobs, f"{number} {sample}", "stop", 0)
            right = work.is_right(sample)
            group.attempts.append(Attempt(rollout, Reward(float(right)), right))
        made.append(group)

    def teacher_prompt(asked: Prompt, solution: str, feedback: str | None, **_: object) -> SimpleNamespace:
        return SimpleNamespace(ids=array("i", work.teacher_prompt(*map(int, solution.split()))), truncated=False)

    route(made, config.algorithm, seed=0, iteration=1, teacher_prompt=teacher_prompt)
    samples = [group.samples for group in made]
    seconds = []
    for _ in range(STEPS + 1):
        plan = plan_batch(samples, dp_size=1, max_tokens=4096, padding=policy.padding, drop_zero_gradient=True)
        mine, share = share_of([sample for group in samples for sample in group], plan, 0)
        seconds.append(timed_step(config, policy, mine, share)[1])
    return seconds


def step_clock() -> Any:
    """A callback of transformers with the CPU-seconds of each step. Added last, it counts the other callbacks too."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_begin(self, *given: Any, **named: Any) -> None:
            self.started = time.process_time()

        def on_step_end(self, *given: Any, **named: Any) -> None:
            self.seconds.append(time.process_time() - self.started)

    return Clock()


def trl_settings(work: Work, scratch: str) -> dict[str, Any]:
    """The settings that TRL's trainers have in common."""
    return {
        "output_dir": scratch, "use_cpu": True, "bf16": False, "per_device_train_batch_size": work.trl_batch,
        "gradient_accumulation_steps": work.prompts * work.samples // work.trl_batch,
        "num_generations": work.samples, "max_steps": STEPS + 1, "max_completion_length": work.response,
        "gradient_checkpointing": False, "learning_rate": 1e-6, "report_to": "none", "save_strategy": "no",
        "logging_strategy": "no", "disable_tqdm": True, "shuffle_dataset": False,
    }  # fmt: skip


def trl_steps(work: Work, folder: Path, trainer: Callable[..., Any], prepare: Callable[[Any], None]) -> list[float]:
    """Train with one of TRL's trainers, which `prepare` changes before. Prompts are given as numbers."""
    from datasets import Dataset

    from tests.tiny_models import tiny_tokenizer

    rows = Dataset.from_list([{"prompt": str(number)} for number in range(work.prompts)] * (STEPS + 1))

    def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        """The samples of a batch come group after group."""
        return [float(work.is_right(place % work.samples)) for place in range(len(prompts))]

    made = trainer(str(folder), reward_funcs=reward, train_dataset=rows, processing_class=tiny_tokenizer())
    prepare(made)
    clock = step_clock()
    made.add_callback(clock)
    made.train()
    return clock.seconds


def measure(work: Work, steps: Way) -> dict[str, float]:
    """Median CPU-seconds of a step here, and the peak memory of this process in MiB."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        _random_model(folder, hidden=work.hidden, layers=work.layers, vocabulary=work.vocabulary, dtype="float32")
        Path("/proc/self/clear_refs").write_text("5")
        seconds = steps(work, folder)
    return {"seconds": statistics.median(seconds[1:]), "peak": memory("VmHWM") / 2**20}


def in_turns(module: str, works: Sequence[Work], forms: Sequence[str], repeats: int) -> None:
    """Each form in a process of its own, in turns; a table of ratios to the first form, TRL, a row printed as it
    comes."""
    if importlib.util.find_spec("trl") is None:
        raise UserError(f"trl is not installed: {INSTALL}")
    table = Table(
        "prompt : response", "TRL CPU s", *(f"{one} ÷ TRL" for one in forms[1:]), *(f"{one}, MiB" for one in forms)
    )
    for work in works:
        found: dict[str, list[dict[str, float]]] = {one: [] for one in forms}
        for _ in range(repeats):
            for one, results in found.items():
                command = [sys.executable, "-m", module, *work.options, "--form", one]
                output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                results.append(json.loads(output.rpartition("RESULT")[2]))
        seconds, peak = (
            {one: statistics.median(result[key] for result in results) for one, results in found.items()}
            for key in ("seconds", "peak")
        )
        ratios = [f"{seconds[one] / seconds[forms[0]]:.2f}" for one in forms[1:]]
        name = f"{work.prompt} : {work.response}"
        table.add_row(name, f"{seconds[forms[0]]:.2f}", *ratios, *(f"{peak[one]:,.0f}" for one in forms))
        Console().print(f"{name}: {', '.join(ratios)} of TRL's CPU-seconds ({', '.join(forms[1:])})")
    prompts, samples = works[0].prompts, works[0].samples
    Console().print(f"{machine()}; {prompts} prompts × {samples} responses; medians of {repeats} processes in turns")
    Console(width=140).print(table)


def command(module: str, trl: Way, forms: dict[str, Way]) -> Callable[..., None]:
    """The command line of a comparison: TRL, and our `forms`."""
    ways = {"trl": trl, **forms}

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
        sizes = {"hidden": hidden, "layers": layers, "vocabulary": vocabulary, "prompts": prompts, "samples": samples}
        pairs = [map(int, one.split(":")) for one in case or CASES]
        works = [Work(**sizes, prompt=prompt, response=response, batch=trl_batch) for prompt, response in pairs]
        if form:
            print("RESULT", json.dumps(measure(works[0], ways[form])))
        else:
            in_turns(module, works, list(ways), repeats)

    return main
