"""LD_PRELOAD for engines on a CPU in an environment whose path has a space."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from pathlib import Path

import torch

NAMES = ("libgomp", "libtcmalloc")
SEPARATORS = re.compile(r"[ :]")  # ld.so splits LD_PRELOAD at both


def preload_links() -> str | None:
    """A value of LD_PRELOAD that names libgomp and tcmalloc by links without a space. None: vLLM's own value works.

    vLLM's CPU platform puts the paths of these two libraries into LD_PRELOAD, unless the variable names them already.
    With a space in them, every child process of the engine writes an error of ld.so. The child dies of it when nobody
    reads its standard error any more, and so does the engine's start. The links are in this process's own temporary
    folder, which `prepare_environment` has made and which is removed with the process.
    """
    vllm = Path(torch.__file__).parents[1] / "vllm"
    folders = (vllm.with_name("torch.libs"), Path(torch.__file__).parent / "lib", vllm / "libs")
    found = [sorted(path for folder in folders for path in folder.glob(f"{name}*.so*")) for name in NAMES]
    libraries = [paths[0] for paths in found if paths]
    folder = Path(tempfile.gettempdir())
    if not any(SEPARATORS.search(str(path)) for path in libraries) or SEPARATORS.search(str(folder)):
        return None
    links = [folder / path.name for path in libraries]
    for link, path in zip(links, libraries, strict=True):
        with contextlib.suppress(FileExistsError):
            link.symlink_to(path)
    return ":".join(filter(None, [*map(str, links), os.environ.get("LD_PRELOAD")]))
