"""A publish over NCCL to a real vLLM worker, with gloo in the place of NCCL. GPUs' workers inherit what is tested here.

The worker, its weight-transfer calls (vllm.v1.worker.gpu_worker.Worker, of which the CPU's worker is a subclass), the
registry of backends, and the model are vLLM's own. The calls come in the order of the HTTP routes of a server.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megatron_srpo.bridge import Verifier
from megatron_srpo.bridge import weight_stream as stream
from megatron_srpo.bridge.weight_stream import Sender
from megatron_srpo.rollout.vllm.worker_extension import TRANSFER_BACKEND
from tests.fake_nccl import PATIENCE, FakeNccl
from tests.tiny_engines import VOCAB, tiny_engine
from tests.tiny_models import make_tiny_model

CPU = torch.device("cpu")
NAME = "server"


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """A running engine whose worker has our backend, and the weights of another model of the same shape."""
    folder = tmp_path_factory.mktemp("nccl")
    model, other = (make_tiny_model(folder / name, vocab=VOCAB, seed=seed) for name, seed in (("old", 0), ("new", 1)))

    def attach(wrapper) -> None:
        """What Worker.load_model does for an engine with a weight_transfer_config."""
        from vllm.config import WeightTransferConfig
        from vllm.distributed.weight_transfer import WeightTransferEngineFactory

        from megatron_srpo.rollout.vllm.weight_receiver import WeightReceiver

        worker = wrapper.worker
        if TRANSFER_BACKEND not in WeightTransferEngineFactory._registry:
            WeightTransferEngineFactory.register_engine(TRANSFER_BACKEND, WeightReceiver)
        worker.weight_transfer_engine = WeightTransferEngineFactory.create_engine(
            WeightTransferConfig(backend=TRANSFER_BACKEND), worker.vllm_config, CPU, worker.model_runner.get_model()
        )
        assert type(worker.weight_transfer_engine) is WeightReceiver

    with tiny_engine(model) as started:
        started._llm.collective_rpc(attach)
        yield SimpleNamespace(
            call=lambda method, *arguments: started._llm.collective_rpc(method, args=arguments)[0],
            weights=load_file(other / "model.safetensors"),
            before=load_file(model / "model.safetensors"),
        )


@pytest.fixture(autouse=True)
def nccl(monkeypatch):
    monkeypatch.setattr(dist, "ProcessGroupNCCL", FakeNccl, raising=False)
    monkeypatch.setattr(FakeNccl, "aborted", [])
    monkeypatch.setattr(FakeNccl, "made", [])
    monkeypatch.setattr(stream, "PACKED_BYTES", 4096)  # several headers with several tensors, and large ones alone


@contextmanager
def joined(engine, *, patience: float = PATIENCE) -> Iterator[tuple[Sender, ThreadPoolExecutor]]:
    """The trainer's end, after the worker has joined its group. The trainer works in a thread, the worker in this
    one."""
    sender = Sender("127.0.0.1", timeout_s=patience, backend="nccl", device=CPU)
    with ThreadPoolExecutor(1) as trainer:
        address = sender.new_address(NAME, 1)
        joining = trainer.submit(sender.join, NAME, address)
        # As JSON, as it comes over HTTP.
        engine.call("init_weight_transfer_engine", json.loads(json.dumps({"group": asdict(address)})))
        joining.result(PATIENCE)
        yield sender, trainer


def publish(engine, sender: Sender, trainer: ThreadPoolExecutor, weights: dict, key: str = "publish") -> dict:
    """A whole publish; returns the worker's report."""
    sent = trainer.submit(sender.send, [NAME], list(weights.items()))
    engine.call("start_weight_update")
    engine.call("update_weights", {"report": key, "verify": True})
    engine.call("finish_weight_update")
    assert sent.result(PATIENCE) == {}
    return sender.report(NAME, key, 0)


def verified(weights: dict, report: dict) -> None:
    verifier = Verifier(1)
    assert list(verifier.record(weights.items()))
    verifier.compare(NAME, [report["checksums"]])
    assert verifier.unplaced == []


def test_the_worker_is_the_one_that_gpus_workers_are(engine):
    from vllm.v1.worker.gpu_worker import Worker

    def inherited(wrapper) -> dict[str, bool]:
        names = ("init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update")
        return {name: getattr(type(wrapper.worker), name) is getattr(Worker, name) for name in names}

    assert set(engine.call(inherited).values()) == {True}


def test_all_weights_arrive_in_the_worker_again_and_again_and_both_ends_launch_the_same_operations(engine):
    with joined(engine) as (sender, trainer):
        for weights in (engine.weights, engine.before, engine.weights):
            verified(weights, publish(engine, sender, trainer, weights))
        trainers, workers = sorted(FakeNccl.made, key=lambda group: group.rank)
        assert (trainers.rank, workers.rank, trainers.size, workers.size) == (0, 1, 2, 2)
        assert trainers.launched == workers.launched
        headers = list(stream.pack(list(engine.weights.items())))
        assert len(trainers.launched) == 1 + 3 * (3 * len(headers) + 2)  # the first one connects; the end has no bytes
        payloads = [size for _, size in trainers.launched[3::3]][: len(headers)]
        assert payloads == [flat.numel() for _, flat in headers]
        assert FakeNccl.aborted == []


def test_calls_in_another_order_are_refused_and_do_no_harm(engine):
    with joined(engine) as (sender, trainer):
        with pytest.raises(RuntimeError, match="start_weight_update must be called before"):
            engine.call("update_weights", {"report": "early"})
        with pytest.raises(RuntimeError, match="without a matching start_weight_update"):
            engine.call("finish_weight_update")
        engine.call("start_weight_update")
        with pytest.raises(RuntimeError, match="already active"):
            engine.call("start_weight_update")
        engine.call("finish_weight_update")
        verified(engine.weights, publish(engine, sender, trainer, engine.weights))


def test_a_weight_of_another_shape_is_refused_only_after_the_whole_stream_and_the_group_stays_usable(engine):
    wrong = dict(engine.weights)
    name = "model.layers.1.mlp.down_proj.weight"
    wrong[name] = wrong[name].T.contiguous()
    with joined(engine) as (sender, trainer):
        sent = trainer.submit(sender.send, [NAME], list(wrong.items()))
        engine.call("start_weight_update")
        with pytest.raises(Exception, match=f"{name}.*shape"):
            engine.call("update_weights", {"report": "wrong"})
        assert sent.result(PATIENCE) == {} and FakeNccl.aborted == []  # the sender did not wait
        with pytest.raises(Exception, match="shape"):
            sender.report(NAME, "wrong", 0)
        verified(engine.weights, publish(engine, sender, trainer, engine.weights))


def test_a_trainer_that_is_lost_half_way_is_an_error_of_the_worker_which_takes_the_next_trainers_weights(engine):
    items = list(engine.weights.items())
    with joined(engine, patience=0.5) as (sender, trainer):

        def half() -> None:
            for header, payload in list(stream.pack(items))[:3]:
                for frame in sender._groups[NAME].frames(header, payload):
                    sender._groups[NAME].start_broadcast(frame).wait()

        sent = trainer.submit(half)
        engine.call("start_weight_update")
        with pytest.raises(RuntimeError, match=r"timed out: no answer for 1\.5 s"):  # three times the trainer's limit
            engine.call("update_weights", {"report": "half"})
        sent.result(PATIENCE)
        assert [group.rank for group in FakeNccl.aborted] == [1]  # the worker's end of this group, and nothing else
        with pytest.raises(RuntimeError, match="timed out"):
            sender.report(NAME, "half", 0)
    with joined(engine) as (sender, trainer):
        verified(engine.weights, publish(engine, sender, trainer, engine.weights))


def test_a_worker_that_is_lost_half_way_is_named_by_the_trainer_within_its_limit(engine):
    with joined(engine, patience=1.0) as (sender, trainer):
        failed = trainer.submit(sender.send, [NAME], list(engine.weights.items()))  # the worker never receives
        assert list(failed.result(PATIENCE)) == [NAME]
        assert [group.rank for group in FakeNccl.aborted] == [0] and not sender.has_group(NAME)


def test_a_trainer_that_does_not_come_is_an_error_of_the_join_within_its_limit(engine):
    sender = Sender("127.0.0.1", timeout_s=0.3, backend="nccl", device=CPU)
    with pytest.raises(RuntimeError, match=r"[Tt]imed? ?out"):
        engine.call("init_weight_transfer_engine", {"group": asdict(sender.new_address(NAME, 1))})


@pytest.mark.parametrize(("tensor", "data"), [(1, 1), (2, 1), (2, 2)])
def test_workers_of_all_replicas_have_ranks_of_their_own_behind_the_trainers(tensor, data):
    from vllm.config import ParallelConfig

    from megatron_srpo.rollout.vllm.weight_receiver import WeightReceiver

    ranks = []
    for replica in range(data):
        for rank in range(tensor):
            parallel = ParallelConfig(tensor_parallel_size=tensor)
            parallel.data_parallel_index, parallel.rank = replica, rank
            config = SimpleNamespace(parallel_config=parallel, model_config=None)
            ranks.append(1 + WeightReceiver(None, config, CPU, torch.nn.Module())._rank)
    assert ranks == list(range(1, 1 + tensor * data))
