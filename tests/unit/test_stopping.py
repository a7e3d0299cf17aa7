"""Ctrl-C and SIGTERM: the first asks for a clean stop, another one ends the process, a doubled one counts once. SIGUSR1
asks for a stop to go on from, however often."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import psutil
import pytest

from megatron_srpo.run import stopping
from megatron_srpo.run.stopping import REQUEUE, SAME_REQUEST_SECONDS, SIGNALS, StopRequest


@pytest.fixture
def held():
    """SIGUSR1 held back, and none pending afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    stopping.hold_requeue()
    yield
    signal.sigtimedwait({REQUEUE}, 0)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is set; the process's own signal handlers come back afterwards."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    now = [100.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    yield now
    for number, handler in before.items():
        signal.signal(number, handler)


def installed(monkeypatch, *, torchrun, speaks=True):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    if not torchrun:
        monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    stop = StopRequest(speaks=speaks)
    stop.install()
    return stop


STARTING = """
import os, sys, time
from megatron_srpo.run.stopping import StopDuringStartup
with StopDuringStartup(prints=sys.argv[1] == "1"):
    os.write(1, b".")
    os.read(0, 1)  # where no instruction of Python's comes until the pipe is written to
"""


@pytest.mark.parametrize(("number", "speaks"), [(signal.SIGINT, 1), (signal.SIGTERM, 1), (signal.SIGTERM, 0)])
def test_a_signal_during_the_start_ends_the_process_at_once_in_one_line(number, speaks):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", STARTING, str(speaks)], **pipes) as process:
        process.stdout.read(1)
        process.send_signal(number)
        assert process.wait() == 130
        assert process.stderr.read() == speaks * b"\nstopped before the first iteration: there is nothing to save\n"


def test_after_the_block_signals_are_what_they_were(clock):
    before = [signal.getsignal(number) for number in SIGNALS]
    with stopping.StopDuringStartup(prints=False):
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_asks_for_a_stop_and_goes_on(clock, monkeypatch, capfd, number):
    stop = installed(monkeypatch, torchrun=True)
    assert not stop()
    os.kill(os.getpid(), number)
    assert stop()
    told = capfd.readouterr().err
    assert told.count("stopping: this iteration is finished and saved first") == 1
    assert "torchrun waits 30 s" in told and "--shutdown-timeout" in told


def test_one_rank_alone_speaks(clock, monkeypatch, capfd):
    stop = installed(monkeypatch, torchrun=True, speaks=False)
    os.kill(os.getpid(), signal.SIGINT)
    assert stop() and capfd.readouterr().err == ""


def test_the_patience_that_torchrun_was_given_is_named(clock, monkeypatch, capfd):
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "900")
    installed(monkeypatch, torchrun=True)
    os.kill(os.getpid(), signal.SIGINT)
    assert "torchrun waits 900 s" in capfd.readouterr().err


@pytest.mark.parametrize(("first", "second"), [SIGNALS, SIGNALS[::-1]])
def test_the_other_signal_is_left_to_the_system_which_ends_the_process_at_once(clock, monkeypatch, first, second):
    """torchrun passes a second Ctrl-C on as SIGTERM."""
    installed(monkeypatch, torchrun=True)
    os.kill(os.getpid(), first)
    assert signal.getsignal(second) is signal.SIG_DFL and signal.getsignal(first) is not signal.SIG_DFL


def test_the_same_signal_twice_is_one_request_when_it_comes_doubled(clock, monkeypatch):
    """A cluster's manager signals the rank and torchrun, which passes it on."""
    stop, killed = installed(monkeypatch, torchrun=True), []
    os.kill(os.getpid(), signal.SIGTERM)
    clock[0] += SAME_REQUEST_SECONDS / 2
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop() and signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    clock[0] += SAME_REQUEST_SECONDS
    monkeypatch.setattr(stopping.os, "kill", lambda pid, number: killed.append((pid, number)))
    signal.raise_signal(signal.SIGTERM)
    assert killed == [(os.getpid(), signal.SIGTERM)] and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_without_torchrun_any_second_signal_ends_the_process(clock, monkeypatch, capfd):
    installed(monkeypatch, torchrun=False)
    os.kill(os.getpid(), signal.SIGINT)
    assert all(signal.getsignal(number) is signal.SIG_DFL for number in SIGNALS)
    assert "torchrun" not in capfd.readouterr().err


def test_a_requeue_is_kept_until_the_loop_asks_however_often_it_came_and_is_told_from_a_stop(clock, held, monkeypatch):
    for _ in range(3):
        signal.pthread_kill(threading.main_thread().ident, REQUEUE)  # other tests have left threads
    late = installed(monkeypatch, torchrun=True)
    assert late() and late.requeue


def test_a_hangup_asks_for_a_stop_however_often_it_comes_and_helpers_survive_it(clock, monkeypatch):
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        assert stopping.hold_hangup() == {signal.SIGHUP}
        stop = installed(monkeypatch, torchrun=True)
        assert not stop()
        helper = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        helper.send_signal(signal.SIGHUP)
        for _ in range(3):
            signal.pthread_kill(threading.main_thread().ident, signal.SIGHUP)
        assert stop() and not stop.requeue
        helper.communicate(b"go on\n", timeout=60)
        assert helper.returncode == 0
    finally:
        signal.sigtimedwait({signal.SIGHUP}, 0)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_under_nohup_a_hangup_stays_ignored(clock, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert stopping.hold_hangup() == set()
        stop = installed(monkeypatch, torchrun=True)
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_stop_by_ctrl_c_is_no_requeue(clock, held, monkeypatch):
    stop = installed(monkeypatch, torchrun=True)
    os.kill(os.getpid(), signal.SIGINT)
    assert stop() and not stop.requeue


def test_a_helper_that_a_rank_starts_survives_the_requeue_signal(held):
    """It may be sent to every process of the job, and the helpers' own action would be to end."""
    helper = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    helper.send_signal(REQUEUE)
    helper.communicate(b"go on\n", timeout=60)
    assert helper.returncode == 0


LAUNCHER = """
import os, subprocess, sys
os.environ["TORCHELASTIC_RUN_ID"] = "1"
rank = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE)
print(rank.pid, rank.stdout.readline().decode().strip(), flush=True)
rank.wait()
"""
RANK = """
import signal, sys, time
from megatron_srpo.run import stopping
signal.signal(signal.SIGTERM, lambda *unused: sys.exit(0))
stopping.end_with_launcher()
print("ready", flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells a process of its parent's end")
def test_a_rank_is_asked_to_stop_when_its_launcher_is_killed():
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, RANK], stdout=subprocess.PIPE, text=True)
    pid, ready = launcher.stdout.readline().split()
    rank = psutil.Process(int(pid))
    assert ready == "ready" and rank.is_running()
    launcher.kill()
    launcher.wait()
    gone, _ = psutil.wait_procs([rank], timeout=30)
    assert gone
