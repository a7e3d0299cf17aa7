"""Publishes of LoRA adapters alone to real servers."""

from __future__ import annotations

import os
import signal

import pytest

from tests.lora_reference import make_adapter
from tests.tiny_engines import SAMPLED, VOCAB, answers, tiny_engine, tiny_requests, tiny_servers
from tests.tiny_models import make_tiny_model
from tests.unit.test_rollout_adapters import LORA, TARGETS, factors


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("base"), vocab=VOCAB)


@pytest.fixture(scope="module")
def published(base, tmp_path_factory):
    """What a trainer publishes at first, and later."""
    places = [tmp_path_factory.mktemp("adapter") for _ in range(2)]
    return [
        factors(make_adapter(base, place, targets=TARGETS, rank=LORA.rank, alpha=12, seed=seed))
        for seed, place in enumerate(places)
    ]


@pytest.fixture(scope="module")
def expected(base, published):
    """What an engine in this process answers after each publish."""
    with tiny_engine(base, adapters=LORA) as engine:
        found = []
        for version, items in enumerate(published):
            engine.publish(items, version)
            found.append(answers(engine))
    return found


@pytest.mark.slow
def test_a_server_answers_as_an_engine_in_this_process_also_after_it_was_lost(base, published, expected, tmp_path):
    said: list[str] = []
    with tiny_servers(base, tmp_path, said=said, adapters=LORA) as servers:
        servers.publish(published[0], 0)
        assert answers(servers) == expected[0] != expected[1]
        servers.publish(published[1], 1)
        assert answers(servers) == expected[1]
        servers.publish(published[0], 0)  # the version of model.path, which a new server would have
        (server,) = servers._fleet.servers
        os.killpg(server.process.pid, signal.SIGKILL)
        again = servers.generate(tiny_requests(), SAMPLED)
        assert [(one.token_ids, one.logprobs, one.finish_reason) for one in again] == expected[0]["sampled"]
    assert any("server 0" in line for line in said)
