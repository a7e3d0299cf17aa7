"""What every test process needs before torch and vLLM are imported: one thread, no network, no compilation.

After a default run it also prints which tests the run left out, and how to run them.
"""

import os
import signal
from collections import Counter

import pytest

for _name, _value in {
    "OMP_NUM_THREADS": "1",  # more threads than cores are slower by an order of magnitude
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "TORCHDYNAMO_DISABLE": "1",
    "WANDB_MODE": "offline",
    "MPLBACKEND": "Agg",
}.items():
    os.environ.setdefault(_name, _value)

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell starts background jobs so, and tests send it
    signal.signal(signal.SIGINT, signal.default_int_handler)


DEFAULT_MARKERS = "not slow and not slurm"  # pyproject.toml's addopts: what a run without -m selects
COMMANDS = {"slow": "make test-slow", "slurm": "make test-slurm", "gpu": "make test-gpu"}
_left_out: Counter[str] = Counter()


def pytest_configure(config):
    """The suite tests the CPU path, even on a machine with a GPU. Only `-m gpu` may see the GPU."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_deselected(items):
    _left_out.update(next((name for name in COMMANDS if item.get_closest_marker(name)), "") for item in items)


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # one of pytest-xdist's processes; each of them collects all tests
        session.config.workeroutput["left_out"] = dict(_left_out)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    _left_out.clear()
    _left_out.update(getattr(node, "workeroutput", {}).get("left_out", {}))


def pytest_terminal_summary(terminalreporter, config):
    """Name the tests that a default run left out. pytest prints its own last line after this hook."""
    if config.option.markexpr != DEFAULT_MARKERS or config.option.keyword:
        return
    skipped = terminalreporter.stats.get("skipped", [])
    counts = {**_left_out, "gpu": sum("gpu" in report.keywords for report in skipped)}
    parts = [f"{counts[name]} {name} tests (run {command})" for name, command in COMMANDS.items() if counts.get(name)]
    if parts:
        terminalreporter.write_line(f"This run left out {', '.join(parts)}")


@pytest.fixture(autouse=True)
def signals_as_they_were():
    """A command that runs in the test's process holds SIGUSR1 back, which processes started later would inherit."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
