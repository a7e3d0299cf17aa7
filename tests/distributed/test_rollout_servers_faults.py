"""Real vLLM servers that are killed or stopped while they generate and while they are given weights; other layouts.

Each start of a server takes half a minute of CPU: these tests are not in the default suite.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import replace

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_srpo.core.records import Rollout
from megatron_srpo.rollout import RolloutError, SamplingSettings
from megatron_srpo.rollout.fleet import Server
from tests.distributed.test_rollout_servers import Running, check_equal, publish, start
from tests.tiny_engines import PROMPTS, SAMPLED, answers, largest_error, tiny_requests, weights

pytestmark = pytest.mark.slow
LONG = SamplingSettings(temperature=1.0, max_tokens=100, ignore_eos=True)
LAYOUTS = {
    "tied-float32-tp2": ("qwen3", "float32", True, 2),
    "untied-float32-tp2": ("llama", "float32", False, 2),
    "untied-bfloat16": ("llama", "bfloat16", False, 1),
    "tied-bfloat16-tp2": ("qwen3", "bfloat16", True, 2),
    "experts-float32": ("qwen3_moe", "float32", False, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_answers_as_a_fresh_engine_after_a_publish(tmp_path_factory, layout):
    family, dtype, tied, size = LAYOUTS[layout]
    for running in start(tmp_path_factory.mktemp, family, dtype, tied=tied, tensor_parallel_size=size):
        publish(running, running.new, 1)
        if dtype == "float32":
            check_equal(answers(running.engine), running.expected)
        else:  # in bf16 another batch size or split changes the second digit, and then the tokens
            rollouts = running.engine.generate(tiny_requests(), SAMPLED)
            assert largest_error(running.new, rollouts) < 0.1 < largest_error(running.old, rollouts)


@pytest.mark.parametrize("size", [1, 2])
def test_servers_that_draft_answer_as_an_engine_that_does_not(tmp_path_factory, size):
    settings = {"tensor_parallel_size": size, "speculative_tokens": 4}
    for running in start(tmp_path_factory.mktemp, "qwen3", "float32", **settings):
        publish(running, running.new, 1)
        check_equal(answers(running.engine), running.expected)
        rollouts = running.engine.generate(tiny_requests(8), LONG)
        assert 0 < sum(rollout.accepted for rollout in rollouts) < sum(rollout.drafted for rollout in rollouts)
        assert largest_error(running.new, rollouts) < 1e-4
        check_equal(answers(running.engine), running.expected)


@torch.no_grad()
def largest_error_by_version(running: Running, rollouts: Sequence[Rollout]) -> float:
    """Largest |engine's − transformers'| log-prob of responses that publishes have paused. The engine has computed
    their caches again, so a token and all of its context are of the weights of its version."""
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (running.old, running.new)]
    largest = 0.0
    for rollout in rollouts:
        start = len(PROMPTS[rollout.prompt])
        ids = torch.tensor([[*PROMPTS[rollout.prompt], *rollout.token_ids]])
        both = torch.stack([model(ids).logits[0, start - 1 : -1].log_softmax(-1) for model in models])
        expected = both[rollout.token_versions, range(len(rollout.token_ids)), ids[0, start:]]
        largest = max(largest, (torch.tensor(rollout.logprobs) - expected).abs().max().item())
    return largest


def test_drafts_change_nothing_in_responses_that_a_publish_pauses(tmp_path_factory):
    settings = {"tensor_parallel_size": 2, "speculative_tokens": 4, "max_staleness": 1, "in_flight": "pause"}
    with contextmanager(start)(tmp_path_factory.mktemp, "qwen3", "float32", **settings) as running:
        engine = running.engine
        under_way = engine.submit(tiny_requests(8), replace(LONG, max_tokens=140))
        wait_until(running, lambda: sum(len(server.jobs) for server in engine._fleet.servers) > 20)
        # When one more is answered, those before it have tokens, too.
        engine.collect(engine.submit(tiny_requests(1), replace(LONG, max_tokens=1)))
        publish(running, running.new, 1)
        rollouts = engine.collect(under_way)
        of_both = [rollout for rollout in rollouts if {0, 1} == set(rollout.token_versions or ())]
        assert of_both and not any(rollout.stale for rollout in rollouts)
        assert 0 < sum(rollout.accepted for rollout in of_both) < sum(rollout.drafted for rollout in of_both)
        assert largest_error_by_version(running, of_both) < 1e-4
        assert (
            min(largest_error(folder, of_both) for folder in (running.old, running.new)) > 0.1
        )  # or it could not fail
        check_equal(answers(engine), running.expected)


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    yield from start(tmp_path_factory.mktemp, "qwen3", "float32", num_servers=2, timeout=10.0, max_server_restarts=5)


@pytest.fixture
def sound(running):
    """Both servers answer with the old weights before the test, and with the new ones after it."""
    wait_until(running, lambda: all(server.alive for server in running.engine._fleet.servers))
    publish(running, running.old, 100)
    running.said.clear()
    yield running
    wait_until(running, lambda: all(server.alive for server in running.engine._fleet.servers))
    publish(running, running.new, 101)
    check_equal(answers(running.engine), running.expected)
    assert [server.version for server in running.engine._fleet.servers] == [101, 101]


def wait_until(running: Running, condition: Callable[[], bool]) -> None:
    async def look() -> None:
        import asyncio

        while not condition():
            await asyncio.sleep(0.05)

    running.engine._fleet.start(look()).result(300)


def family_of(server: Server) -> list[psutil.Process]:
    return psutil.Process(server.process.pid).children(recursive=True)


def check_long(running: Running, version: int) -> None:
    rollouts = running.engine.generate(tiny_requests(8), LONG)
    assert {rollout.weight_version for rollout in rollouts} == {version}
    assert [(r.prompt, r.sample) for r in rollouts] == [(r.prompt, r.sample) for r in tiny_requests(8)]
    return rollouts


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_server_lost_while_it_generates_costs_nothing_but_time(sound, how):
    publish(sound, sound.new, 1)
    expected = [rollout.token_ids for rollout in check_long(sound, 1)]
    engine, (first, second) = sound.engine, sound.engine._fleet.servers
    under_way = engine.submit(tiny_requests(8), LONG)
    wait_until(sound, lambda: bool(first.jobs) and bool(second.jobs))
    for process in family_of(first):
        process.send_signal(how)
    assert [rollout.token_ids for rollout in engine.collect(under_way)] == expected
    assert len(sound.said) == 1 and "server 0 is lost and started again" in sound.said[0]
    wait_until(sound, lambda: first.alive)
    assert [rollout.token_ids for rollout in check_long(sound, 1)] == expected  # it has got the weights meanwhile
    wait_until(sound, lambda: first.version == 1)


class Interrupted:
    """Weights; `act` is called when half of them have been given."""

    def __init__(self, running: Running, act: Callable[[], None]) -> None:
        self._items, self._act = list(weights(running.new).items()), act

    def __iter__(self):
        for number, item in enumerate(self._items):
            if number == len(self._items) // 2:
                act, self._act = self._act, lambda: None
                act()
            yield item


def workers_of(server: Server) -> list[psutil.Process]:
    """The process of its only worker, which is the engine's; the one that answers HTTP goes on."""
    return [process for process in family_of(server) if "EngineCore" in " ".join(process.cmdline())]


@pytest.mark.parametrize(
    ("how", "whom"), [(signal.SIGKILL, family_of), (signal.SIGSTOP, family_of), (signal.SIGSTOP, workers_of)]
)
def test_a_server_lost_in_the_middle_of_a_publish_never_answers_with_mixed_weights(sound, how, whom):
    engine, (first, second) = sound.engine, sound.engine._fleet.servers
    assert whom(first)

    def strike() -> None:
        for process in whom(first):
            process.send_signal(how)

    engine.publish(Interrupted(sound, strike), 2)
    assert (first.version, second.version) == (None, 2)
    rollouts = engine.generate(tiny_requests(), SAMPLED)
    assert {rollout.weight_version for rollout in rollouts} == {2}
    assert largest_error(sound.new, rollouts) < 1e-4


def test_when_both_servers_are_lost_the_run_waits_for_them_and_gives_them_the_weights(sound):
    publish(sound, sound.new, 3)
    for server in sound.engine._fleet.servers:
        for process in family_of(server):
            process.kill()
    rollouts = sound.engine.generate(tiny_requests(), SAMPLED)
    assert largest_error(sound.new, rollouts) < 1e-4
    assert sound.engine.metrics()["rollout/server_restarts"] >= 2


@pytest.mark.parametrize("mode", ["finish", "pause", "abort"])
def test_requests_in_flight_finish_pause_or_are_asked_again_at_a_publish(sound, monkeypatch, mode):
    engine = sound.engine
    monkeypatch.setattr(engine, "_rollout", engine._rollout.model_copy(update={"in_flight": mode, "max_staleness": 1}))
    monkeypatch.setattr(engine._fleet, "_exact", False)
    under_way = engine.submit(tiny_requests(16), replace(LONG, max_tokens=140))
    wait_until(sound, lambda: sum(len(server.jobs) for server in engine._fleet.servers) > 20)
    engine.collect(engine.submit(tiny_requests(1), replace(LONG, max_tokens=1)))  # those before have tokens now, too
    publish(sound, sound.new, 101)
    rollouts = engine.collect(under_way)
    of_tokens = [rollout.token_versions or [rollout.weight_version] for rollout in rollouts]
    versions = {tuple(sorted(set(found))) for found in of_tokens}
    # What ended before the publish, or reached a server after it, is of one version in any case.
    assert versions <= {(100,), (101,), (100, 101)}, (versions, sound.said)
    assert {"finish": versions == {(100,)}, "pause": (100, 101) in versions, "abort": (101,) in versions}[mode]
    assert ((100, 101) in versions) == (mode == "pause")
    assert all(found == sorted(found) for found in of_tokens)
    assert all(rollout.weight_version == min(found) for rollout, found in zip(rollouts, of_tokens, strict=True))
    assert not any(rollout.stale for rollout in rollouts)
    for version, folder in ((100, sound.old), (101, sound.new)):
        whole = [rollout for rollout, found in zip(rollouts, of_tokens, strict=True) if set(found) == {version}]
        assert largest_error(folder, whole) < 1e-4


def test_samples_older_than_the_bound_are_marked(sound, monkeypatch):
    engine = sound.engine
    monkeypatch.setattr(engine._fleet, "_exact", False)
    monkeypatch.setattr(engine, "_rollout", engine._rollout.model_copy(update={"max_staleness": 1}))
    under_way = engine.submit(tiny_requests(1), SAMPLED)
    publish(sound, sound.new, 101)
    publish(sound, sound.new, 102)
    assert all(rollout.stale for rollout in engine.collect(under_way))


def test_a_fleet_without_restarts_left_ends_with_one_message(sound):
    fleet = sound.engine._fleet
    before, fleet._max_restarts = fleet._max_restarts, 0
    try:
        servers = list(fleet.servers)
        del fleet.servers[1]
        for process in family_of(servers[0]):
            process.kill()
        with pytest.raises(RolloutError, match=r"no rollout server is left: server 0: .*server-0.log"):
            sound.engine.generate(tiny_requests(), SAMPLED)
    finally:
        fleet._max_restarts, fleet.servers = before, servers
        servers[0].gone, servers[0].restarts = False, 0
        fleet.run(fleet._restart(servers[0]))
