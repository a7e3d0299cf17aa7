"""Model sizes × GPU counts × response lengths → predicted step time, MFU, share of synchronisation, GPU-hours.

    python -m tools.scaling_study OUT                     # table.md, table.csv, scaling.png
    python -m tools.scaling_study OUT --model Qwen3-8B --gpus 8 --gpus 64 --gpu h200

Weak scaling by default: the batch grows with the GPUs, --prompts-per-gpu each; --prompts N holds it. Every line is the
best layout that `python -m megatron_srpo plan` finds: a prediction under its assumptions. Lines that OUT/table.csv has
are kept: delete it to search again. --measured adds points of
real runs (csv: model, gpus, gpu, response_mean, seconds, source) to table and figure.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_srpo.plan import SHIPPED, Candidate, Workload, machine_of, read_architecture, search
from megatron_srpo.plan.duration import driver_seconds
from megatron_srpo.plan.report import assumptions

COUNTS = (8, 32, 128, 512, 2048)
LENGTHS = (1000, 4000)
COLUMNS = (
    "model", "gpus", "response_mean", "rollouts", "layout", "seconds", "generate", "train", "score", "publish",
    "driver", "mfu", "train_mfu", "sync_share", "tokens_per_gpu_second", "gpu_hours",
)  # fmt: skip


def workload_of(prompts: int, response: int, iterations: int) -> Workload:
    return Workload(prompts=prompts, response_mean=response, iterations=iterations)


def line_of(candidate: Candidate, model: str, workload: Workload) -> dict[str, Any]:
    """One row of the table; seconds, and shares of 1."""
    seconds, layout = candidate.time.lines, candidate.layout
    return {
        "model": model,
        "gpus": layout.gpus,
        "response_mean": workload.response_mean,
        "rollouts": workload.rollouts,
        "layout": layout.name(),
        "seconds": candidate.time.total,
        "generate": seconds["generate"],
        "train": seconds["train"],
        "score": seconds["score"] + seconds["teacher"],
        "publish": seconds["publish"],
        "driver": seconds["driver"],
        "mfu": candidate.mfu,
        "train_mfu": candidate.train_mfu,
        "sync_share": candidate.sync_share,
        "tokens_per_gpu_second": candidate.tokens_per_second / layout.gpus,
        "gpu_hours": candidate.gpu_hours(workload.iterations),
    }


def markdown(lines: list[dict[str, Any]]) -> str:
    """The table for docs/scaling.md."""
    heads = ("model", "GPUs", "mean response", "rollouts", "layout", "s / iteration", "generate", "train", "score",
             "publish", "driver", "MFU", "train MFU", "sync", "tokens/s/GPU", "GPU-hours")  # fmt: skip
    rows = ["| " + " | ".join(heads) + " |", "|---|" + "--:|" * 3 + "---|" + "--:|" * 11]
    for line in lines:
        if "layout" not in line:
            rows.append(
                f"| {line['model']} | {line['gpus']:,} | {line['response_mean']:,} | | {line['why']} |" + " |" * 11
            )
            continue
        cells = [
            line["model"],
            f"{line['gpus']:,}",
            f"{line['response_mean']:,}",
            f"{line['rollouts']:,}",
            line["layout"],
        ]
        cells += [f"{line[name]:.1f}" for name in ("seconds", "generate", "train", "score", "publish", "driver")]
        cells += [f"{line[name]:.1%}" for name in ("mfu", "train_mfu", "sync_share")]
        cells += [f"{line['tokens_per_gpu_second']:,.0f}", f"{line['gpu_hours']:,.0f}"]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def draw(lines: list[dict[str, Any]], points: list[dict[str, str]], gpu: str, target: Path) -> None:
    """Step time, MFU, share of synchronisation and tokens a GPU and second over GPUs, a curve a model; crosses are
    measured."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = (("seconds", "s / iteration"), ("mfu", "MFU of the iteration"), ("sync_share", "share of synchronisation"),
              ("tokens_per_gpu_second", "tokens / s / GPU"))  # fmt: skip
    longest = max(line["response_mean"] for line in lines)
    curves = defaultdict(list)
    for line in lines:
        if "layout" in line and line["response_mean"] == longest:
            curves[line["model"]].append(line)
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    for axis, (name, title) in zip(axes.flat, panels, strict=True):
        for model, found in curves.items():
            axis.plot([line["gpus"] for line in found], [line[name] for line in found], marker="o", ms=3, label=model)
        axis.set_xscale("log", base=2)
        counts = sorted({line["gpus"] for found in curves.values() for line in found})
        axis.set_xticks(counts, [f"{count:,}" for count in counts])
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("GPUs")
        axis.grid(alpha=0.3)
    for point in points:
        if point["gpu"] == gpu:
            axes.flat[0].plot(float(point["gpus"]), float(point["seconds"]), "kx")
    axes.flat[0].set_yscale("log")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle(f"predicted, {gpu}, mean response {longest} tokens, batch grows with the GPUs", fontsize=11)
    figure.savefig(target, dpi=110)
    plt.close(figure)


def study(
    models: list[str], counts: list[int], lengths: list[int], gpu: str, known: dict[tuple, dict], *, per_gpu: float,
    prompts: int, iterations: int,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """A line for each combination, from `known` or searched: the best layout, or why there is none."""
    machine = machine_of(gpu)
    for model in models:
        arch, _ = read_architecture(model)
        for gpus in counts:
            for length in lengths:
                if (model, gpus, length) in known:
                    yield known[model, gpus, length]
                    continue
                workload = workload_of(prompts or max(1, round(per_gpu * gpus)), length, iterations)
                found = search(arch, gpus, machine, workload, show=1)
                place = {"model": model, "gpus": gpus, "response_mean": length}
                yield line_of(found.best[0], model, workload) if found.best else place | {"why": "nothing fits"}


def read_lines(file: Path) -> dict[tuple, dict[str, Any]]:
    """Lines of an earlier table.csv by model, GPUs and length."""
    if not file.is_file():
        return {}
    lines = {}
    for row in csv.DictReader(file.open(encoding="utf-8")):
        texts = {name: row[name] for name in ("model", "layout", "why") if row[name]}
        numbers = {name: float(value) for name, value in row.items() if value and name not in texts}
        whole = {name: int(numbers[name]) for name in ("gpus", "response_mean", "rollouts") if name in numbers}
        lines[row["model"], whole["gpus"], whole["response_mean"]] = numbers | whole | texts
    return lines


def write_lines(lines: list[dict[str, Any]], file: Path) -> None:
    with file.open("w", encoding="utf-8", newline="") as opened:
        writer = csv.DictWriter(opened, [*COLUMNS, "why"])
        writer.writeheader()
        writer.writerows(lines)


def main(
    out: Annotated[Path, typer.Argument(help="folder for table.md, table.csv, scaling.png")],
    model: Annotated[list[str] | None, typer.Option(help="a shipped name or a folder; may be repeated")] = None,
    gpus: Annotated[list[int] | None, typer.Option(help="GPU counts; may be repeated")] = None,
    response: Annotated[list[int] | None, typer.Option(help="mean response lengths; may be repeated")] = None,
    gpu: Annotated[str, typer.Option(help="which machine")] = "h100",
    prompts_per_gpu: Annotated[float, typer.Option(help="weak scaling: 4 is the paper's 32 on 8")] = 4.0,
    prompts: Annotated[int, typer.Option(help="strong scaling: prompts for any number of GPUs; 0: weak")] = 0,
    iterations: Annotated[int, typer.Option(help="of a run, for GPU-hours")] = 475,
    measured: Annotated[Path | None, typer.Option(help="csv of real runs")] = None,
) -> None:
    """Write the study."""
    out.mkdir(parents=True, exist_ok=True)
    points = list(csv.DictReader(measured.open(encoding="utf-8"))) if measured else []
    lines = []
    for line in study(
        model or [name for name in SHIPPED if name.startswith("Qwen3-")],
        gpus or list(COUNTS), response or list(LENGTHS), gpu, read_lines(out / "table.csv"),
        per_gpu=prompts_per_gpu, prompts=prompts, iterations=iterations,
    ):  # fmt: skip
        lines.append(line)
        write_lines(lines, out / "table.csv")
        print(f"{line['model']}, {line['gpus']} GPUs, {line['response_mean']} tokens: {line.get('layout')}", flush=True)
    notes = assumptions(machine_of(gpu), workload_of(prompts or 32, lines[0]["response_mean"], iterations))
    dense, _ = read_architecture("Qwen3-8B")
    million = driver_seconds(dense, Workload(prompts=125_000, samples=8))
    text = markdown(lines) + "\n" + "\n".join(f"- {note}" for note in notes)
    text += f"\n- driver at 10⁶ rollouts an iteration of a dense model, by its measured slopes: {million:.0f} s\n"
    for point in points:
        where = f"{point['model']} on {point['gpus']} {point['gpu']}"
        text += f"- measured: {where}, {point['seconds']} s ({point['source']})\n"
    (out / "table.md").write_text(text, encoding="utf-8")
    draw(lines, points, gpu, out / "scaling.png")
    print(f"wrote {out}/table.md, table.csv, scaling.png")


if __name__ == "__main__":
    typer.run(main)
