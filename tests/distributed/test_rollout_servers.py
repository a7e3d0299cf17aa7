"""Engines as vLLM servers: what they answer, the weights they get, and who may ask them. Real servers."""

from __future__ import annotations

import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from megatron_srpo.bridge import BridgeError
from megatron_srpo.rollout import RolloutError, SamplingSettings
from megatron_srpo.rollout.vllm.servers import ServersEngine
from tests.tiny_engines import (
    GREEDY,
    SAMPLED,
    VOCAB,
    BitFlip,
    answers,
    largest_error,
    tiny_engine,
    tiny_requests,
    tiny_servers,
    weights,
)
from tests.tiny_models import make_tiny_model


@dataclass
class Running:
    """Servers that were started from `old`, and what an engine in this process answers on `new`."""

    engine: ServersEngine
    old: Path
    new: Path
    expected: dict[str, Any]
    said: list[str]


def start(make_folder, family: str, dtype: str, *, tied: bool = True, timeout: float = 120.0, **settings: Any):
    old, new = (
        make_tiny_model(make_folder("model"), family, tied=tied, vocab=VOCAB, seed=seed, dtype=getattr(torch, dtype))
        for seed in (1, 2)
    )
    with tiny_engine(new, dtype) as engine:
        expected = answers(engine)
    said: list[str] = []
    with tiny_servers(old, make_folder("logs"), dtype, said=said, server_timeout_seconds=timeout, **settings) as engine:
        yield Running(engine, old, new, expected, said)


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    yield from start(tmp_path_factory.mktemp, "qwen3", "float32")


def check_equal(found: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-5) -> None:
    """The same tokens and ends; log-probs to rounding: requests arrive one by one, in batches of other sizes."""
    for name in ("greedy", "sampled"):
        for ours, theirs in zip(found[name], expected[name], strict=True):
            assert (ours[0], ours[2]) == (theirs[0], theirs[2])
            torch.testing.assert_close(list(ours[1]), list(theirs[1]), rtol=0, atol=tolerance)


def publish(running: Running, folder: Path, version: int) -> None:
    running.engine.publish(weights(folder).items(), version)


def test_servers_answer_as_an_engine_in_this_process_before_and_after_publishes(running):
    before = answers(running.engine)
    assert largest_error(running.old, running.engine.generate(tiny_requests(1), GREEDY)) < 1e-4
    publish(running, running.new, 1)
    check_equal(answers(running.engine), running.expected)
    publish(running, running.old, 2)
    check_equal(answers(running.engine), before)


def test_log_probs_are_those_of_transformers_in_float32_to_the_last_digits(running):
    publish(running, running.new, 3)
    rollouts = running.engine.generate(tiny_requests(), SAMPLED)
    assert largest_error(running.new, rollouts) < 1e-4
    assert largest_error(running.old, rollouts) > 0.1  # or the test could not fail
    assert all(torch.tensor(value, dtype=torch.float32).item() == value for r in rollouts for value in r.logprobs)


def test_every_token_says_which_publish_it_is_of(running):
    publish(running, running.new, 4)
    for rollout in running.engine.generate(tiny_requests(), SAMPLED):
        assert rollout.weight_version == 4 and rollout.token_versions is None  # all of one publish


def test_a_publish_that_does_not_fit_is_refused_by_name_and_the_next_repairs_it(running):
    items = list(weights(running.new).items())
    wrong = [(name, tensor[:-1] if name.endswith("layers.1.mlp.up_proj.weight") else tensor) for name, tensor in items]
    with pytest.raises(BridgeError, match=r"'model.layers.1.mlp.up_proj.weight' was published with shape \[95, 64\]"):
        running.engine.publish(wrong, 5)
    with pytest.raises(BridgeError, match="left 1 tensor"):
        running.engine.publish(items[:-1], 6)
    with pytest.raises(RuntimeError, match="Publish again first"):
        running.engine.generate(tiny_requests(), SAMPLED)
    publish(running, running.new, 7)
    check_equal(answers(running.engine), running.expected)


def test_a_bit_that_flips_on_the_way_is_found_and_its_tensor_named(running, monkeypatch):
    name = "model.layers.1.self_attn.k_proj.weight"
    monkeypatch.setattr(running.engine, "_verifier", BitFlip(name))
    with pytest.raises(BridgeError, match=f"verification: '{name}' arrived at server 0 with other values"):
        publish(running, running.new, 11)
    monkeypatch.undo()
    publish(running, running.new, 12)
    check_equal(answers(running.engine), running.expected)


def test_an_export_that_fails_half_way_is_raised_and_the_next_repairs_it(running):
    class Broken:
        def __iter__(self):
            yield from list(weights(running.old).items())[:6]
            raise ZeroDivisionError("in the export")

    with pytest.raises(ZeroDivisionError, match="in the export"):
        running.engine.publish(Broken(), 8)
    publish(running, running.new, 9)
    check_equal(answers(running.engine), running.expected)


def test_weights_that_can_be_had_only_once_are_refused(running):
    with pytest.raises(ValueError, match="iterated again"):
        running.engine.publish(iter(weights(running.new).items()), 10)


def status(url: str, method: str, headers: dict[str, str]) -> int:
    request = urllib.request.Request(url, method=method, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.parametrize(
    "path", ["/health", "/v1/models", "/pause", "/update_weights", "/inference/v1/generate", "/no"]
)
@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer "}])
def test_nobody_without_the_token_is_heard(running, path, headers):
    (server,) = running.engine._fleet.servers
    assert [status(server.client.url + path, method, headers) for method in ("GET", "POST")] == [401, 401]


def test_nothing_listens_beyond_loopback(running):
    (server,) = running.engine._fleet.servers
    processes = [psutil.Process(), *psutil.Process(server.process.pid).children(recursive=True)]
    listening = [
        connection.laddr.ip
        for process in processes for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]  # fmt: skip
    assert len(listening) > 2 and set(listening) == {"127.0.0.1"}


def test_a_prompt_without_room_is_refused_before_anything_is_sent(running):
    (request, *_) = tiny_requests(1)
    with pytest.raises(RolloutError, match="prompt 0 has 5 tokens: expected 1 to 2"):
        running.engine.generate([request], SamplingSettings(max_tokens=158))


def test_nothing_asked_is_nothing_answered(running):
    assert running.engine.generate([], GREEDY) == []
