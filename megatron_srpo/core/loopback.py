"""Keeps the sockets of a run on one machine on the loopback interface.

A rendezvous store of torch listens on every interface and unpickles what it is sent, and gloo listens on the address of
the host name. Anybody who can connect to them can run code in the job.
"""

from __future__ import annotations

import importlib
import ipaddress
import os
import socket
from datetime import timedelta
from urllib.parse import urlsplit

ADDRESS = "127.0.0.1"
DEFAULT_TIMEOUT = timedelta(seconds=300)  # torch's own


def is_one_machine() -> bool:
    """Whether all ranks of this job are on this machine, by torchrun's variables."""
    return os.environ.get("WORLD_SIZE", "1") == os.environ.get("LOCAL_WORLD_SIZE", "1")


def is_loopback(host: str) -> bool:
    """Whether a host name or an address means this machine's loopback interface. No name is looked up."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def host_is_loopback(url: str) -> bool:
    """The same for the host of a URL."""
    return is_loopback(urlsplit(url).hostname or "")


def interface() -> str:
    """The name of the loopback interface: lo on Linux."""
    return next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")


def confine(*, nccl: bool = True) -> None:
    """Make gloo, vLLM and (unless `nccl` is False) NCCL use the loopback interface, unless the user has named another
    one, and make stores listen on it. Call it before the first process group."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", interface())
    os.environ.setdefault("VLLM_HOST_IP", ADDRESS)
    if nccl:
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface())
    confine_stores()


def confine_stores() -> None:
    """Make every store that this process opens for a loopback address listen on that address only. torch has the
    parameter for it (`master_listen_fd`), but its own callers do not use it."""
    import torch.distributed as dist
    from torch.distributed.elastic.rendezvous import c10d_rendezvous_backend

    if getattr(dist.TCPStore, "confined", False):
        return
    original = dist.TCPStore

    class LoopbackStore(original):  # type: ignore[misc, valid-type]
        """A TCPStore with torch's own arguments."""

        confined = True

        def __init__(
            self, host_name: str, port: int, world_size: int | None = None, is_master: bool = False,
            timeout: timedelta = DEFAULT_TIMEOUT, wait_for_workers: bool = True, multi_tenant: bool = False,
            master_listen_fd: int | None = None, use_libuv: bool = True,
        ) -> None:  # fmt: skip
            host = ADDRESS if host_name == "localhost" else host_name
            if is_master and master_listen_fd is None and is_loopback(host):
                listener = _listen(host, port)
                port, master_listen_fd = listener.getsockname()[1], listener.detach()
            super().__init__(
                host, port, world_size, is_master, timeout, wait_for_workers, multi_tenant, master_listen_fd, use_libuv
            )

    # By its name, because the package has a function of the same name.
    rendezvous = importlib.import_module("torch.distributed.rendezvous")
    for module in (dist, rendezvous, c10d_rendezvous_backend):
        module.TCPStore = LoopbackStore  # type: ignore[attr-defined]


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:  # what the callers of TCPStore expect
        raise RuntimeError(f"EADDRINUSE: {host}:{port}: {error.strerror}") from error
