"""A tiny job for an hour, with faults injected at random: python tools/soak.py [--minutes 60] [--seed N]

Two data-parallel ranks train under torchrun. Ranks and whole jobs are killed, signalled, paused, denied the disk;
reward workers are killed; the newest checkpoint is damaged. At the end: no process, shared-memory segment or file
descriptor is left over, memory has not grown, every checkpoint is whole, and the metrics of every iteration equal, bit
for bit, those of a run without faults, which runs at the same time. Exit code 1 if any of it fails. The report is
soak.json in --folder.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from megatron_srpo.checkpoints.folder import damage, published
from megatron_srpo.core import exit_codes
from tests import tiny_run

RANKS = 2
WARM_UP = 6  # iterations of a process that no slope is judged by
END_SECONDS = 120  # for a clean end, on a busy machine
STALL_SECONDS = 300  # without an iteration: the job hangs
REFERENCE_SECONDS = 5  # an iteration of the run without faults, at most
LARGEST_SLOPE = 0.5  # MiB an iteration
MORE_DESCRIPTORS = 4
ENDING = ("kill the job", "SIGTERM", "SIGUSR1", "SIGINT")
PASSING = ("kill a rank", "pause a rank", "kill a reward worker", "no room on the disk")
DAMAGE = ("flip a bit", "truncate")
REWARD = """
import os, zlib

def score(response, answer, metadata):
    if zlib.crc32(response.encode("utf-8", "replace")) % 61 == 0:
        os._exit(3)
    print("noise " * 100)
    return float(response[:1].isdigit())
"""


def last_step(out: Path) -> int:
    """The iteration that a run has logged last."""
    with suppress(OSError, ValueError, IndexError):
        return json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    return 0


class Job:
    """The training job, one start after the other; samples of its memory on the way."""

    def __init__(self, folder: Path, chance: random.Random, seconds: float) -> None:
        self.folder, self.out, self.chance = folder, folder / "out", chance
        self.started = time.monotonic()
        self.deadline = self.started + seconds
        self.config = prepare(folder)
        self.faults: Counter[str] = Counter()
        self.samples: dict[int, list[tuple[int, float, int]]] = {}  # process → (iteration, MiB, descriptors)
        self.family: dict[int, psutil.Process] = {}
        self.process: subprocess.Popen | None = None
        self.shared: set[Path] = set()  # memory that ranks have mapped
        self.starts = 0

    def start(self) -> None:
        self.starts += 1
        command = tiny_run.command(self.config, ranks=RANKS, launcher=("--max-restarts=1000",))
        with (self.folder / "log.txt").open("a") as log:
            self.process = subprocess.Popen(
                command, cwd=tiny_run.ROOT, stdout=log, stderr=log, start_new_session=True
            )  # fmt: skip

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def iteration(self) -> int:
        return last_step(self.out)

    def ranks(self) -> list[psutil.Process]:
        """The training processes; everything below the launcher is remembered, to be looked for at the end."""
        found = []
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                self.family[child.pid] = child
                with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                    if child.ppid() == self.process.pid and "megatron_srpo" in child.cmdline():
                        found.append(child)
        return found

    def finish_early(self, *_: object) -> None:
        """A signal handler: what has been seen so far is reported."""
        self.deadline = time.monotonic()

    def wait_for(self, iterations: int) -> None:
        """Wait until that many further iterations are logged; RuntimeError if the run makes no progress."""
        seen, moved, left = self.iteration, time.monotonic(), iterations
        while self.running and left > 0 and time.monotonic() < self.deadline:
            time.sleep(0.2)
            now = self.iteration
            if now != seen:  # a resumed run falls back: that is a move too
                left -= 1
                seen, moved = now, time.monotonic()
                self.sample(now)
            if time.monotonic() - moved > STALL_SECONDS:
                raise RuntimeError(f"no iteration for {STALL_SECONDS} s after iteration {seen}")

    def sample(self, iteration: int) -> None:
        for rank in self.ranks():
            with suppress(psutil.NoSuchProcess):
                facts = (iteration, rank.memory_info().rss / 2**20, rank.num_fds())
                self.samples.setdefault(rank.pid, []).append(facts)
            with suppress(OSError):
                areas = Path(f"/proc/{rank.pid}/maps").read_text().split()
                self.shared |= {Path(area) for area in areas if area.startswith("/dev/shm/")}

    def inject(self, fault: str) -> None:
        """Do it; the job may have ended by itself meanwhile."""
        self.faults[fault] += 1
        ranks = self.ranks()
        with suppress(psutil.NoSuchProcess, IndexError):
            if fault == "kill the job":
                psutil.Process(self.process.pid).suspend()  # it might start further ranks meanwhile
                self.ranks()
                for member in [psutil.Process(self.process.pid), *self.family.values()]:
                    with suppress(psutil.NoSuchProcess):
                        if not any("resource_tracker" in word for word in member.cmdline()):
                            member.kill()  # the resource tracker lives: it alone knows what to clean up
            elif fault == "kill a rank":
                self.chance.choice(ranks).kill()
            elif fault.startswith("SIG"):
                self.process.send_signal(getattr(signal, fault))
            elif fault == "pause a rank":
                rank = self.chance.choice(ranks)
                rank.suspend()
                time.sleep(2)
                rank.resume()
            elif fault == "kill a reward worker":
                self.chance.choice(self.chance.choice(ranks).children()).kill()
            elif fault == "no room on the disk":
                self.limit(ranks, 1000)
                time.sleep(5)
                self.limit(ranks, resource.RLIM_INFINITY)

    @staticmethod
    def limit(ranks: list[psutil.Process], size: int) -> None:
        for rank in ranks:
            rank.rlimit(psutil.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def wait_for_end(self, fault: str) -> list[str]:
        """What is wrong with how the job ended; processes that are left over among it."""
        try:
            code = self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return [f"after {fault}: no end within {END_SECONDS} s"]
        expected = {"SIGUSR1": exit_codes.REQUEUE, "SIGTERM": 143, "SIGINT": 130, "kill the job": -9}
        _, alive = psutil.wait_procs(self.family.values(), timeout=30)
        problems = [f"after {fault}: process {left.pid} is left over" for left in alive]
        self.family.clear()
        if code not in (expected[fault], 130, 143):
            problems.append(f"after {fault}: exit code {code}, expected {expected[fault]}")
        return problems

    def harm_newest(self) -> None:
        """Damage a shard of the newest checkpoint; the run has to go on from the one before."""
        found = published(self.out / "checkpoints")
        if len(found) < 2:
            return
        kind = self.chance.choice(DAMAGE)
        self.faults[kind] += 1
        shard = self.chance.choice(sorted(found[-1].glob("*.distcp")))
        data = bytearray(shard.read_bytes())
        data[self.chance.randrange(len(data))] ^= 1 << self.chance.randrange(8)
        shard.write_bytes(data if kind == "flip a bit" else data[: len(data) // 2])


def prepare(folder: Path) -> Path:
    """The tiny job with a reward that crashes on some responses and prints on all."""
    config = tiny_run.make_run(folder)
    (folder / "reward.py").write_text(REWARD)
    text = config.read_text().replace("iterations = 8", "iterations = 1000000")
    text = text.replace("every = 4", "every = 3\nkeep = 3")
    config.write_text(text)
    return config


def slope(values: list[float]) -> float:
    """Least-squares slope over 0, 1, 2 …"""
    middle, mean = (len(values) - 1) / 2, sum(values) / len(values)
    spread = sum((i - middle) ** 2 for i in range(len(values)))
    return sum((i - middle) * (value - mean) for i, value in enumerate(values)) / spread


def run_with_faults(job: Job) -> list[str]:
    """Start, disturb, start again until the deadline; what went wrong."""
    problems = []
    while time.monotonic() < job.deadline:
        job.start()
        fault = ""
        while job.running and fault not in ENDING:
            job.wait_for(job.chance.randint(5, 40))
            fault = job.chance.choice(job.chance.choice((ENDING, PASSING, PASSING, PASSING)))
            fault = fault if time.monotonic() < job.deadline else "SIGTERM"
            job.inject(fault)
        if fault not in ENDING:
            return [*problems, f"the job ended by itself with exit code {job.process.returncode}"]
        problems += job.wait_for_end(fault)
        if job.chance.random() < 0.4 and time.monotonic() + END_SECONDS < job.deadline:
            job.harm_newest()
    return problems


def judge(job: Job) -> dict:
    """Memory and descriptors of the processes that lived long enough to tell."""
    judged = [samples for samples in job.samples.values() if len(samples) >= 3 * WARM_UP]
    slopes = [slope([memory for _, memory, _ in samples[WARM_UP:]]) for samples in judged]
    growth = [samples[-1][2] - samples[WARM_UP][2] for samples in judged]
    problems = []
    if any(value > LARGEST_SLOPE for value in slopes):
        problems.append(f"memory grows by {max(slopes):.2f} MiB an iteration")
    if any(more > MORE_DESCRIPTORS for more in growth):
        problems.append(f"open file descriptors grow by {max(growth)}")
    return {
        "processes_judged": len(judged), "iterations_judged": sum(map(len, judged)),
        "mean_slope_mib_an_iteration": sum(slopes) / len(slopes) if slopes else None,
        "largest_slope_mib_an_iteration": max(slopes, default=None),
        "largest_growth_in_descriptors": max(growth, default=None), "problems": problems,
    }  # fmt: skip


def soak(folder: Path, minutes: float, seed: int) -> dict:
    """Run it all; returns the report, whose "problems" are empty if every promise held."""
    job = Job(folder, random.Random(seed), 60 * minutes)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, job.finish_early)
    reference = Reference(folder / "reference")
    try:
        problems = run_with_faults(job)
        minutes = (time.monotonic() - job.started) / 60
        problems += reference.reach(job.iteration)
    finally:
        reference.end()
    for checkpoint in published(job.out / "checkpoints"):
        problems += [f"{checkpoint.name}: {what}" for what in damage(checkpoint)]
    problems += [f"shared memory left over: {area}" for area in sorted(job.shared) if area.exists()]
    memory = judge(job)
    reached = job.iteration
    problems += memory.pop("problems") + compare(job.out, reference.out, reached)
    facts = {
        "minutes": round(minutes, 1),
        "seed": seed,
        "iterations": reached,
        "starts": job.starts,
        "faults": dict(job.faults),
    }
    return {**facts, **memory, "problems": problems}


class Reference:
    """The same job without faults, at the same time as the other one and with a lower priority."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.out = folder / "out"
        with (folder / "log.txt").open("w") as log:
            self._process = subprocess.Popen(
                tiny_run.command(prepare(folder), ranks=RANKS), cwd=tiny_run.ROOT, stdout=log, stderr=log,
                start_new_session=True, preexec_fn=lambda: os.nice(10),
            )  # fmt: skip

    def reach(self, iterations: int) -> list[str]:
        """Wait until it has done that many iterations; returns what is wrong if it does not."""
        deadline = time.monotonic() + STALL_SECONDS + REFERENCE_SECONDS * iterations
        while self._process.poll() is None and time.monotonic() < deadline:
            if last_step(self.out) >= iterations:
                return []
            time.sleep(1)
        return [f"the run without faults ended at iteration {last_step(self.out)}, or was too slow"]

    def end(self) -> None:
        """Stop it as a user does."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)


def compare(out: Path, reference: Path, iterations: int) -> list[str]:
    """What the metrics of both runs differ in, up to this iteration."""
    if iterations == 0:
        return ["no iteration was done"]
    with_faults, without = tiny_run.records(out), tiny_run.records(reference)[:iterations]
    differ = [mine["step"] for mine, its in zip(with_faults, without, strict=False) if mine != its]
    steps = [line["step"] for line in with_faults]
    problems = [f"metrics differ from the run without faults from iteration {differ[0]} on"] if differ else []
    return problems + ([] if steps == list(range(1, iterations + 1)) else [f"steps missing or repeated: {steps}"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=None, help="of the faults; random if not given")
    parser.add_argument("--folder", type=Path, default=None)
    given = parser.parse_args()
    seed = random.SystemRandom().randrange(2**32) if given.seed is None else given.seed
    folder = given.folder or Path("runs") / f"soak-{seed}"
    folder.mkdir(parents=True)
    report = soak(folder.resolve(), given.minutes, seed)
    (folder / "soak.json").write_text(json.dumps(report, indent=1))
    print(json.dumps(report, indent=1))
    return 1 if report["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
