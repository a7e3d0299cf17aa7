"""One reward worker and its driver's side, mostly without a process: clocks, alarms, messages, paths."""

from __future__ import annotations

import os
import signal
import socket
from types import SimpleNamespace

import pytest

from megatron_srpo.config import RewardConfig
from megatron_srpo.core.errors import UserError
from megatron_srpo.core.output_log import OutputLog
from megatron_srpo.core.records import Prompt, Reward, Rollout
from megatron_srpo.rewards import RewardPool, RewardTask, pool, process, worker
from megatron_srpo.rewards.process import LONGEST_MESSAGE, WorkerProcess
from megatron_srpo.run.scorer import PoolScorer


@pytest.fixture
def driver():
    """The driver's side of a worker that is no process: `theirs` is the end of its channel."""
    side = WorkerProcess.__new__(WorkerProcess)
    side.ready, side.pending, side.deadline = True, [], None
    side._log, side._timeout, side._received, side._junk, side._tail = OutputLog(), 5.0, b"", "", b""
    side.channel, side.theirs = socket.socketpair()
    yield side
    side.channel.close()
    side.theirs.close()


def test_the_time_of_a_task_begins_when_the_one_before_it_is_done(driver):
    driver.pending, driver.deadline = [3, 4], 0.0
    assert driver.take_first() == 3 and driver.deadline > 0.0  # not what was left of the first one's
    assert driver.take_first() == 4 and driver.deadline is None  # an idle worker cannot be late


def test_what_never_becomes_a_message_is_not_kept_for_ever(driver):
    driver.pending, part = [0], b"x" * (1 << 14)
    for _ in range(2 * LONGEST_MESSAGE // len(part)):
        driver.theirs.sendall(part)
        if driver.read() is None:
            break
    assert "more than 1048576 bytes" in driver._junk


def test_more_results_than_tasks_are_refused(driver):
    driver.pending = [7]
    driver.theirs.sendall(b"[1.0, null, null, null, null]\n[0.0, null, null, null, null]\n")
    assert driver.read() is None and "more results than tasks" in driver._junk


def test_the_last_line_of_the_output_may_arrive_in_parts(driver):
    read, write = os.pipe()
    os.set_blocking(read, False)
    with os.fdopen(read, "rb") as driver.output, os.fdopen(write, "wb", buffering=0) as printed:
        for part in (b"no such ", b"module"):
            printed.write(part)
            assert driver.drain_output()
    assert driver._tail == b"no such module"


def test_a_worker_finds_modules_in_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["/elsewhere"])
    assert process._search_path() == ["/elsewhere", str(tmp_path)]
    monkeypatch.setattr("sys.path", ["", "/elsewhere"])
    assert process._search_path() == [str(tmp_path), "/elsewhere"]


def test_an_alarm_ends_a_worker_whose_driver_cannot_and_rests_between_tasks(driver, monkeypatch):
    events = []
    monkeypatch.setattr(signal, "alarm", events.append)
    driver.channel.sendall(worker.encode([("own", "first", "a", {}), ("own", "second", "a", {})]))
    driver.channel.shutdown(socket.SHUT_WR)
    worker._serve(driver.theirs, {"own": lambda response, answer, metadata: events.append(response) or 1.0}, 1.5)
    late = 2 + worker.ORPHAN_SECONDS
    assert events == [late, "first", 0, late, "second", 0]
    driver.pending = [0, 1]
    assert [result.score for result in driver.read()] == [1.0, 1.0]


def test_the_users_own_function_goes_before_a_format_and_before_the_built_in_comparison(tmp_path):
    (tmp_path / "own.py").write_text("def half(response, answer, metadata): return 0.5\n")
    own = dict.fromkeys(("mcq", "math"), f"{tmp_path}/own.py:half")
    with RewardPool(RewardConfig(workers=1, mcq_format="lenient", functions=own), own) as made:
        assert [reward.score for reward in made.score([RewardTask(kind, "B", "B") for kind in own])] == [0.5, 0.5]
        assert not made.can_compare("math")  # who knows what its predictions are
        mine = list(made._workers)
        pool._end_all(made._workers, os.getpid() + 1)  # in a fork, at whose exit it runs too
        assert made._workers == mine and made.score([RewardTask("mcq", "B", "B")])[0].error is None


def test_the_first_workers_start_in_time_or_the_run_does_not_begin(monkeypatch):
    started, start = [], RewardPool._start
    monkeypatch.setattr(process, "START_SECONDS", 0.0)
    monkeypatch.setattr(RewardPool, "_start", lambda made: started.append(1) or start(made))
    with pytest.raises(UserError, match="did not start"):
        RewardPool(RewardConfig(workers=1), ["exact"])
    assert len(started) == 1  # it would be as slow again


def scorer_of(**pool_of):
    control = SimpleNamespace(gather=lambda mine: [mine], share=lambda compute: compute())
    return PoolScorer(SimpleNamespace(**pool_of), control, threshold=0.5, leads=True)


def rollouts_of(*texts):
    return [Rollout(0, number, [1], [-1.0], text, "stop", 0) for number, text in enumerate(texts)]


PROMPT = Prompt("train:0", (), [1], "7", "math")


def test_what_went_wrong_in_one_batch_ends_it_and_not_the_next():
    added = []

    def add(tasks):
        added.extend(task.response for task in tasks)
        if "broken" in added[-1]:
            raise RuntimeError("the pool is closed")

    scored = [Reward(1.0), Reward(0.5), Reward(0.25)]
    scorer = scorer_of(add=add, finish=lambda: scored[: len(added)], score=lambda tasks: [])
    hand_over, rollouts = scorer.start([PROMPT]), rollouts_of("broken", "later")
    for rollout in rollouts:
        hand_over(rollout)
    assert added == ["broken"]  # nothing is given to a pool that has failed
    with pytest.raises(RuntimeError, match="closed"):
        scorer.finish(rollouts)
    added.clear()
    hand_over, rollouts = scorer.start([PROMPT]), rollouts_of("a", "b", "c")
    for rollout in rollouts:
        hand_over(rollout)
    (group,) = scorer.finish(rollouts[::-1])
    assert [(attempt.rollout.text, attempt.correct) for attempt in group.attempts] == [
        ("a", True), ("b", True), ("c", False),  # the threshold itself is correct
    ]  # fmt: skip


def test_a_comparison_that_fails_is_no_equality_whatever_a_failure_scores():
    rewards = [Reward(1.0, error="time-out after 1 s"), Reward(1.0), Reward(0.5), Reward(0.0)]
    scorer = scorer_of(can_compare=lambda kind: True, score=lambda tasks: rewards)
    assert scorer.same_answers([(PROMPT, "text", "7")] * 4) == [False, True, True, False]
