"""The plan command: a search over layouts, a configuration of the best one, or a check of a given configuration."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_srpo.config import LoraConfig
from megatron_srpo.core.errors import UserError
from megatron_srpo.core.json_types import read_weight_map
from megatron_srpo.core.quiet import quiet_libraries
from megatron_srpo.plan import (
    Architecture,
    Layout,
    Machine,
    Workload,
    machine_of,
    read_architecture,
    search,
    shipped_if_absent,
)
from megatron_srpo.plan.configuration import as_toml, configuration
from megatron_srpo.plan.report import as_json, assumptions, show
from megatron_srpo.plan.search import Found, fewest_gpus

ENOUGH = 1.3  # half of the GPUs are enough if an iteration takes less than this many times as long
Tensors = dict[str, tuple[int, ...]]  # exported tensors of a stage: Hugging Face name → shape


def plan(
    model: str, gpus: int, gpu: str, workload: Workload, *, calibration: Path | None, top: int, write: Path | None,
    json_output: bool, lora_rank: int = 0,
) -> int:  # fmt: skip
    """Search, print, and write the best layout's configuration. Returns 0, or 1 if no layout fits."""
    arch, hf = read_architecture(model)
    machine = machine_of(gpu, calibration)
    _check(arch.max_positions, workload)
    if write is not None and (write.is_dir() or not write.parent.is_dir()):
        raise UserError(f"plan: --write {write}: expected a file's name in a folder that exists")
    if write is not None and write.exists():
        raise UserError(f"plan: {write} exists and is not replaced: remove it, or --write another")
    lora = LoraConfig(rank=lora_rank, targets=["attention"] if arch.experts else ["attention", "mlp"])
    found = search(arch, gpus, machine, workload, show=top, lora=lora)
    if json_output:
        print(json.dumps(as_json(found, arch, machine, workload), indent=1))
    else:
        show(found, arch, machine, workload, _console())
    if not json_output:
        for line in _advice(found, arch, gpus, machine, workload, lora):
            print(line)
    if not found.best:
        return 1
    if write is not None:
        best = found.best[0]
        path = model if Path(model).expanduser().is_dir() else f"runs/models/{model}"
        configuration(best.layout, workload, path, hf)  # raises here what the trainer would refuse later
        notes = [
            f"{arch.name} on {gpus} {machine.name}: {best.layout.name()}. Written by python -m megatron_srpo plan.",
            f"Start {best.layout.training_gpus} ranks. Predicted: {best.step_seconds:.1f} s an iteration, "
            f"{best.memory.total / 2**30:.0f} of {best.memory.limit / 2**30:.0f} GiB a GPU.",
            *([] if best.layout.colocated else [f"Engines: {_engine_nodes(best.layout, machine)}"]),
            *assumptions(machine, workload),
            "Set data.train, data.kind and the learning rate yourself.",
        ]
        write.write_text(as_toml(best.layout, workload, path, notes), encoding="utf-8")
        if not json_output:
            print(f"wrote {write}")
    return 0


def _advice(
    found: Found, arch: Architecture, gpus: int, machine: Machine, workload: Workload, lora: LoraConfig
) -> Iterator[str]:
    """What would fit if nothing does, and whether half of the GPUs would be enough."""
    if not found.best:
        fits = fewest_gpus(arch, gpus, machine, workload, lora)
        if fits is not None:
            yield f"It fits on {fits.layout.gpus} GPUs: {fits.layout.name()}, {fits.step_seconds:.0f} s an iteration."
        shorter = dataclasses.replace(
            workload, response_max=workload.response_max // 2, teacher_prompt_max=workload.teacher_prompt_max // 2,
            response_mean=min(workload.response_mean, workload.response_max // 2),
        )  # fmt: skip
        if search(arch, gpus, machine, shorter, show=1, lora=lora).best:
            yield (
                f"On {gpus} GPUs it fits with --response-max {shorter.response_max} --teacher-prompt-max "
                f"{shorter.teacher_prompt_max}."
            )
        return
    half = search(arch, gpus // 2, machine, workload, show=1, lora=lora).best if gpus >= 2 else []
    if half and half[0].step_seconds < ENOUGH * found.best[0].step_seconds:
        yield (
            f"{gpus // 2} GPUs are enough: an iteration takes {half[0].step_seconds:.1f} s there "
            f"({half[0].layout.name()}), and {found.best[0].step_seconds:.1f} s on {gpus} GPUs."
        )


def _engine_nodes(layout: Layout, machine: Machine) -> str:
    nodes = -(-layout.engine_gpus // machine.node)
    return (
        f"{layout.engines} servers on GPUs of their own. To run them on the last nodes of a Slurm job, add "
        f"--rollout-nodes {nodes} after the batch script's name; without it rank 0 starts them on its own node."
    )


def _console() -> Console:
    """As wide as the terminal; wide enough for the tables if the output is no terminal."""
    return Console() if sys.stdout.isatty() else Console(width=140)


def _check(positions: int, workload: Workload) -> None:
    """UserError for a workload that cannot be, or that is longer than the model's `positions`."""
    if not 0 <= workload.distilled <= 1:
        raise UserError(f"plan: --distilled {workload.distilled}: expected a share, from 0 to 1")
    if workload.prompts % workload.steps:
        raise UserError(
            f"plan: --steps {workload.steps} of --batch {workload.prompts} prompts: expected a divisor, because every "
            "optimizer step takes the same number of prompts"
        )
    if workload.longest_row > positions:
        raise UserError(
            f"plan: the longest sequence has {workload.longest_row} tokens (--prompt-max, --teacher-prompt-max, "
            f"--response-max), but the model has {positions} positions: shorten one of them"
        )
    if workload.response_mean > workload.response_max or workload.prompt_mean > workload.prompt_max:
        raise UserError("plan: a mean length is above its maximum: lower --response-mean or --prompt-mean")


# ---- the check of a configuration ------------------------------------------------------------------------------------


def check(files: Sequence[Path], gpus: int, overrides: list[str], model: str | None) -> int:
    """Build every distinct rank of a configuration on the meta device, and compare the parameters with config.json.

    Prints a table; returns 0. UserError if they differ, or for a configuration that the trainer would refuse.
    """
    from megatron_srpo.config import contradictions, listed, load_config

    config, shown = load_config(files, overrides), " + ".join(map(str, files))
    name = shipped_if_absent(config.model.path)
    if model is None and name != config.model.path:
        print(f"{config.model.path} does not exist: using the shipped numbers of {name}")
    elif model is not None and Path(model).name != Path(config.model.path).name:
        print(f"note: {shown} trains {config.model.path}, but its ranks are built for {model}")
    arch, hf = read_architecture(model or name)
    problems = contradictions(config, hf, gpus)
    if problems:
        raise UserError(listed(f"{shown} on {gpus} GPUs", problems))
    quiet_libraries()
    from megatron_srpo.bridge.inventory import stage_inventory
    from megatron_srpo.mcore.meta_model import meta_ranks

    console = _console()
    stages: dict[int, Tensors] = {}
    layers: list[list[int]] = []  # by stage
    table = Table(title=f"{arch.name} on {gpus} GPUs, each distinct rank built on the meta device")
    columns = ("rank", "stage", "layers", "parameters", "gradients MiB", "gathered MiB", "sent on MiB",
               "publish buckets", "largest MiB")  # fmt: skip
    for column in columns:
        table.add_column(column, justify="right")
    itemsize = 2 if config.model.dtype == "bfloat16" else 4
    row = config.train.max_tokens_per_gpu * arch.hidden * itemsize
    tensor_split = config.parallel.tensor_model_parallel_size if config.parallel.sequence_parallel else 1
    sent = row / tensor_split if config.parallel.pipeline_model_parallel_size > 1 else 0
    for built in meta_ranks(config, hf, gpus):
        found = stage_inventory(built.shards, hf)
        count = sum(parameter.numel() for parameter in built.shards.parameters.values())
        trained = sum(factor.numel() for factor in built.shards.adapters.values()) if config.lora.rank else count
        if stages.setdefault(built.stage, found.tensors) != found.tensors:
            raise UserError(f"plan: two ranks of pipeline stage {built.stage} would export different tensors")
        if len(layers) == built.stage:
            layers.append(built.layers)
        table.add_row(
            str(built.rank), str(built.stage), _span(built.layers), f"{count:,}", f"{4 * trained / 2**20:,.0f}",
            f"{itemsize * trained / 2**20:,.0f}", f"{sent / 2**20:,.1f}", str(len(found.buckets)),
            f"{max(found.buckets) / 2**20:,.0f}",
        )  # fmt: skip
    console.print(table)
    for line in _agreement(stages, layers, arch, config.model.path):
        console.print(line, highlight=False)
    return 0


def _span(layers: list[int]) -> str:
    """Layer numbers as ranges: 0–8, 18–26."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][1] == layer - 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(f"{first}–{last}" if first < last else str(first) for first, last in runs)


def _agreement(stages: dict[int, Tensors], layers: list[list[int]], arch: Architecture, folder: str) -> Iterator[str]:
    """A line for every fact in which the ranks agree with the model's description; UserError for one that differs."""
    tensors: Tensors = {}
    for exported in stages.values():
        twice = sorted(tensors.keys() & exported.keys())
        if twice:
            raise UserError(f"plan: {twice[0]} and {len(twice) - 1} others would be exported by two stages")
        tensors |= exported
    if sorted(number for part in layers for number in part) != list(range(arch.layers)):
        raise UserError(f"plan: the stages have layers {layers}, expected 0 to {arch.layers - 1} once each")
    yield f"layers: {arch.layers}, each on one stage"
    count = sum(math.prod(shape) for shape in tensors.values())
    if count != arch.parameters:
        raise UserError(
            f"plan: all ranks together export {count:,} parameters, config.json implies {arch.parameters:,}"
        )
    yield f"parameters: {count:,} exported, as config.json implies"
    index = Path(folder).expanduser() / "model.safetensors.index.json"
    if index.is_file():
        named = set(read_weight_map(index))
        if named != set(tensors):
            odd = sorted(named ^ set(tensors))
            raise UserError(f"plan: {len(odd)} names differ between {index} and the export, first {odd[0]}")
        yield f"tensors: {len(tensors):,}, the names of {index.name}"
    else:
        yield f"tensors: {len(tensors):,} for the engines (their names are not checked: {index.name} does not exist)"
