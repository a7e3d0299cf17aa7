"""The stream of weights, over real gloo groups whose ranks are threads of this process."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from threading import Event

import pytest
import torch
import torch.distributed as dist

from megatron_srpo.bridge import BridgeError
from megatron_srpo.bridge import weight_stream as module
from megatron_srpo.bridge.bounded_nccl import BoundedNccl
from megatron_srpo.bridge.weight_stream import (
    Group,
    Sender,
    Streams,
    local_address,
    pack,
    receive_stream,
    sender_of,
    unpack,
)
from tests.fake_nccl import PATIENCE, FakeNccl

CPU = torch.device("cpu")


def items() -> list[tuple[str, torch.Tensor]]:
    """Odd shapes and dtypes; small ones between large ones; a view that is not contiguous."""
    draw = torch.Generator().manual_seed(0)
    found = [
        ("scalar", torch.tensor(2.5)), ("odd", torch.randn(3, 5, generator=draw).bfloat16()),
        ("large", torch.randn(40, 50, generator=draw)), ("turned", torch.randn(7, 9, generator=draw).T),
        ("bytes", torch.arange(13, dtype=torch.uint8)), ("double", torch.randn(4, generator=draw).double()),
    ]  # fmt: skip
    return found + [(f"norm.{i}", torch.randn(17, generator=draw)) for i in range(6)]


def same(found: list[tuple[str, torch.Tensor]]) -> bool:
    expected = items()
    return [name for name, _ in found] == [name for name, _ in expected] and all(
        ours.dtype == theirs.dtype and torch.equal(ours, theirs)
        for (_, ours), (_, theirs) in zip(found, expected, strict=True)
    )


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch):
    monkeypatch.setattr(module, "PACKED_BYTES", 200)


def test_packed_tensors_are_unpacked_bit_for_bit_and_small_ones_share_a_buffer():
    packed = list(pack(items()))
    assert same([pair for header, flat in packed for pair in unpack(header, flat, CPU)])
    assert 4 < len(packed) < len(items())
    assert max(flat.numel() for header, flat in packed if header.count("[[") and header.count("],") > 1) <= 200


def test_a_large_tensor_is_sent_without_a_copy():
    (_, large) = items()[2]
    _, flat = next(iter(pack([("large", large)])))
    assert flat.data_ptr() == large.data_ptr()


@pytest.fixture(params=[("gloo", PATIENCE), ("nccl", PATIENCE)], ids=["gloo", "nccl"])
def engines(request, monkeypatch):
    """A sender, and two engines of two workers each, whose ends `receive` takes."""
    backend, patience = request.param
    monkeypatch.setattr(dist, "ProcessGroupNCCL", FakeNccl, raising=False)
    monkeypatch.setattr(FakeNccl, "aborted", [])
    sender = Sender("127.0.0.1", timeout_s=patience, backend=backend, device=CPU)
    with ThreadPoolExecutor(4) as pool:
        ends: dict[str, list[Future]] = {}
        for name in ("a", "b"):
            address = sender.new_address(name, 2)
            ends[name] = [pool.submit(Group, address, rank, CPU) for rank in (1, 2)]
            sender.join(name, address)
        groups = {name: [end.result(PATIENCE) for end in found] for name, found in ends.items()}

        def receive(name: str, work: Callable[[Group], object]) -> list[Future]:
            return [pool.submit(work, group) for group in groups[name]]

        yield sender, receive, groups


def everything(group: Group) -> bool:
    return same([(name, tensor.clone()) for name, tensor in receive_stream(group, CPU)])


def results(futures: list[Future]) -> list:
    return [future.result(PATIENCE) for future in futures]


def test_every_worker_of_every_engine_gets_everything_again_and_again(engines):
    sender, receive, _ = engines
    for _ in range(2):
        futures = receive("a", everything) + receive("b", everything)
        assert sender.send(["a", "b"], items()) == {}
        assert results(futures) == [True] * 4


def test_one_engine_alone_can_be_sent_to(engines):
    sender, receive, _ = engines
    futures = receive("b", everything)
    assert sender.send(["b"], items()) == {} and results(futures) == [True, True]


@pytest.mark.parametrize("engines", [("gloo", PATIENCE)], indirect=True, ids=["gloo"])
def test_an_engine_that_leaves_half_way_is_named_and_the_other_gets_everything(engines):
    sender, receive, _ = engines

    def leave(group: Group) -> None:
        group.receive()
        del group._group  # closes its connections

    leaving, staying = receive("a", leave), receive("b", everything)
    failed = sender.send(["a", "b"], items())
    assert list(failed) == ["a"] and "peer" in failed["a"]
    assert results(leaving) == [None, None] and results(staying) == [True, True]
    assert not sender.has_group("a") and sender.has_group("b")


@pytest.mark.parametrize("engines", [("gloo", 2.0), ("nccl", 2.0)], indirect=True, ids=["gloo", "nccl"])
def test_an_engine_that_hangs_half_way_is_named_and_the_other_gets_everything(engines, request):
    sender, receive, _ = engines
    over = Event()

    def hang(group: Group) -> None:
        group.receive()
        over.wait()
        del group._group

    def count(group: Group) -> int:
        return sum(1 for _ in receive_stream(group, CPU))

    hanging, going_on = receive("a", hang), receive("b", count)
    large = [(str(i), torch.zeros(16 * 2**20, dtype=torch.uint8)) for i in range(4)]  # more than sockets hold
    failed = sender.send(["a", "b"], large)
    over.set()
    assert list(failed) == ["a"] and "imed out" in failed["a"]
    assert results(hanging) == [None, None] and results(going_on) == [4, 4]
    assert len(FakeNccl.aborted) == (request.node.callspec.params["engines"][0] == "nccl")  # this group alone


@pytest.mark.parametrize("engines", [("nccl", 1.0)], indirect=True, ids=["nccl"])
def test_a_rank_that_does_not_come_to_an_nccl_group_is_an_error_of_the_join(engines):
    sender, _, _ = engines
    with pytest.raises(RuntimeError, match=r"[Tt]imed? ?out"):
        sender.join("c", sender.new_address("c", 1))


def test_when_the_export_fails_every_worker_hears_why(engines):
    sender, receive, _ = engines

    def broken():
        yield from items()[:4]
        raise ZeroDivisionError("in the export")

    futures = receive("a", everything)
    with pytest.raises(ZeroDivisionError, match="in the export"):
        sender.send(["a"], broken())
    for future in futures:
        with pytest.raises(BridgeError, match="the trainer stopped sending: ZeroDivisionError: in the export"):
            future.result(PATIENCE)
    futures = receive("a", everything)
    assert sender.send(["a"], items()) == {} and results(futures) == [True, True]


def test_workers_reports_arrive_once_and_refusals_are_raised(engines):
    sender, _, groups = engines
    worker = groups["a"][0]
    assert sender.report("a", "publish", 0) is None
    worker.report("publish/0", '{"checksums": null}')
    assert sender.report("a", "publish", 0) == {"checksums": None}
    assert sender.report("a", "publish", 0) is None
    worker.report("publish/1", '{"error": "BridgeError: a does not fit"}')
    with pytest.raises(BridgeError, match=r"^a: a does not fit$"):
        sender.report("a", "publish", 1)
    worker.report("publish/1", '{"error": "MemoryError: too large"}')
    with pytest.raises(RuntimeError, match=r"^MemoryError: too large$"):
        sender.report("a", "publish", 1)


def test_the_drivers_address_is_the_one_that_the_other_side_sees():
    assert local_address("127.0.0.1", 9) == "127.0.0.1"
    assert local_address("localhost", 9) in ("127.0.0.1", "::1")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert local_address(*taken.getsockname()[:2]) == "127.0.0.1"


@pytest.mark.parametrize(("engines", "ranks"), [(1, 1), (3, 8), (8, 8), (7, 3), (64, 8), (32, 256)])
def test_engines_are_spread_over_all_ranks_so_that_none_sends_more_copies_than_it_must(engines, ranks):
    senders = [sender_of(engine, engines, ranks) for engine in range(engines)]
    assert set(senders) <= set(range(ranks)) and senders == sorted(senders)
    most = max(senders.count(rank) for rank in range(ranks))
    assert most == -(-engines // ranks)
    if engines <= ranks:  # spread, so that all nodes send
        assert {later - earlier for earlier, later in itertools.pairwise(senders)} <= {
            ranks // engines, -(-ranks // engines)
        }  # fmt: skip


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_each_rank_sends_to_its_own_engines_and_a_lost_engine_of_one_rank_disturbs_no_other(backend, monkeypatch):
    monkeypatch.setattr(dist, "ProcessGroupNCCL", FakeNccl, raising=False)
    driver = Sender("127.0.0.1", timeout_s=PATIENCE, backend=backend, device=CPU)
    ranks = [driver, Streams(CPU), Streams(CPU)]  # the other ranks find the rendezvous by the groups' addresses
    names = ["a", "b", "c", "d"]
    shares = {name: sender_of(number, len(names), len(ranks)) for number, name in enumerate(names)}
    assert list(shares.values()) == [0, 0, 1, 2]
    addresses = {name: driver.new_address(name, 1) for name in names}
    with ThreadPoolExecutor(8) as pool:
        workers = {name: pool.submit(Group, addresses[name], 1, CPU) for name in names}
        joined = [
            pool.submit(rank.join_all, {name: addresses[name] for name in names if shares[name] == number})
            for number, rank in enumerate(ranks)
        ]
        assert results(joined) == [{}, {}, {}]

        def leave(group: Group) -> bool:
            group.receive()
            del group._group
            return True

        lost = "c" if backend == "gloo" else ""  # FakeNccl has no connections to close
        received = {
            name: pool.submit(leave if name == lost else everything, worker.result(PATIENCE))
            for name, worker in workers.items()
        }
        sent = [
            pool.submit(rank.send, [name for name in names if shares[name] == number], items())
            for number, rank in enumerate(ranks)
        ]
        failed = results(sent)
        assert [list(found) for found in failed] == [[], [lost] if lost else [], []]
        assert results(list(received.values())) == [True] * 4
        workers["d"].result().report("publish/0", '{"checksums": null}')  # rank 0 hears of all engines
        assert driver.report("d", "publish", 0) == {"checksums": None} and not driver.has_group("d")
    assert (driver.send([], iter(items())), Streams(CPU).send([], iter(items()))) == ({}, {})


@pytest.mark.skipif(not dist.is_nccl_available() or torch.cuda.is_available(), reason="needs torch for CUDA and no GPU")
def test_torchs_own_nccl_group_takes_what_ours_gives_it():
    """The one thing that FakeNccl cannot say: the names and arguments of the real class."""
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=5)
    assert options._timeout == timedelta(seconds=5)
    assert {"broadcast", "abort"} <= set(dir(dist.ProcessGroupNCCL))
    with pytest.raises(ValueError, match="no GPUs found"):  # after it has taken the arguments
        BoundedNccl(dist.HashStore(), 0, 1, timedelta(seconds=5), CPU)
    with pytest.raises(TypeError):
        dist.ProcessGroupNCCL(dist.HashStore(), 0, 1, "no options")
