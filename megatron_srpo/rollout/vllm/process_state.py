"""An engine that runs in the trainer's process changes global state there; these blocks restore it."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from megatron_srpo.rollout.vllm.preload import preload_links


@contextmanager
def preserved_generators(device: str) -> Iterator[None]:
    """The global random generators of Python, NumPy and torch may be used or reseeded inside this block; afterwards
    they continue where they were."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state() if device == "cuda" else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)


@contextmanager
def preserved_settings() -> Iterator[None]:
    """An engine may start inside this block; afterwards the process has its settings back.

    vLLM's CPU worker turns torch.set_num_threads into a no-op, and its workers set the matmul precision. vLLM sets
    LD_PRELOAD for workers that it does not start here; it would reach our child processes. Signal handlers, default
    dtype and gradient mode are restored for safety.
    """
    preload = os.environ.get("LD_PRELOAD")
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    precision, dtype = torch.get_float32_matmul_precision(), torch.get_default_dtype()
    gradients = torch.is_grad_enabled()
    handlers = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    if links := preload_links():
        os.environ["LD_PRELOAD"] = links
    try:
        yield
    finally:
        if preload is None:
            os.environ.pop("LD_PRELOAD", None)
        else:
            os.environ["LD_PRELOAD"] = preload
        torch.set_num_threads = set_num_threads
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(gradients)
        for number, handler in handlers.items():
            signal.signal(number, handler)
