"""The plan command: a search over layouts, a configuration of the best one, or a rehearsal of a given configuration."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from megatron_srpo.config import UserError
from megatron_srpo.plan import Workload, machine_of, read_architecture, search
from megatron_srpo.plan.configuration import as_toml, configuration
from megatron_srpo.plan.report import as_json, assumptions, show


def plan(
    model: str, gpus: int, gpu: str, workload: Workload, *, calibration: Path | None, top: int, write: Path | None,
    json_output: bool,
) -> int:  # fmt: skip
    """Search, print, and write the best layout's configuration; returns 1 where nothing fits."""
    arch, hf = read_architecture(model)
    machine = machine_of(gpu, calibration)
    _check(arch.max_positions, gpus, workload)
    found = search(arch, gpus, machine, workload, show=top)
    if json_output:
        print(json.dumps(as_json(found, arch, machine, workload), indent=1))
    else:
        show(found, arch, machine, workload, Console())
    if not found.best:
        return 1
    if write is not None:
        best = found.best[0]
        path = model if Path(model).expanduser().is_dir() else f"runs/models/{model}"
        configuration(best.layout, workload, path, hf)  # refused here rather than by the trainer
        notes = [
            f"{arch.name} on {gpus} {machine.name}: {best.layout.name()}. Written by python -m megatron_srpo plan.",
            f"Start {best.layout.training_gpus} ranks. Predicted: {best.time.total:.1f} s an iteration, "
            f"{best.memory.total / 2**30:.0f} of {best.memory.limit / 2**30:.0f} GiB a GPU.",
            *assumptions(machine, workload),
            "data.train, data.kind and the learning rate are yours to set.",
        ]
        write.write_text(as_toml(best.layout, workload, path, notes), encoding="utf-8")
        if not json_output:
            print(f"wrote {write}")
    return 0


def _check(positions: int, gpus: int, workload: Workload) -> None:
    if gpus < 1:
        raise UserError(f"plan: --gpus {gpus}: expected at least 1")
    if workload.longest_row > positions:
        raise UserError(
            f"plan: the longest sequence has {workload.longest_row} tokens (--prompt-max, --teacher-prompt-max, "
            f"--response-max), the model ends at {positions}: shorten one of them"
        )
    if workload.response_mean > workload.response_max or workload.prompt_mean > workload.prompt_max:
        raise UserError("plan: a mean length is above its maximum: lower --response-mean or --prompt-mean")
