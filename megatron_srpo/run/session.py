"""One rank's share of the machine: device, groups and the control channel."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_srpo.config import Config
from megatron_srpo.core import loopback
from megatron_srpo.core.quiet import quiet_libraries
from megatron_srpo.run.open_files import allow_open_files
from megatron_srpo.run.read_ahead import read_ahead

if TYPE_CHECKING:
    from megatron_srpo.mcore.control import Control
    from megatron_srpo.mcore.device import DevicePath
    from megatron_srpo.mcore.groups import Topology


@dataclass(frozen=True)
class Session:
    """What `open_session` has set up on this rank."""

    path: DevicePath
    topology: Topology
    control: Control


def prepare_libraries(config: Config) -> DevicePath:
    """Choose the device and set the environment of the libraries; afterwards vLLM may be imported."""
    _quiet()  # before the libraries are imported
    if loopback.is_one_machine():
        loopback.confine(nccl=_all_engines_are_here(config))
    from megatron_srpo.mcore import groups
    from megatron_srpo.mcore.device import choose_device
    from megatron_srpo.rollout import prepare_environment

    path = choose_device(config.run.device, groups.local_rank())
    prepare_environment(path.device.type)  # before vLLM is imported
    return path


@contextmanager
def open_session(config: Config) -> Iterator[Session]:
    """Inside the block this rank is in its process groups, and vLLM may be imported."""
    if config.rollout.placement == "colocated":  # the engines of a node need all weights, its policy only a share
        read_ahead(config.model.path)
    path = prepare_libraries(config)
    from megatron_srpo.mcore import groups
    from megatron_srpo.mcore.control import Control

    allow_open_files(int(os.environ.get("WORLD_SIZE", "1")))
    topology = groups.initialize(
        config.parallel, path, seed=config.run.seed, timeout_minutes=config.run.control_timeout_minutes
    )
    try:
        yield Session(path, topology, Control(topology))
    finally:
        groups.shutdown()


def _all_engines_are_here(config: Config) -> bool:
    """Whether weights go to engines on this machine only."""
    rollout = config.rollout
    return loopback.is_loopback(rollout.server_host) and all(map(loopback.host_is_loopback, rollout.servers))


def _quiet() -> None:
    """Silence what the libraries say of themselves at every start."""
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron asks for it with sequence parallelism
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # vLLM says where it binds memory as a warning of torch's
    quiet_libraries()
