"""What the planner says of a job: python -m slurm.plan GPU NODES ROLLOUT_NODES RANKS CONFIG… [--section.key VALUE …].

GPU is a kind that the planner knows, like h100; RANKS are those of a node. Memory and time are predictions.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from megatron_srpo.config import Config, contradictions, listed, load_config
from megatron_srpo.core import exit_codes
from megatron_srpo.core.errors import UserError
from megatron_srpo.plan import (
    Architecture,
    Layout,
    evaluate,
    machine_of,
    read_architecture,
    shipped_if_absent,
)
from megatron_srpo.plan.configuration import layout_of, own_engine_gpus, workload_of
from megatron_srpo.plan.hardware import GIB
from slurm.commands import ENGINE_MEMORY, MEMORY
from slurm.job import files_and_overrides


def main(arguments: Sequence[str]) -> int:
    """Prints; exit_codes.MISTAKE if the trainer would refuse the configuration."""
    gpu, nodes, rollout_nodes, ranks, *rest = arguments
    files, overrides = files_and_overrides(rest)
    try:
        settings = load_config(files, overrides)
    except UserError as error:
        print(error)
        return exit_codes.MISTAKE
    for line in absent(settings):
        print(line)
    servers = int(rollout_nodes) * int(ranks)
    own = 0 if servers else own_engine_gpus(settings)  # on GPUs that are not the job's training ranks
    layout = layout_of(settings, int(nodes) * int(ranks) + own, servers + own)
    if servers and not any(MEMORY in part for part in overrides):  # as commands.serve_step
        layout = dataclasses.replace(layout, server_memory=float(ENGINE_MEMORY))
    try:
        arch, hf = read_architecture(shipped_if_absent(settings.model.path))
        problems = contradictions(settings, hf, layout.training_gpus)
        if problems:
            print(listed(f"{' + '.join(files)} on {layout.training_gpus} ranks", problems))
            return exit_codes.MISTAKE
        print("\n".join(lines(settings, arch, layout, gpu)))
    except UserError as error:  # a model or a GPU that is not known here
        print(f"no plan: {error}")
    return exit_codes.DONE


def absent(config: Config) -> list[str]:
    """A line for each file or folder of the configuration that is not there: the job would end with exit code 2."""
    data = {"data.train": config.data.train, "data.test": config.data.test}
    given = {name: [value] if isinstance(value, str) else value for name, value in data.items()}
    given["model.path"] = [config.model.path]
    missing = [(name, path) for name, paths in given.items() for path in paths if not Path(path).expanduser().exists()]
    return [f"not there: {name} = {path}" for name, path in missing]


def lines(config: Config, arch: Architecture, layout: Layout, gpu: str) -> Iterator[str]:
    """Memory and time of the configuration on such GPUs, in words. Raises UserError."""
    found = evaluate(arch, layout, machine_of(gpu), workload_of(config), logits_mib=config.train.logits_memory_mib)
    yield f"plan (a prediction): {arch.name} on {layout.gpus} {gpu}, {layout.name()}"
    for role, memory in (("a training GPU", found.memory), ("an engine's GPU", found.engine)):
        if memory is not None:
            verdict = "fits" if memory.fits else "; ".join(["DOES NOT FIT", *memory.notes])
            yield f"memory of {role}, GiB: {_sum(memory.lines, GIB)} of {memory.limit / GIB:.1f}: {verdict}"
    phases = ", ".join(f"{name} {size / GIB:.1f}" for name, size in found.memory.phases.items())
    margin = (found.memory.limit - found.memory.total) / GIB
    yield f"a training GPU by phase, GiB: {phases}; margin {margin:.1f}"
    host = [f"{name} {size / GIB:.0f}" for name, size in found.memory.host.items() if size / GIB >= 0.5]
    yield f"a node's host memory, GiB: {', '.join(host)}"
    if found.time is not None:
        yield f"an iteration, s: {_sum(found.time.lines, 1)}"


def _sum(parts: Mapping[str, float], unit: float) -> str:
    shown = [f"{name} {value / unit:.1f}" for name, value in parts.items() if value / unit >= 0.05]
    return f"{' + '.join(shown)} = {sum(parts.values()) / unit:.1f}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
