"""What every test process needs before torch and vLLM are imported: one thread, no network, no compilation."""

import os
import signal

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


def pytest_configure(config):
    """The suite is of the CPU path, also where there is a GPU; only `-m gpu` sees it."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True)
def signals_as_they_were():
    """A command that runs in the test's process holds SIGUSR1 back, which processes started later would inherit."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
