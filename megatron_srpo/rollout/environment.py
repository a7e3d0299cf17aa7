"""What must be set before vLLM is imported, and what a killed run may have left behind."""

from __future__ import annotations

import atexit
import contextlib
import glob
import logging
import os
import re
import shutil
import socket
import sys
import tempfile
import zlib
from pathlib import Path

SOCKETS = "VLLM_RPC_BASE_PATH"  # where vLLM puts its sockets; an address has 107 characters at most
SHARED_MEMORY = Path("/dev/shm")
PREFIX = "msrpo"
LONGEST_FOLDER = 107 - len("/") - 36  # <sys/un.h> takes 107 bytes for the path of a socket, whose name is a UUID

COMMON = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in this process, so that weights are passed, not copied
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",  # models and tokenizers are folders
    "TOKENIZERS_PARALLELISM": "false",
}
CPU = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # binding would put the engines of all ranks on the same cores
    "TORCHDYNAMO_DISABLE": "1",  # compiling costs more than small models gain
}


def prepare_environment(device: str) -> None:
    """Set vLLM's variables for `device` ("cpu" or "cuda") where the user has not, and clear leftovers of killed runs.

    Call it before anything imports vLLM. On a CPU it also sees to it that all ranks of the machine together use no more
    threads than there are cores: more of them are slower by an order of magnitude.
    """
    for name, value in (COMMON | CPU if device == "cpu" else COMMON).items():
        os.environ.setdefault(name, value)
    _own_socket_folder()
    if device != "cpu":
        return
    # It says once a rank that Triton cannot compile for CPUs, which nothing here asks for.
    logging.getLogger("vllm.triton_utils.importing").setLevel(logging.CRITICAL)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # and where it binds memory
    if os.environ["TORCHDYNAMO_DISABLE"] == "1" and "torch._dynamo.config" in sys.modules:
        sys.modules["torch._dynamo.config"].disable = True  # it reads the variable when it is imported
    if "OMP_NUM_THREADS" not in os.environ:
        import torch

        cores, ranks = len(os.sched_getaffinity(0)), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        os.environ["OMP_NUM_THREADS"] = str(max(1, cores // ranks))
        torch.set_num_threads(max(1, cores // ranks))
    remove_leftovers()


def _own_socket_folder() -> None:
    """vLLM leaves a socket in the temporary folder at every start: it gets one there that goes with the process. Where
    the temporary folder's name is too long for that, as a job's may be, it is in /tmp."""
    places = list(dict.fromkeys((Path(tempfile.gettempdir()), Path("/tmp"))))
    for place in places:
        remove_leftovers(place)
    if SOCKETS in os.environ:
        return
    folders = [place / f"{shared_memory_name(os.getpid())}-sockets" for place in places]
    folder = next((folder for folder in folders if len(os.fsencode(folder)) <= LONGEST_FOLDER), None)
    if folder is None:
        return
    folder.mkdir(mode=0o700, exist_ok=True)
    os.environ[SOCKETS] = str(folder)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)


def shared_memory_name(pid: int) -> str:
    """What the shared memory blocks of an engine start with: host, process namespace and a process id. A later run can
    tell from it whether their owner is alive, and two runs on one machine never meet."""
    return f"{PREFIX}.{_machine()}.{pid}"


def _machine() -> str:
    """This host and process namespace: process ids mean nothing outside it."""
    namespace = "0"
    with contextlib.suppress(OSError):
        namespace = str(os.stat("/proc/self/ns/pid").st_ino)
    return f"{zlib.crc32(socket.gethostname().encode()):08x}-{namespace}"


def remove_leftovers(folder: Path = SHARED_MEMORY) -> list[str]:
    """Unlink shared memory (or, in another folder, what else has such a name) of our dead processes; returns the names.

    Only what carries our own name, belongs to this user, was made in this process namespace, and whose process is
    gone. Whatever else lies there, vLLM's own names included, may be in use by somebody.
    """
    ours = re.compile(rf".?{PREFIX}\.{re.escape(_machine())}\.(\d+)-.*")
    removed = []
    for path in folder.iterdir() if folder.is_dir() else ():
        found = ours.fullmatch(path.name)
        with contextlib.suppress(OSError):
            if found and path.stat().st_uid == os.getuid() and not Path(f"/proc/{found[1]}").exists():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                removed.append(path.name)
    return removed


def unlink_blocks(name: str, folder: Path = SHARED_MEMORY) -> None:
    """Unlink the blocks of an engine that runs: who has mapped them keeps them, and no crash can leave them behind."""
    for path in folder.glob(f"*{glob.escape(name)}-*"):
        with contextlib.suppress(OSError):
            path.unlink()
