"""An engine is a guest in the trainer's process: what it changes there is put back."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

SITE = Path(torch.__file__).parents[1]
PRELOADED = ("torch*/**/libgomp*.so*", "vllm/libs/libtcmalloc*.so*")


@contextmanager
def preserved_generators(device: str) -> Iterator[None]:
    """Inside, Python's, NumPy's and torch's global random generators may be used or reseeded; afterwards they continue
    where they were."""
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
    """Inside, an engine may start. vLLM's CPU worker turns torch.set_num_threads into a no-op and its workers set the
    matmul precision; LD_PRELOAD is set for workers that it does not start here, and would reach our child processes
    (it cannot name a path with a space); signal handlers, default dtype and gradient mode are kept for safety."""
    preload = os.environ.get("LD_PRELOAD")
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    precision, dtype = torch.get_float32_matmul_precision(), torch.get_default_dtype()
    gradients = torch.is_grad_enabled()
    handlers = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
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


@contextmanager
def nameable_preload(site: Path = SITE) -> Iterator[None]:
    """Inside, LD_PRELOAD has what vLLM's CPU platform would put there, by names without spaces.

    It adds torch's libgomp and its own libtcmalloc by their full paths. LD_PRELOAD cannot hold a path with a space, and
    each child process of the start would complain. Where `site`, the folder of the packages, has none, vLLM does it.
    """
    if " " not in str(site):
        yield
        return
    with TemporaryDirectory(prefix="megatron-srpo-") as folder:
        found = [next(iter(sorted(site.glob(pattern))), None) for pattern in PRELOADED]
        links = [Path(folder) / library.name for library in found if library is not None]
        for link, library in zip(links, filter(None, found), strict=True):
            link.symlink_to(library)
        os.environ["LD_PRELOAD"] = ":".join(filter(None, [os.environ.get("LD_PRELOAD"), *map(str, links)]))
        yield
