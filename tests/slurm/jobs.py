"""Submits the real script with tiny-model overrides, and reads what became of the job."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from tests.slurm.cluster import Cluster
from tests.tiny_models import make_tiny_model

ROOT = Path(__file__).parents[2]
TINY = {
    "run.device": "cpu", "model.dtype": "float32", "model.recompute": "none",
    "parallel.tensor_model_parallel_size": "2", "data.kind": "digit", "data.max_prompt_length": "32",
    "rollout.rollout_batch_size": "2", "rollout.n_samples_per_prompt": "4", "rollout.max_response_length": "4",
    "rollout.enforce_eager": "true", "rollout.cpu_kv_cache_gib": "0.25", "algorithm.distillation_topk": "20",
    "teacher.max_prompt_length": "128", "train.prompts_per_mini_batch": "2", "train.max_tokens_per_gpu": "256",
    "optimizer.warmup_steps": "0", "reward.workers": "1", "eval.every": "0", "checkpoint.every": "1",
    "observe.wandb": "false", "observe.tensorboard": "false", "observe.progress": "plain",
}  # fmt: skip
SITE = """
SRPO_RANKS_PER_NODE=1
SRPO_ADDRESS=127.0.0.1
SRPO_INTERFACE=lo
SRPO_MIN_DISK_GIB=0.1
SRPO_HEALTH_SECONDS=200
SRPO_SCRATCH={folder}/scratch
SRPO_LOGS={folder}/logs
OMP_NUM_THREADS=1
"""
LIMIT = 500.0  # seconds that a job may take to reach what a test waits for
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


class Inputs:
    """Model, data and site settings in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make_tiny_model(folder / "model", initializer_range=0.05)
        rows = [{"prompt": f"say {i}", "answer": "x"} for i in range(8)]
        (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "reward.py").write_text("def score(response, answer, metadata):\n    return response[:1].isdigit()\n")
        (folder / "site.env").write_text(SITE.format(folder=folder))

    def overrides(self, name: str) -> dict[str, str]:
        own = {
            "run.output_dir": str(self.folder / name),
            "model.path": str(self.folder / "model"),
            "data.train": str(self.folder / "data.jsonl"),
            "data.test": "[]",
            "reward.functions.digit": f"{self.folder}/reward.py:score",
        }
        return TINY | own


class SubmittedJob:
    """A job of slurm/srpo_qwen3_8b.sh on two nodes."""

    def __init__(
        self, cluster: Cluster, inputs: Inputs, name: str, changes: dict[str, str] | None = None, *,
        sbatch: Sequence[str] = (), site: str = "", script: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self._cluster = cluster
        self.output = inputs.folder / name
        overrides = inputs.overrides(name) | (changes or {})
        arguments = [part for key, value in overrides.items() for part in (f"--{key}", value)]
        settings = inputs.folder / f"{name}.env"
        settings.write_text((inputs.folder / "site.env").read_text() + site)
        told = cluster.run(
            "sbatch", "--parsable", "--nodes=2", "--time=60", f"--output={inputs.folder}/{name}-%j.log", *sbatch,
            f"--export=ALL,SRPO_SITE={settings}", "slurm/srpo_qwen3_8b.sh", *script, *arguments,
            cwd=ROOT,
        )  # fmt: skip
        self.id = told.strip()
        assert self.id, "sbatch did not take the job"
        self._log = inputs.folder / f"{name}-{self.id}.log"
        self.node_logs = inputs.folder / "logs" / self.id

    @property
    def log(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    @property
    def checkpoints(self) -> list[int]:
        """Iterations that are saved."""
        return sorted(int(path.name[5:]) for path in (self.output / "checkpoints").glob("step_*"))

    def iterations(self) -> list[int]:
        """The iterations of metrics.jsonl, in its order."""
        file = self.output / "metrics.jsonl"
        return [json.loads(line)["step"] for line in file.read_text().splitlines()] if file.exists() else []

    def facts(self) -> dict[str, str]:
        """What Slurm says of the job: JobState, ExitCode, Restarts, …"""
        shown = self._cluster.run("scontrol", "show", "job", self.id)
        return dict(part.split("=", 1) for part in shown.split() if "=" in part)

    def wait(self, reached: Callable[[], bool]) -> None:
        """Until `reached`; AssertionError with the logs where the job ends before, or it takes too long."""
        deadline = time.monotonic() + LIMIT
        while not reached():
            ended = self.facts()["JobState"] in ENDED
            assert (not ended or reached()) and time.monotonic() < deadline, self.report()
            time.sleep(0.2)

    def wait_for_end(self) -> int:
        """The exit code of a job that ends for good."""
        self.wait(lambda: self.facts()["JobState"] in ENDED)
        return int(self.facts()["ExitCode"].split(":")[0])

    def report(self) -> str:
        logs = [f"{path.name}:\n{path.read_text()[-3000:]}" for path in sorted(self.node_logs.glob("node-*.log"))]
        return "\n".join([str(self.facts()), self.log, *logs])

    def ask_to_stop(self) -> None:
        """What Slurm does before the time limit, by --signal=B:USR1@…"""
        self._cluster.run("scancel", "--batch", "--signal=USR1", self.id)

    def signal_steps(self, name: str) -> None:
        """A signal to every process of every step, and not to the batch script: what a preempted job gets first."""
        self._cluster.run("scancel", f"--signal={name}", self.id)

    def launchers(self, node: int) -> list[psutil.Process]:
        """The training's launcher on a node, if it runs."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            command = process.info["cmdline"] or []
            ours = command[1:3] == ["-m", "megatron_srpo.torchrun"] and str(self.output) in command
            if ours and f"--node-rank={node}" in command:
                found.append(process)
        return found

    def kill_launcher(self, node: int) -> None:
        """kill -9 of a node's launcher."""
        (launcher,) = self.launchers(node)
        launcher.kill()
