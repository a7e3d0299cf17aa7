"""Runs the steps of a job, answers Slurm's signals, and decides how the job ends.

Every command has a session of its own: Slurm signals the batch script's whole process group, and srun must hear of it
from here.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from megatron_srpo.core import exit_codes
from slurm import commands
from slurm.attempts import Attempts
from slurm.commands import Step
from slurm.job import Job

CRASH_LOOP = 70  # crashed again and again without a new checkpoint (EX_SOFTWARE)
CRASHED = 1
REASONS = {  # of a requeue, by exit code
    exit_codes.REQUEUE: "stopped in time",
    exit_codes.UNHEALTHY: "a node failed its check",
    CRASHED: "it crashed",
}
START_SECONDS = 5  # before that, srun may not yet pass signals on
REPEAT_SECONDS = 15  # a request to stop is sent so often until the step ends
RESERVE_SECONDS = 30  # so long before the job's end it is requeued even if its step still runs
KILL_SECONDS = 60  # between two attempts to end a step
SHOWN_LINES = 8


class Supervisor:
    """One attempt of a job."""

    def __init__(self, job: Job, *, clock: Callable[[], float] = time.time) -> None:
        self._job, self._clock = job, clock
        self._stop_asked = False  # SIGUSR1: the time limit is near, or somebody wants the nodes
        self._ended = False  # SIGTERM: the job was cancelled or preempted
        self._engines_lost = False
        self._environment = {**os.environ, **commands.environment(job)}

    def run(self) -> int:
        """The job's exit code. Where that is one of REASONS, Slurm has been asked to start the job again."""
        signal.signal(signal.SIGUSR1, self._on_stop)
        signal.signal(signal.SIGTERM, self._on_end)
        starts = Attempts(self._job.logs, self._job.max_attempts, self._job.job_id)  # that do not get to the output
        starts.begin()
        settings, code = self._check()
        if settings is None:
            return self._end(code, starts)
        starts.forget()
        train = commands.train_step(self._job, settings["engine_ranks"])
        attempts = Attempts(Path(settings["output"]), self._job.max_attempts, self._job.job_id)
        attempts.begin()
        return self._end(self._attempt(settings, train), attempts)

    def _end(self, code: int, attempts: Attempts) -> int:
        """The job's exit code after an attempt that came to `code`; asks for a requeue where that helps."""
        if code != exit_codes.DONE and (self._ended or code == exit_codes.STOPPED):
            # A job that was told to end and still runs has been preempted, with a period of grace.
            code = exit_codes.REQUEUE if job_state(self._job.slurm_id) == "RUNNING" else exit_codes.STOPPED
        if code == exit_codes.DONE:
            attempts.forget()
        if code not in REASONS:
            return code
        if attempts.exhausted:
            say(
                f"{attempts.fruitless} attempts in a row ended without a new checkpoint: not started again. See the "
                f"logs, {self._job.logs}/, then submit again"
            )
            return CRASH_LOOP
        return self._requeue(code)

    def _check(self) -> tuple[dict | None, int]:
        """What the check of the configuration found, and its exit code. Only MISTAKE says that the configuration is
        wrong: a node that fails, or an image that cannot be pulled, has other codes."""
        step = commands.check_step(self._job)
        found = subprocess.run(
            step.argv, env=self._environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=False,
            start_new_session=True,
        )  # fmt: skip
        if found.returncode == exit_codes.MISTAKE:
            say(f"the configuration was not accepted (exit code {exit_codes.MISTAKE}); the job is not started again")
            return None, exit_codes.MISTAKE
        with contextlib.suppress(IndexError, ValueError):  # no output, or other output
            if found.returncode == exit_codes.DONE:
                return json.loads(found.stdout.splitlines()[-1]), exit_codes.DONE
        say(f"the check of the configuration did not run to its end (exit code {found.returncode}); see above")
        return None, exit_codes.STOPPED if self._ended else exit_codes.UNHEALTHY

    def _attempt(self, settings: dict, train: Step) -> int:
        self._job.logs.mkdir(parents=True, exist_ok=True)
        if self._stop_asked:
            return exit_codes.REQUEUE
        health = commands.health_step(self._job, device=settings["device"], output=settings["output"])
        code = self._execute(health, "health", seconds=self._job.health_seconds)
        if self._stop_asked:
            return exit_codes.REQUEUE
        if code != exit_codes.DONE:
            return code if code == exit_codes.STOPPED else exit_codes.UNHEALTHY
        say(f"logs of the nodes: {self._job.logs}/node-*.log")
        with self._engines(settings["engine_ranks"]) as engines:
            code = self._execute(train, "train", engines=engines)
        told = [commands.record(self._job, "serve", number) for number in range(self._job.rollout_nodes)]
        return exit_codes.MISTAKE if exit_codes.MISTAKE in map(_read, told) else code

    @contextlib.contextmanager
    def _engines(self, engine_ranks: int) -> Iterator[subprocess.Popen | None]:
        """The step of the engine servers, if the job has any; it ends with the block."""
        if not self._job.rollout_nodes:
            yield None
            return
        self._environment[commands.TOKEN] = secrets.token_urlsafe(32)  # the servers', and the trainer's to them
        say(f"engine servers on {', '.join(self._job.rollout_hosts)}; their logs: {self._job.logs}/engine-*.log")
        for number in range(self._job.rollout_nodes):
            commands.record(self._job, "serve", number).unlink(missing_ok=True)
        srun = self._start(commands.serve_step(self._job, engine_ranks))
        try:
            yield srun
        finally:
            srun.terminate()
            try:
                srun.wait(timeout=KILL_SECONDS)
            except subprocess.TimeoutExpired:
                srun.kill()

    def _start(self, step: Step) -> subprocess.Popen:
        return subprocess.Popen(step.argv, env=self._environment, stdin=subprocess.DEVNULL, start_new_session=True)

    def _execute(
        self, step: Step, kind: str, *, seconds: float = math.inf, engines: subprocess.Popen | None = None
    ) -> int:
        """Run a step to its end, or for `seconds`; returns what it came to."""
        files = [commands.record(self._job, kind, number) for number in range(len(step.nodes))]
        for file in files:
            file.unlink(missing_ok=True)
        say(f"{step.title}: {len(step.nodes)} × {self._job.ranks_per_node} ranks")
        srun = self._start(step)
        if not self._wait(srun, seconds, engines):
            return exit_codes.REQUEUE
        codes = [_read(file) for file in files]
        code = outcome(srun.returncode, codes)
        if self._engines_lost and code == exit_codes.STOPPED:
            code = CRASHED
        if code not in (exit_codes.DONE, exit_codes.REQUEUE):
            ends = [f"{name} {ending(codes[number])}" for number, name in enumerate(step.nodes)]
            say(f"{step.title} ended: {', '.join(ends)}")
            if kind == "train":
                print("".join(f"    {line}\n" for line in self._last_words(codes)), end="", file=sys.stderr, flush=True)
        return code

    def _wait(self, srun: subprocess.Popen, seconds: float, engines: subprocess.Popen | None) -> bool:
        """Until the step ends, by itself, after `seconds` or without its engines: True; or until the job's own end is
        too near: False."""
        now = self._clock()
        deadline, ask_at, end = now + seconds, now + START_SECONDS, None
        while srun.poll() is None:
            now = self._clock()
            if self._stop_asked and now >= ask_at:
                srun.send_signal(signal.SIGUSR1)
                ask_at, end = now + REPEAT_SECONDS, end or job_end(self._job.slurm_id)
            if end is not None and now > end - RESERVE_SECONDS:
                say("no checkpoint in time: the job will go on from its last one")
                return False  # the requeue ends the step
            lost = not self._engines_lost and engines is not None and engines.poll() is not None
            if lost or now > deadline:
                say("the engine servers have ended" if lost else f"not ended after {seconds:.0f} s")
                srun.terminate()
                deadline, self._engines_lost = now + KILL_SECONDS, lost or self._engines_lost
            with contextlib.suppress(subprocess.TimeoutExpired):
                srun.wait(timeout=0.5)
        return True

    def _last_words(self, codes: Sequence[int | None]) -> list[str]:
        """The end of the log of a node that did not end because of another one."""
        consequences = (exit_codes.DONE, exit_codes.LOST, 128 + signal.SIGTERM)
        number = next((number for number, code in enumerate(codes) if code not in consequences), 0)
        try:
            return (self._job.logs / f"node-{number}.log").read_text(errors="replace").splitlines()[-SHOWN_LINES:]
        except OSError:
            return []

    def _requeue(self, code: int) -> int:
        say(f"{REASONS[code]}: asking Slurm to start the job again")
        asked = _slurm("scontrol", "requeue", self._job.slurm_id)
        if asked.returncode != 0:
            say(f"Slurm does not requeue this job: {asked.stderr.strip()}; submit it again to go on")
            return code
        end = self._clock() + 120  # ending before Slurm does it would make this a finished job
        while self._clock() < end and not self._ended:
            time.sleep(0.2)
        return code

    def _on_stop(self, number: int, frame: object) -> None:
        if not self._stop_asked:
            say("asked to stop (SIGUSR1): the iteration is finished and saved, then the job is requeued")
        self._stop_asked = True

    def _on_end(self, number: int, frame: object) -> None:
        self._ended = True


def outcome(srun_code: int, codes: Iterable[int | None]) -> int:
    """What a step came to, from srun's exit code and the nodes' own, None where a node could leave none.

    A mistake that one node tells counts for all: the others may have been ended because of it. So does a checkpoint.
    """
    known = set(codes)
    for code in (exit_codes.MISTAKE, exit_codes.REQUEUE, exit_codes.UNHEALTHY):
        if code in known:
            return code
    if srun_code == 0 and known == {exit_codes.DONE}:
        return exit_codes.DONE
    stops = {exit_codes.STOPPED, 128 + signal.SIGTERM, 128 + signal.SIGINT}
    return exit_codes.STOPPED if known <= stops else CRASHED


def ending(code: int | None) -> str:
    """A node's exit code in words."""
    if code is None:
        return "was lost or killed"
    known = {exit_codes.DONE: "is done", exit_codes.LOST: "lost another node", exit_codes.MISTAKE: "told a mistake"}
    return known.get(code, f"ended with exit code {code}")


def job_end(job_id: str) -> float | None:
    """When Slurm ends the job, in seconds since 1970; None where it does not say."""
    try:
        return datetime.datetime.fromisoformat(_ask_slurm(job_id, "%e")).timestamp()
    except ValueError:
        return None


def job_state(job_id: str) -> str:
    """RUNNING, COMPLETING, …"""
    return _ask_slurm(job_id, "%T")


def _ask_slurm(job_id: str, what: str) -> str:
    return _slurm("squeue", "-h", "-j", job_id, "-o", what).stdout.strip()


def _slurm(*command: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "SLURM_TIME_FORMAT": "standard"}  # users may have another one, as "relative"
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, start_new_session=True)


def _read(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def say(text: str) -> None:
    print(f"[{datetime.datetime.now():%F %T}] {text}", file=sys.stderr, flush=True)
