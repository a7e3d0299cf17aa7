"""Sockets of a run on one machine: loopback only."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from megatron_srpo.config import RolloutConfig
from megatron_srpo.core import loopback
from megatron_srpo.run.session import _all_engines_are_here

STORES = """
import os, socket
from datetime import timedelta
import psutil
from megatron_srpo.core import loopback
loopback.confine()
import torch.distributed as dist
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import create_backend
from torch.distributed.elastic.utils.distributed import create_c10d_store

def addresses():
    return {s.laddr.ip for s in psutil.Process().net_connections("inet") if s.status == "LISTEN"}

parameters = RendezvousParameters("c10d", "localhost:0", "id", 1, 1, is_host="true")
backend, rendezvous_store = create_backend(parameters)  # torchrun --standalone
static = create_c10d_store(True, "127.0.0.1", 0, 1)  # torchrun --master-addr
with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK="0", WORLD_SIZE="1")
dist.init_process_group("gloo")  # without torchrun
group = dist.new_group(backend="gloo")
static.set("key", "value")
assert dist.TCPStore("127.0.0.1", static.port, 1, False).get("key") == b"value"
assert addresses() == {"127.0.0.1"}, addresses()
try:
    dist.TCPStore("127.0.0.1", port, 1, True)
except RuntimeError as error:
    assert "EADDRINUSE" in str(error)
else:
    raise AssertionError("the port is in use")
"""


def test_every_kind_of_store_and_group_listens_on_loopback_only():
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "VLLM_HOST_IP", "TORCHELASTIC_USE_AGENT_STORE")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run([sys.executable, "-c", STORES], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "[::1]", "localhost"])
def test_loopback_addresses_are_known(host):
    assert loopback.is_loopback(host) and loopback.host_is_loopback(f"http://{host}:1") is (host != "::1")


@pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.7", "::", "node-7", ""])
def test_other_addresses_are_not_loopback(host):
    assert not loopback.is_loopback(host)


def test_one_machine_is_told_from_several_by_torchruns_variables(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert loopback.is_one_machine()
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert not loopback.is_one_machine()


def test_what_the_user_has_named_stays_and_nccl_is_free_for_engines_elsewhere(monkeypatch):
    monkeypatch.setattr(loopback, "confine_stores", lambda: None)
    for name in ("NCCL_SOCKET_IFNAME", "VLLM_HOST_IP"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    loopback.confine(nccl=False)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0" and "NCCL_SOCKET_IFNAME" not in os.environ


@pytest.mark.parametrize(
    ("rollout", "here"),
    [
        ({}, True),
        ({"placement": "servers", "servers": ["http://127.0.0.1:8000"]}, True),
        ({"placement": "servers", "servers": ["http://10.0.0.7:8000"]}, False),
        ({"placement": "servers", "server_host": "0.0.0.0"}, False),
    ],
)
def test_engines_elsewhere_are_recognised_by_their_addresses(rollout, here):
    assert _all_engines_are_here(SimpleNamespace(rollout=RolloutConfig(**rollout))) is here
