"""Prepares the environment before vLLM is imported, and removes what a killed run may have left behind."""

from __future__ import annotations

import atexit
import contextlib
import glob
import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path

from megatron_srpo.core.own_names import PREFIX, SHARED_MEMORY, remove_leftovers, shared_memory_name

SOCKETS = "VLLM_RPC_BASE_PATH"  # where vLLM puts its sockets; an address has 107 characters at most
LONGEST_FOLDER = 107 - len("/") - 36  # <sys/un.h> takes 107 bytes for the path of a socket, whose name is a UUID

# The variables of CUDA, of network libraries, of compilers, and of vLLM and what it is made of. Those of torchrun
# (RANK, MASTER_ADDR, …) are for this process and not among them.
ENGINE_PREFIXES = (
    "VLLM_", "CUDA_", "NVIDIA_", "NCCL_", "GLOO_", "UCX_", "FI_", "IBV_", "ROCR_", "HIP_", "TORCH_LOGS", "TORCH_CPP_",
    "TORCH_CUDA_", "TORCHINDUCTOR_", "TORCHDYNAMO_", "PYTORCH_", "TRITON_", "FLASHINFER_", "SAFETENSORS_", "CC", "CXX",
    "TRANSFORMERS_",
)  # fmt: skip

COMMON = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in this process and takes weights without copies
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
    """Set vLLM's variables for `device` ("cpu" or "cuda") unless the user has set them, and remove the leftovers of
    killed runs.

    Call it before anything imports vLLM. On a CPU it also limits the threads, so that all ranks of the machine together
    use no more threads than there are cores: more threads are slower by an order of magnitude.
    """
    for name, value in (COMMON | CPU if device == "cpu" else COMMON).items():
        os.environ.setdefault(name, value)
    _own_socket_folder()
    _own_temporary_folder()
    if device != "cpu":
        return
    # Every rank would log that Triton cannot compile for CPUs, which nothing here needs.
    logging.getLogger("vllm.triton_utils.importing").setLevel(logging.CRITICAL)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # vLLM logs where it binds memory
    if os.environ["TORCHDYNAMO_DISABLE"] == "1" and "torch._dynamo.config" in sys.modules:
        # The module reads the variable only when it is imported.
        sys.modules["torch._dynamo.config"].disable = True  # type: ignore[attr-defined]
    if "OMP_NUM_THREADS" not in os.environ:
        import torch

        cores, ranks = len(os.sched_getaffinity(0)), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        os.environ["OMP_NUM_THREADS"] = str(max(1, cores // ranks))
        torch.set_num_threads(max(1, cores // ranks))
    remove_leftovers()


def _own_socket_folder() -> None:
    """Give vLLM a folder for its sockets that is removed with this process: it leaves one socket at every start.

    The folder is in the temporary folder, or in /tmp when the temporary folder's name is too long for a socket."""
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


def _own_temporary_folder() -> None:
    """Make the temporary folder of this process and its children (W&B, vLLM, reward functions) one that is removed with
    this process, or by the next start if it is killed. Kernels that torch has compiled stay where they are kept."""
    place = Path(tempfile.gettempdir())
    folder = place / f"{shared_memory_name(os.getpid())}-tmp"
    if place.name.startswith(f"{PREFIX}.") or len(os.fsencode(folder)) > LONGEST_FOLDER:
        return  # it is one already, or sockets of others would not fit in it
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(place / f"torchinductor_{os.getuid()}"))
        os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
        atexit.register(shutil.rmtree, folder, ignore_errors=True)


def unlink_blocks(name: str, folder: Path = SHARED_MEMORY) -> None:
    """Unlink the blocks of a running engine: its processes have mapped them and keep them, and a crash leaves
    nothing."""
    for path in folder.glob(f"*{glob.escape(name)}-*"):
        with contextlib.suppress(OSError):
            path.unlink()
