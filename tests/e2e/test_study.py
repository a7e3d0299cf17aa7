"""A run of the study, in a process forked from one that has imported everything, is the run of the plain command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.study.results import CONFIG, curves

ROOT = Path(__file__).parents[2]
STUDY = """
import json, sys
from dataclasses import replace
from pathlib import Path
from benchmarks.study import results, runner, tasks
folder = Path(sys.argv[1])
results.RESULTS, runner.RUNS = folder / "results", folder / "runs"
small = replace(tasks.TASKS["worksheet"], iterations=6)
task = tasks.TASKS["worksheet"] = replace(small, warm_start=replace(small.warm_start, steps=20))
prepared = task.prepare(folder / "cache")
case = results.Case("worksheet", "srpo", 3, 5e-4, {"algorithm.name": "srpo", "eval.max_prompts": 20})
found, log = runner.Runner().run(case, prepared)
print(json.dumps([prepared | dict(case.keys), found]))
"""


@pytest.mark.slow
def test_a_forked_run_equals_the_plain_command_bit_for_bit(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = {"cwd": ROOT, "env": environment, "check": True, "capture_output": True, "text": True}
    output = subprocess.run([sys.executable, "-c", STUDY, str(tmp_path)], **run).stdout
    keys, forked = json.loads(output.splitlines()[-1])
    assert not list((tmp_path / "runs").rglob("*.jsonl"))  # the result is all that is kept
    keys |= {"run.output_dir": str(tmp_path / "plain"), "run.seed": 3, "optimizer.lr": 5e-4}
    options = [part for key, value in keys.items() for part in (f"--{key}", str(value))]
    subprocess.run([sys.executable, "-m", "megatron_srpo", "train", str(CONFIG), *options], **run)
    plain = curves(tmp_path / "plain/metrics.jsonl")
    assert plain["traced"] == forked["traced"] and len(plain["traced"]["response_length/mean"]) == 6
    without_cpu = [[row[:2] + row[3:] for row in found["evaluations"]] for found in (plain, forked)]
    assert without_cpu[0] == without_cpu[1] and forked["whole_cpu_seconds"] > forked["evaluations"][-1][2] > 0
