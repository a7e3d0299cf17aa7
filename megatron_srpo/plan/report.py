"""Shows the result of a search, as tables for people or as JSON for programs."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_srpo.plan.architecture import Architecture
from megatron_srpo.plan.hardware import GIB, Machine
from megatron_srpo.plan.memory import PHASES, MemoryPlan
from megatron_srpo.plan.search import Candidate, Found
from megatron_srpo.plan.workload import Workload

MISFITS = 8  # how many layouts that do not fit are shown


def as_json(found: Found, arch: Architecture, machine: Machine, workload: Workload) -> dict[str, Any]:
    """The whole result; units are bytes, seconds and FLOP/s."""
    return {
        "prediction": True,
        "model": dataclasses.asdict(arch) | {"parameters": arch.parameters},
        "machine": dataclasses.asdict(machine),
        "workload": dataclasses.asdict(workload),
        "tried": found.tried,
        "layouts": [_layout(candidate, workload) for candidate in found.best],
        "misfits": [
            {"layout": dataclasses.asdict(c.layout), "name": c.layout.name(), "why": why_not(c)} for c in found.misfits
        ],
        "impossible": dict(found.impossible),
    }


def _layout(candidate: Candidate, workload: Workload) -> dict[str, Any]:
    time, layout = candidate.predicted, candidate.layout
    return {
        "name": layout.name(),
        "layout": dataclasses.asdict(layout) | {"data": layout.data},
        "memory": _memory(candidate.memory),
        "engine_memory": _memory(candidate.engine) if candidate.engine else None,
        "seconds": time.lines | {"total": time.total},
        "rows": time.rows,
        "mfu": candidate.mfu,
        "train_mfu": candidate.train_mfu,
        "tokens_per_second": candidate.tokens_per_second,
        "sync_seconds": time.lines["publish"],
        "sync_share": candidate.sync_share,
        "gpu_hours": candidate.gpu_hours(workload.iterations),
    }


def _memory(plan: MemoryPlan) -> dict[str, Any]:
    return {
        "lines": plan.lines,
        "total": plan.total,
        "limit": plan.limit,
        "kv_cache": plan.kv_cache,
        "host_loading": plan.host_loading,
        "host_state": plan.host_state,
        "host_saving": plan.host_saving,
        "host_scores": plan.host_scores,
        "host_turns": plan.host_turns,
        "host_engines": plan.host_engines,
        "phases": plan.phases,
    }


def why_not(candidate: Candidate) -> str:
    """Why a layout does not fit: the fullest GPU with its largest parts, or what the engine lacks."""
    plans = [("a GPU", candidate.memory), *([("an engine's GPU", candidate.engine)] if candidate.engine else [])]
    for _, plan in plans:
        if plan.notes:
            return plan.notes[0]
    where, plan = max(plans, key=lambda pair: pair[1].total - pair[1].limit)
    largest = sorted(plan.lines.items(), key=lambda line: -line[1])[:3]
    parts = ", ".join(f"{name} {size / GIB:.0f}" for name, size in largest)
    return f"{where} needs {plan.total / GIB:.0f} of {plan.limit / GIB:.0f} GiB: {parts}"


def assumptions(machine: Machine, workload: Workload) -> list[str]:
    """The assumptions behind the predictions, one line each."""
    return [
        f"machine {machine.name}: {machine.flops / 1e12:.0f} TFLOP/s dense peak, {machine.memory / GIB:.1f} GiB at "
        f"{machine.bandwidth / 1e12:.2f} TB/s, {machine.link / 1e9:.0f} GB/s inside a node of {machine.node}, "
        f"{machine.network / 1e9:.0f} GB/s between nodes",
        f"reached ({machine.source}): products {machine.product_share:.0%}, attention {machine.attention_share:.0%}, "
        f"memory {machine.bandwidth_share:.0%}, links {machine.link_share:.0%}, network {machine.network_share:.0%}; "
        f"{machine.reserved / GIB:.1f} GiB reserved, {machine.fragmentation:.0%} fragmentation, "
        f"{machine.headroom:.0%} of the memory left free",
        f"an iteration: {workload.prompts} prompts × {workload.samples} responses, {workload.steps} optimizer step(s); "
        f"prompts {workload.prompt_mean} tokens, responses {workload.response_mean} on average (log-normal, "
        f"σ {workload.response_sigma}, cut at {workload.response_max}), {workload.distilled:.0%} distilled; "
        f"{workload.iterations} iterations",
    ]


def show(found: Found, arch: Architecture, machine: Machine, workload: Workload, console: Console) -> None:
    """Print tables of the best layouts with their times and memory, and why others do not fit."""
    console.print(f"{arch.name}: {arch.parameters / 1e9:.2f} B parameters. Predicted, not measured:", style="bold")
    for line in assumptions(machine, workload):
        console.print(f"  {line}", highlight=False)
    if found.best:
        for number, candidate in enumerate(found.best, 1):
            console.print(f"{number}: {candidate.layout.name()}", highlight=False)
        console.print(_summary(found.best, workload))
        console.print(
            _lines("seconds of an iteration", found.best, [c.predicted.lines for c in found.best], 1.0, ".2f")
        )
        fullest = [max(c.memory.phases, key=c.memory.phases.__getitem__) for c in found.best]
        lines = [c.memory.lines for c in found.best]
        title = "GiB of a training GPU in its fullest phase"
        console.print(_lines(title, found.best, lines, GIB, ".1f", phases=fullest))
        if any(c.engine for c in found.best):
            lines = [c.engine.lines if c.engine else {} for c in found.best]
            console.print(_lines("GiB of a GPU that only generates", found.best, lines, GIB, ".1f"))
        console.print(_phases(found.best))
        host = [c.memory.host for c in found.best]
        console.print(_lines("GiB of a node's host memory", found.best, host, GIB, ".1f", total=False))
    else:
        console.print(f"None of {found.tried} layouts fits.", style="bold")
    for candidate in found.misfits[:MISFITS]:
        console.print(f"does not fit: {candidate.layout.name()}: {why_not(candidate)}", highlight=False)
    if len(found.misfits) > MISFITS:
        console.print(f"… and {len(found.misfits) - MISFITS} other ways to split it (--json has all)", highlight=False)


def _summary(best: list[Candidate], workload: Workload) -> Table:
    table = Table(title="best layouts")
    for name in ("", "row", "s / iteration", "MFU", "train MFU", "tokens/s", "publish s", "GPU-hours"):
        table.add_column(name, justify="right")
    for number, candidate in enumerate(best, 1):
        table.add_row(
            str(number), str(candidate.layout.max_tokens), f"{candidate.step_seconds:.1f}",
            f"{candidate.mfu:.1%}", f"{candidate.train_mfu:.1%}", f"{candidate.tokens_per_second:,.0f}",
            f"{candidate.predicted.lines['publish']:.2f}", f"{candidate.gpu_hours(workload.iterations):,.0f}",
        )  # fmt: skip
    return table


def _phases(best: list[Candidate]) -> Table:
    """Memory of a training GPU in every phase, and what is left of it in the fullest one."""
    table = Table(title="GiB of a training GPU by phase")
    table.add_column("")
    for number in range(1, len(best) + 1):
        table.add_column(str(number), justify="right")
    for name in PHASES:
        table.add_row(name, *(f"{c.memory.phases[name] / GIB:.1f}" for c in best))
    limits = [f"{c.memory.limit / GIB:.1f}" for c in best]
    table.add_row("limit", *limits)
    table.add_row("margin", *(f"{(c.memory.limit - c.memory.total) / GIB:.1f}" for c in best), style="bold")
    return table


def _lines(
    title: str, best: list[Candidate], columns: list[dict[str, float]], unit: float, form: str, *, total: bool = True,
    phases: list[str] | None = None,
) -> Table:  # fmt: skip
    table = Table(title=title)
    table.add_column("")
    for number in range(1, len(best) + 1):
        table.add_column(str(number), justify="right")
    if phases:
        table.add_row("phase", *phases)
    for name in dict.fromkeys(name for column in columns for name in column):
        table.add_row(name, *(format(column.get(name, 0.0) / unit, form) for column in columns))
    if total:
        table.add_row("total", *(format(sum(column.values()) / unit, form) for column in columns), style="bold")
    return table
