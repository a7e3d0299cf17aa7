"""How a job ends: the supervisor as its own process, with Slurm's three commands stood in for by scripts.

What the stand-ins cannot show, a real Slurm does: tests/slurm.
"""

from __future__ import annotations

import datetime
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_srpo.core import exit_codes
from slurm.supervisor import CRASH_LOOP, CRASHED, job_end, outcome

ROOT = Path(__file__).parents[2]
CONFIG = "examples/science/srpo_qwen3_8b.toml"
# Each node leaves the exit code that $HEALTH or $TRAIN has for it, "-" for none; a checkpoint appears if $SAVES is set.
# Engine servers run until they are ended, or end with $SERVE.
SRUN = """#!/bin/bash
kind=
for part in "$@"; do
  case $part in
    slurm.settings)
      [ -z "$REFUSED" ] || exit $REFUSED
      echo "{\\"output\\": \\"$OUTPUT\\", \\"device\\": \\"cpu\\", \\"engine_ranks\\": ${ENGINE:-1}}"
      exit 0 ;;
    --record=*) file=${part#--record=}; kind=$(basename "$file"); kind=${kind%%-*} ;;
  esac
done
if [ $kind = serve ]; then
  if [ -n "$SERVE" ]; then
    until [ -e "$OUTPUT.trains" ]; do sleep 0.05; done
    echo $SERVE > "${file/\\{node\\}/0}"
    exit 0
  fi
  trap 'echo "servers ended"; kill $!; exit 0' TERM
  sleep 60 & echo "servers run"
  touch "$OUTPUT.serves"
  wait
fi
[ $kind = health ] && codes=$HEALTH || codes=$TRAIN
if [ $kind = train ] && [ -n "$WAITS" ]; then
  trap 'echo "$WAITS heard"' "$WAITS"
  sleep 60 & echo ready
  touch "$OUTPUT.trains"
  wait $!
  kill $!
fi
[ $kind = train ] && [ -n "$TOGETHER" ] && until [ -e "$OUTPUT.serves" ]; do sleep 0.05; done
[ $kind = train ] && [ -n "$SAVES" ] && mkdir -p "$OUTPUT/checkpoints/step_$SAVES"
number=0 worst=0
for code in $codes; do
  [ $code = - ] && worst=137 || echo $code > "${file/\\{node\\}/$number}"
  case $code in 0|2|69|75|76|130) ;; -) ;; *) worst=$code ;; esac
  number=$((number + 1))
done
exit $worst
"""
SCONTROL = """#!/bin/bash
case "$1 $2" in
  "show hostnames") printf 'a\\nb\\n' ;;
  *) echo "$@" >> "$OUTPUT.requeues"; [ -z "$NO_REQUEUE" ] || { echo refused >&2; exit 1; }; kill -TERM $PPID ;;
esac
"""
SQUEUE = '#!/bin/bash\n[ "${@: -1}" = %T ] && echo "$STATE" || echo N/A\n'


@pytest.fixture
def start(tmp_path):
    """Starts one attempt of a job on nodes a and b; keywords are what the stand-ins do."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("squeue", SQUEUE)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def start(*arguments: str, **does: str) -> subprocess.Popen:
        environment = {
            "PATH": f"{tmp_path}:{os.environ['PATH']}", "OUTPUT": str(tmp_path / "run"), "SRPO_LOGS": str(tmp_path),
            "SLURM_JOB_NODELIST": "a,b", "SLURM_JOB_ID": "7", "HEALTH": "0 0", "TRAIN": "0 0", **does,
        }  # fmt: skip
        command = [sys.executable, "-m", "slurm.launch", CONFIG, *arguments]
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    return start


@pytest.fixture
def attempt(start, tmp_path):
    """One attempt to its end: (exit code, was Slurm asked to start the job again, what was said)."""

    def attempt(*arguments: str, **does: str) -> tuple[int, bool, str]:
        (tmp_path / "run.requeues").unlink(missing_ok=True)
        job = start(*arguments, **does)
        said, _ = job.communicate(timeout=60)
        return job.returncode, (tmp_path / "run.requeues").exists(), said

    return attempt


@pytest.mark.parametrize(
    ("does", "code", "requeued"),
    [
        ({}, exit_codes.DONE, False),
        ({"REFUSED": "2"}, exit_codes.MISTAKE, False),
        ({"REFUSED": "1"}, exit_codes.UNHEALTHY, True),  # an image that cannot be pulled
        ({"REFUSED": "137"}, exit_codes.UNHEALTHY, True),  # a node that fails
        ({"TRAIN": "2 143"}, exit_codes.MISTAKE, False),
        ({"TRAIN": "75 75"}, exit_codes.REQUEUE, True),
        ({"TRAIN": "76 -"}, CRASHED, True),
        ({"TRAIN": "1 143"}, CRASHED, True),
        ({"HEALTH": "69 69"}, exit_codes.UNHEALTHY, True),
        ({"HEALTH": "- -"}, exit_codes.UNHEALTHY, True),
        ({"TRAIN": "130 130", "STATE": "COMPLETING"}, exit_codes.STOPPED, False),  # scancel
        ({"TRAIN": "130 130", "STATE": "RUNNING"}, exit_codes.REQUEUE, True),  # preempted with a period of grace
        ({"TRAIN": "75 75", "NO_REQUEUE": "1"}, exit_codes.REQUEUE, True),  # asked, and refused
    ],
)
def test_an_attempt_ends_the_job_or_has_it_started_again(attempt, does, code, requeued):
    assert attempt(**does)[:2] == (code, requeued)


def test_a_crash_shows_the_end_of_the_log_of_the_node_that_crashed(attempt, tmp_path):
    (tmp_path / "7").mkdir()
    (tmp_path / "7/node-0.log").write_text("connection closed\n")
    (tmp_path / "7/node-1.log").write_text("out of memory\n")
    said = attempt(TRAIN="76 1")[2]
    assert "training ended: a lost another node, b ended with exit code 1" in said
    assert "out of memory" in said and "connection closed" not in said


def test_a_job_that_crashes_again_and_again_is_not_started_for_ever(attempt):
    ends = [attempt(TRAIN="1 1")[:2] for _ in range(3)]
    assert ends == [(CRASHED, True), (CRASHED, True), (CRASH_LOOP, False)]
    assert attempt(TRAIN="1 1", SLURM_JOB_ID="8")[:2] == (CRASHED, True)  # submitted anew by somebody who has looked


def test_a_check_that_never_runs_to_its_end_is_not_started_for_ever(attempt):
    ends = [attempt(REFUSED="1")[:2] for _ in range(3)]
    assert ends == [(exit_codes.UNHEALTHY, True), (exit_codes.UNHEALTHY, True), (CRASH_LOOP, False)]


def test_a_check_that_ran_at_last_starts_the_count_again(attempt):
    ends = [attempt(REFUSED="1" if number % 2 else "")[0] for number in range(6)]
    assert ends == [exit_codes.DONE, exit_codes.UNHEALTHY] * 3


def test_a_crash_after_a_new_checkpoint_is_no_loop(attempt):
    ends = [attempt(TRAIN="1 1", SAVES=f"{number:08d}")[:2] for number in range(5)]
    assert ends == [(CRASHED, True)] * 5


def test_stopping_in_time_but_never_with_a_new_checkpoint_is_a_loop_too(attempt):
    assert [attempt(TRAIN="75 75")[0] for _ in range(3)] == [exit_codes.REQUEUE, exit_codes.REQUEUE, CRASH_LOOP]


def test_an_element_of_an_array_asks_for_itself_and_not_for_the_whole_array(attempt, tmp_path):
    attempt(TRAIN="75 75", SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="3")
    assert (tmp_path / "run.requeues").read_text() == "requeue 7_3\n"


def test_the_end_of_a_job_is_read_whatever_format_of_times_the_user_has(tmp_path, monkeypatch):
    (tmp_path / "squeue").write_text(
        '#!/bin/sh\n[ "$SLURM_TIME_FORMAT" = standard ] && echo 2026-01-02T03:04:05 || echo 5:00\n'
    )
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_TIME_FORMAT", "relative")
    assert job_end("7") == datetime.datetime(2026, 1, 2, 3, 4, 5).timestamp()


def test_the_request_to_stop_reaches_the_training_step(start):
    job = start(TRAIN="75 75", WAITS="USR1")
    said = iter(job.stdout)
    assert any(line == "ready\n" for line in said)
    job.send_signal(signal.SIGUSR1)
    rest = "".join(said)
    assert "USR1 heard" in rest and "asked to stop (SIGUSR1)" in rest
    assert job.wait(timeout=60) == exit_codes.REQUEUE


SPLIT = ("--rollout-nodes", "1")


def test_engine_servers_run_beside_the_training_and_end_with_it(attempt):
    code, requeued, said = attempt(*SPLIT, TRAIN="0", TOGETHER="1")
    assert (code, requeued) == (exit_codes.DONE, False)
    assert said.index("servers run") < said.index("servers ended") and "training: 1 × 8 ranks" in said


@pytest.mark.parametrize(("serve", "code", "requeued"), [("1", CRASHED, True), ("2", exit_codes.MISTAKE, False)])
def test_without_its_engine_servers_the_training_is_ended(attempt, serve, code, requeued):
    ended = attempt(*SPLIT, TRAIN="143", WAITS="TERM", SERVE=serve, STATE="RUNNING")
    assert "TERM heard" in ended[2] and "the engine servers have ended" in ended[2]
    assert ended[:2] == (code, requeued)


def test_an_engine_that_is_larger_than_a_node_is_refused(attempt):
    code, requeued, said = attempt(*SPLIT, ENGINE="16")
    assert (code, requeued) == (exit_codes.MISTAKE, False) and "an engine server lives on one node" in said


@pytest.mark.parametrize(
    ("srun", "codes", "expected"),
    [
        (0, [0, 0], exit_codes.DONE),
        (0, [0, None], CRASHED),
        (137, [0, 0], CRASHED),  # Slurm says that something did not end well
        (143, [2, 143], exit_codes.MISTAKE),
        (137, [75, None], exit_codes.REQUEUE),
        (0, [76, 76], CRASHED),
        (143, [130, 143], exit_codes.STOPPED),
        (143, [130, None], CRASHED),
        (0, [69, 69], exit_codes.UNHEALTHY),
    ],
)
def test_a_steps_outcome(srun, codes, expected):
    assert outcome(srun, codes) == expected
