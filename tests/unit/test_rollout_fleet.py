"""Servers that die, hang, lie or do not start: real processes, which stand in for vLLM's."""

from __future__ import annotations

import asyncio
import errno
import math
import mmap
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import threading
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from megatron_srpo.config import Config, RolloutConfig
from megatron_srpo.core.exit_codes import STOPPED, exit_words
from megatron_srpo.core.records import Rollout
from megatron_srpo.rollout import GenerateRequest, RolloutError, SamplingSettings, http
from megatron_srpo.rollout import fleet as fleet_module
from megatron_srpo.rollout.engine import decode_inside
from megatron_srpo.rollout.fleet import ATTEMPTS, Fleet, Server
from megatron_srpo.rollout.http import BadAnswer, ServerError, UnacceptableRequest
from megatron_srpo.rollout.vllm import parent_watcher, server_process
from megatron_srpo.rollout.vllm.client import VllmClient, read_answer
from megatron_srpo.rollout.vllm.environment import COMMON, CPU
from megatron_srpo.rollout.vllm.server_process import (
    VllmServerProcess,
    become_server,
    check_address,
    server_environment,
)
from megatron_srpo.rollout.vllm.servers import ServersEngine, Transfer
from megatron_srpo.rollout.vllm.settings import EngineSettings
from megatron_srpo.rollout.vllm.token_middleware import TOKEN_VARIABLE
from tests.fake_server import answer, damaged, packed
from tests.tiny_models import make_tiny_model

ROOT = Path(__file__).parents[2]
TOKEN = "a token"
SAMPLING = SamplingSettings(max_tokens=5)
PATIENCE = 20  # seconds that a test waits for what is sure to come


def requests(prompts: int = 6, samples: int = 4) -> list[GenerateRequest]:
    return [GenerateRequest(p, s, [5] * (p + 1), seed=100 * p + s) for p in range(prompts) for s in range(samples)]


@pytest.fixture
def fleet_of(tmp_path, monkeypatch) -> Callable:
    """Makes a fleet of stand-ins; a server's behaviours are those of its starts, one after the other. Without `wait`
    the servers are launched, and may not be up."""

    @contextmanager
    def make(
        *behaviours: list[str], port: int = 0, wait: bool = True, **settings
    ) -> Iterator[tuple[Fleet, list[str]]]:  # fmt: skip
        def arguments(made: EngineSettings, host: str, at: int) -> list[str]:
            return ["-m", "tests.fake_server", host, str(at), made.hf_dir]

        monkeypatch.setattr(server_process, "server_arguments", arguments)
        said: list[str] = []
        servers = []
        for number, starts in enumerate(behaviours):
            file = tmp_path / f"behaviour-{number}"
            file.write_text("".join(f"{start}\n" for start in starts))
            made = EngineSettings(str(file), "", "float32", RolloutConfig(), 100, 0, "cpu", "")
            environment = server_environment(TOKEN, None, 1)
            process = VllmServerProcess(made, environment, "127.0.0.1", port, tmp_path / f"server-{number}.log")
            client = VllmClient("", TOKEN, request_timeout_s=settings.pop("request_s", 60), control_timeout_s=20)
            servers.append(Server(f"server {number}", client, process))
        options = {"limit": 4, "exact": True, "timeout_s": 20, "start_timeout_s": PATIENCE, "max_restarts": 2}
        fleet = Fleet(
            servers, **options | settings, say=said.append, needs_weights=lambda server: None,
            decode=lambda ids: " ".join(map(str, ids)),
        )  # fmt: skip
        try:
            fleet.launch()
            if wait:
                fleet.run(fleet.wait_until_up())
            yield fleet, said
        finally:
            fleet.close()

    return make


def begin(fleet: Fleet, asked: list[GenerateRequest]) -> Future:
    return fleet.start(fleet.generate(asked, SAMPLING, "salt", None))


def generate(fleet: Fleet, asked: list[GenerateRequest]) -> list[Rollout]:
    return begin(fleet, asked).result(PATIENCE)


@pytest.fixture
def expected(fleet_of) -> list[Rollout]:
    with fleet_of([]) as (fleet, _):
        return generate(fleet, requests())


def wait_until(fleet: Fleet, condition: Callable[[], bool]) -> None:
    """Look again and again; the fleet's own loop does the waiting."""

    async def look() -> None:
        while not condition():
            await asyncio.sleep(0.01)

    fleet.start(look()).result(PATIENCE)


def test_every_request_is_answered_once_in_order_by_any_number_of_servers(fleet_of, expected):
    places = [(request.prompt, request.sample) for request in requests()]
    assert [(rollout.prompt, rollout.sample) for rollout in expected] == places
    with fleet_of([], [], []) as (fleet, said):
        assert generate(fleet, requests()[::-1]) == expected
        assert generate(fleet, []) == []
        assert all(server.answered for server in fleet.servers) and said == []
        assert [server.outstanding for server in fleet.servers] == [0, 0, 0]


def test_responses_are_handed_over_when_they_are_complete(fleet_of, expected):
    with fleet_of([]) as (fleet, _):
        seen: list[Rollout] = []
        fleet.run(fleet.generate(requests(), SAMPLING, "salt", seen.append))
        assert sorted(seen, key=lambda rollout: (rollout.prompt, rollout.sample)) == expected


def test_the_next_request_goes_where_the_fewest_tokens_are_outstanding(fleet_of):
    with fleet_of(["never"], ["never"], limit=8) as (fleet, _):
        asked = [GenerateRequest(p, 0, [5] * length, seed=p) for p, length in enumerate((50, 10, 10, 10, 10))]
        begin(fleet, asked)
        wait_until(fleet, lambda: sum(len(server.jobs) for server in fleet.servers) == 5)
        assert sorted(server.outstanding for server in fleet.servers) == [55, 60]  # one long one, four short ones


@pytest.mark.parametrize("behaviour", ["die", "broken", "garbage", "version"])
def test_a_server_that_dies_or_lies_is_restarted_and_its_requests_are_answered_by_others(fleet_of, expected, behaviour):
    with fleet_of([behaviour], []) as (fleet, said):
        assert generate(fleet, requests()) == expected
        assert said[0].startswith("server 0 is lost and started again: ") and fleet.restarted == 1
        assert ("Error: out of luck" if behaviour == "die" else "it has printed nothing") in said[0] and "log:" in said[
            0
        ]
        wait_until(fleet, lambda: fleet.servers[0].alive)
        assert generate(fleet, requests()) == expected
        assert len(said) == 1


@pytest.mark.parametrize("behaviour", ["tokens", "logprobs", "spans", "reason", "empty", "list"])
def test_what_is_no_answer_to_the_request_is_found(behaviour):
    (request,) = requests(1, 1)
    asked = {"sampling_params": {"seed": 3, "max_tokens": 5}}
    sound = answer(asked)
    found = read_answer(packed(sound), request, SAMPLING, str)
    assert found.token_ids.tolist() == sound["choices"][0]["token_ids"] and found.token_versions is None
    entries = sound["choices"][0]["logprobs"]["content"]
    assert found.logprobs == array("f", [entry["logprob"] for entry in entries])
    with pytest.raises(BadAnswer, match="not an answer to what was asked"):
        read_answer(packed(damaged(asked, behaviour)), request, SAMPLING, str)


@pytest.mark.parametrize("cut", [0, 3, 10, -1])
def test_an_answer_that_was_cut_is_found(cut):
    (request,) = requests(1, 1)
    whole = packed(answer({"sampling_params": {"seed": 3, "max_tokens": 5}}))
    for data in (whole[:cut], whole + b"0123", b"\xff" * 40):
        with pytest.raises(BadAnswer):
            read_answer(data, request, SAMPLING, str)


def test_log_probs_that_vllm_replaced_are_not_finite_and_aborted_requests_have_no_answer():
    (request,) = requests(1, 1)
    found = answer({"sampling_params": {"seed": 3, "max_tokens": 5}})
    (choice,) = found["choices"]
    choice["logprobs"]["content"][0]["logprob"] = -9999.0
    logprobs = read_answer(packed(found), request, SAMPLING, str).logprobs
    assert [math.isnan(value) for value in logprobs] == [True] + [False] * (len(logprobs) - 1)
    choice["finish_reason"] = "abort"
    assert read_answer(packed(found), request, SAMPLING, str) is None


def test_tokens_that_are_of_several_publishes_say_which():
    (request,) = requests(1, 1)
    found = answer({"sampling_params": {"seed": 3, "max_tokens": 5}})
    (choice,) = found["choices"]
    count = len(choice["token_ids"])
    assert count > 1
    choice["weight_versions"] = [{"version": "6", "start": 0, "end": 1}, {"version": "7", "start": 1, "end": count}]
    rollout = read_answer(packed(found), request, SAMPLING, str)
    assert rollout.token_versions == [6] + [7] * (count - 1) and rollout.weight_version == 6


def test_a_single_server_that_dies_is_awaited(fleet_of, expected):
    with fleet_of(["die", "die"]) as (fleet, said):
        assert generate(fleet, requests()) == expected
        assert len(said) == fleet.restarted == 2


def test_a_server_that_does_not_answer_in_time_is_restarted(fleet_of, expected):
    with fleet_of(["never"], [], request_s=1) as (fleet, said):
        assert generate(fleet, requests()) == expected
        assert "no answer to /megatron_srpo/v1/generate within 1 s" in said[0]


def test_a_server_that_is_stopped_fails_its_health_check_and_is_restarted(fleet_of, expected):
    with fleet_of(["never"], [], timeout_s=1) as (fleet, said):
        answers = begin(fleet, requests())
        wait_until(fleet, lambda: bool(fleet.servers[0].jobs))
        for process in psutil.Process(fleet.servers[0].process.pid).children(recursive=True):
            process.send_signal(signal.SIGSTOP)
        assert answers.result(PATIENCE) == expected
        assert "no answer to /health within 1 s" in said[0]


def test_a_server_that_is_killed_while_it_generates_is_restarted(fleet_of, expected):
    with fleet_of(["never"], []) as (fleet, said):
        answers = begin(fleet, requests())
        wait_until(fleet, lambda: bool(fleet.servers[0].jobs))
        (server,) = psutil.Process(fleet.servers[0].process.pid).children()
        server.kill()
        assert answers.result(PATIENCE) == expected
        assert len(said) == 1


def test_a_request_that_every_server_fails_on_ends_with_one_message(fleet_of):
    expected = pytest.raises(RolloutError, match=f"prompt 0, sample 0 failed {ATTEMPTS} times: server 0: .*is dead")
    with fleet_of(["broken"] * ATTEMPTS, max_restarts=ATTEMPTS) as (fleet, _), expected:
        generate(fleet, requests(1, 1))


def test_a_request_that_is_refused_is_not_tried_again(fleet_of):
    with fleet_of(["refuse"], ["refuse"]) as (fleet, said):
        with pytest.raises(RolloutError, match=r"status 400, .*cursed"):
            generate(fleet, requests(1, 1))
        assert said == [] and fleet.retried == 0


def test_when_no_server_is_left_the_run_ends_with_what_the_last_one_said(fleet_of):
    with fleet_of(["die"] * 3) as (fleet, said):
        with pytest.raises(RolloutError, match=r"no rollout server is left: server 0: .*Error: out of luck \(log: "):
            generate(fleet, requests())
        assert "given up, it was lost 3 times in a row" in said[-1]
        with pytest.raises(RolloutError, match="no rollout server is left"):
            generate(fleet, requests())


FULL = "[Errno 28] No space left on device"


@pytest.fixture
def full_disk(monkeypatch) -> Callable[[int], None]:
    """Lets the next starts of servers fail."""
    monkeypatch.setattr(fleet_module, "START_AGAIN_SECONDS", 0.01)
    start = VllmServerProcess.start

    def fail(times: int) -> None:
        errors = [OSError(errno.ENOSPC, "No space left on device")] * times

        def may_fail(process: VllmServerProcess) -> None:
            if errors:
                raise errors.pop()
            start(process)

        monkeypatch.setattr(VllmServerProcess, "start", may_fail)

    return fail


def test_a_start_that_fails_as_on_a_full_disk_is_tried_again(fleet_of, expected, full_disk):
    with fleet_of(["die"], max_restarts=3) as (fleet, said):
        full_disk(2)
        assert generate(fleet, requests()) == expected
        assert fleet.restarted == 3
        assert said[1:] == ["server 0 is tried again in 0.01 s, it could not be started: " + FULL] * 2


def test_a_restarted_server_that_ends_while_it_loads_is_tried_again(fleet_of, expected, full_disk):
    """As an engine does while the device still has the memory of the one that was lost."""
    with fleet_of(["die", "no start"], max_restarts=2) as (fleet, said):
        assert generate(fleet, requests()) == expected
        assert fleet.restarted == 2 and "tried again in 0.01 s, it could not be started: it ended with" in said[1]
    left = pytest.raises(RolloutError, match=r"no rollout server is left: server 0: .*the model is too large")
    with fleet_of(["die", "no start"], max_restarts=1) as (fleet, _), left:
        generate(fleet, requests())


def test_the_error_of_a_server_that_does_not_start_reaches_the_other_ranks():
    sent = pickle.loads(pickle.dumps(fleet_module.StartFailed("server 0 did not start", "killed")))
    assert (type(sent), str(sent), sent.ended) == (fleet_module.StartFailed, "server 0 did not start", "killed")


def test_a_server_that_cannot_be_started_is_given_up_with_one_message(fleet_of, expected, full_disk):
    with fleet_of(["die"], [], max_restarts=2) as (fleet, said):
        full_disk(2)
        assert generate(fleet, requests()) == expected
        wait_until(fleet, lambda: fleet.servers[0].gone)
        assert said[2:] == ["server 0 is given up, it could not be started: " + FULL]
    with fleet_of(["die"], max_restarts=1) as (fleet, _):
        full_disk(1)
        with pytest.raises(RolloutError, match=r"no rollout server is left: server 0: .*No space left on device"):
            generate(fleet, requests())


class Stranger:
    """The client of a server that somebody else started; its calls raise what a test says."""

    url = "http://stranger"

    def __init__(self) -> None:
        self.failures: dict[str, list[Exception]] = {}  # call → the errors of its next calls

    def may_fail(self, call: str) -> None:
        if errors := self.failures.get(call):
            raise errors.pop()

    async def close(self) -> None: ...

    async def health(self, timeout: float) -> None:
        self.may_fail("health")

    async def world_size(self, timeout: float) -> int:
        self.may_fail("world_size")
        return 1

    async def weight_version(self) -> int | None:
        self.may_fail("weight_version")
        return 0

    async def generate(self, request: GenerateRequest, *_: object) -> Rollout:
        self.may_fail("generate")
        read = (request.prompt, request.sample, array("i", [5]), array("f", [-1.0]), "5", "stop", 0)
        return await asyncio.to_thread(Rollout, *read)  # as VllmClient reads long answers


@pytest.fixture
def stranger(monkeypatch) -> Iterator[tuple[Fleet, Stranger, list[str]]]:
    """A fleet of one server that somebody else started, not launched."""
    monkeypatch.setattr(fleet_module, "HEALTH_SECONDS", 0.01)
    client, said = Stranger(), []
    fleet = Fleet(
        [Server("server 0", client)], limit=4, exact=True, timeout_s=5, start_timeout_s=PATIENCE, max_restarts=2,
        say=said.append, needs_weights=lambda server: None, decode=str,
    )  # fmt: skip
    yield fleet, client, said
    fleet.close()


def test_a_server_is_up_when_it_has_told_its_weights(stranger):
    fleet, client, said = stranger
    client.failures = {"weight_version": [ServerError("too busy")]}
    fleet.launch()
    assert len(generate(fleet, requests())) == 24
    client.failures = {"generate": [ServerError("lost")], "weight_version": [ServerError("too busy")]}
    assert len(generate(fleet, requests())) == 24
    assert said == ["server 0 is lost and waited for: lost"]


@pytest.mark.parametrize("call", ["world_size", "weight_version"])
def test_a_server_that_comes_back_and_refuses_us_is_given_up(stranger, call):
    fleet, client, said = stranger
    fleet.launch()
    fleet.run(fleet.wait_until_up())
    client.failures = {"generate": [ServerError("lost")], call: [UnacceptableRequest("status 401")]}
    with pytest.raises(RolloutError, match=r"no rollout server is left: server 0: .*refuses us: status 401"):
        generate(fleet, requests())
    assert said[1:] == ["server 0 is given up: server 0 at http://stranger refuses us: status 401"]


def test_a_server_whose_health_check_is_refused_is_lost(stranger):
    fleet, client, said = stranger
    fleet.launch()
    fleet.run(fleet.wait_until_up())
    client.failures = {"health": [UnacceptableRequest("/health: status 404")]}
    wait_until(fleet, lambda: bool(said))
    assert said == ["server 0 is lost and waited for: /health: status 404"]
    assert len(generate(fleet, requests())) == 24


def test_a_connection_that_the_server_may_be_closing_is_not_used_again(monkeypatch):
    """vLLM's server closes one that has been idle for 5 s. This one closes it when the second request arrives."""
    assert http.IDLE_SECONDS < 5
    monkeypatch.setattr(http, "IDLE_SECONDS", 0.0)

    async def answer_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        await reader.read(1)
        writer.close()

    async def call_twice() -> None:
        server = await asyncio.start_server(answer_once, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        client = http.HttpClient(url, "", request_timeout_s=PATIENCE, control_timeout_s=PATIENCE)
        for _ in range(2):
            assert await client.call("POST", "/generate") == {}
        await client.close()
        server.close()

    asyncio.run(call_twice())


class OneTurn:
    """A feed of one request, which ends with its answer; without a request it ends when it is stopped."""

    def __init__(self, *asked: GenerateRequest) -> None:
        self.rollouts: list[Rollout] = []
        self.ended = threading.Event()
        self._events: queue.SimpleQueue[GenerateRequest | None] = queue.SimpleQueue()
        for request in asked:
            self._events.put(request)

    def ready(self, *, wait: bool) -> list[GenerateRequest] | None:
        event = self._events.get()
        if event is None:
            self.ended.set()
        return None if event is None else [event]

    def answer(self, rollout: Rollout) -> None:
        self.rollouts.append(rollout)
        self.stop()

    def stop(self) -> None:
        self._events.put(None)


def test_feeds_that_wait_leave_the_threads_of_others_free(stranger):
    fleet, _, _ = stranger
    fleet.loop.set_default_executor(ThreadPoolExecutor(1))
    fleet.launch()
    feeds = [OneTurn(request) for request in requests(1, 4)]
    try:
        answers = [fleet.start(fleet.converse(feed, SAMPLING, "salt")) for feed in feeds]
        assert [rollout.sample for answer in answers for rollout in answer.result(PATIENCE)] == [0, 1, 2, 3]
    finally:
        for feed in feeds:
            feed.stop()


def test_a_feed_whose_conversation_is_cancelled_is_stopped(stranger):
    fleet, _, _ = stranger
    fleet.launch()
    feed = OneTurn()
    answers = fleet.start(fleet.converse(feed, SAMPLING, "salt"))
    fleet.run(fleet.wait_until_up())
    try:
        wait_until(fleet, lambda: any(thread.name.startswith("feed") for thread in threading.enumerate()))
        answers.cancel()
        assert feed.ended.wait(PATIENCE)
    finally:
        feed.stop()


def test_a_server_that_does_not_start_is_one_message_with_its_log(fleet_of):
    expected = pytest.raises(RolloutError, match=r"server 0 did not start: .*exit code 1: ValueError: the model is too")
    with expected, fleet_of(["no start"]):
        pass


def test_a_server_that_is_killed_while_it_starts_is_told_by_its_signal(fleet_of):
    expected = pytest.raises(RolloutError, match=r"server 0 did not start: it ended with exit code 137 \(SIGKILL\): ")
    with expected, fleet_of(["killed"]):
        pass


@pytest.mark.parametrize(
    "code, words",
    [
        (3, "exit code 3"),
        (-9, "killed by SIGKILL"),
        (137, "exit code 137 (SIGKILL)"),
        (130, "exit code 130 (SIGINT)"),
        (250, "exit code 250"),
        (-99, "killed by signal 99"),
    ],
)
def test_how_a_process_ended(code, words):
    assert exit_words(code) == words


def test_requests_wait_for_servers_that_start(fleet_of, expected):
    with fleet_of([], [], wait=False) as (fleet, said):
        assert generate(fleet, requests()) == expected
        assert all(server.answered for server in fleet.servers) and said == []


def test_requests_to_servers_of_which_one_does_not_start_end_with_its_message(fleet_of):
    with fleet_of([], ["no start"], wait=False) as (fleet, _):
        for _ in range(2):
            with pytest.raises(RolloutError, match=r"server 1 did not start: .*exit code 1: ValueError: the model is"):
                generate(fleet, requests())


def test_a_fleet_that_is_closed_while_its_servers_start_leaves_no_process(fleet_of):
    with fleet_of([], ["no start"], wait=False) as (fleet, _):
        processes = [psutil.Process(server.process.pid) for server in fleet.servers]
    assert psutil.wait_procs(processes, timeout=PATIENCE)[1] == []


@contextmanager
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        yield taken.getsockname()[1]


def test_a_port_that_was_taken_meanwhile_is_changed_for_another(fleet_of, expected, monkeypatch):
    with taken_port() as port:
        ports = [port]
        free = server_process.free_port
        monkeypatch.setattr(server_process, "free_port", lambda host: ports.pop() if ports else free(host))
        with fleet_of([]) as (fleet, said):
            assert generate(fleet, requests()) == expected
            assert said == [f"server 0: port of http://127.0.0.1:{port} was taken; trying another"]


def test_a_port_of_the_configuration_that_is_taken_is_one_message(fleet_of):
    expected = pytest.raises(RolloutError, match=r"server 0 did not start: .*Choose another rollout.server_port")
    with taken_port() as port, expected, fleet_of([], port=port):
        pass


def test_a_server_of_somebody_else_is_one_message(tmp_path, fleet_of):
    with fleet_of([]) as (fleet, _):
        client = VllmClient(fleet.servers[0].client.url, "wrong", request_timeout_s=5, control_timeout_s=5)
        stranger = Fleet(
            [Server("server 0", client)], limit=1, exact=True, timeout_s=5, start_timeout_s=5, max_restarts=0,
            say=[].append, needs_weights=lambda server: None, decode=str,
        )  # fmt: skip
        try:
            with pytest.raises(RolloutError, match=r"server 0 at http://127.0.0.1:[0-9]+ refuses us: .*status 401"):
                stranger.launch()
                stranger.run(stranger.wait_until_up())
        finally:
            stranger.close()


def test_a_closed_fleet_leaves_no_process(fleet_of):
    with fleet_of([], ["never"]) as (fleet, _):
        begin(fleet, requests())
        processes = [psutil.Process(server.process.pid) for server in fleet.servers]
        processes += [child for process in processes for child in process.children(recursive=True)]
        assert len(processes) == 4
    assert psutil.wait_procs(processes, timeout=PATIENCE)[1] == []


def test_a_mapped_file_whose_name_is_no_text_does_not_end_the_watcher_of_a_server(tmp_path):
    path = os.path.join(os.fsencode(tmp_path), b"\xff")
    with open(path, "w+b") as file:
        file.write(b"x" * mmap.PAGESIZE)
        file.flush()
        with mmap.mmap(file.fileno(), 0):
            assert isinstance(parent_watcher.shared_memory([os.getpid()]), set)


def test_shared_memory_of_a_killed_server_is_removed(fleet_of, expected):
    with fleet_of(["shared memory"]) as (fleet, _):
        process = fleet.servers[0].process
        block = Path(process._since_start().splitlines()[0])
        assert block.exists()
        psutil.Process(process.pid).children()[0].suspend()  # it cannot tidy up itself
        fleet.close()
        assert not block.exists()


def test_an_episode_that_failed_before_its_first_turn_has_no_age():
    """No weights sampled anything of it, so it is neither stale nor in the metrics of the staleness."""
    engine = ServersEngine.__new__(ServersEngine)
    engine._rollout, engine.weight_version = RolloutConfig(max_staleness=2), 7
    rollouts = [Rollout(0, n, [1] * tokens, [-1.0] * tokens, "", "stop", version)
                for n, (tokens, version) in enumerate([(0, 0), (1, 6), (1, 4)])]  # fmt: skip
    engine._mark_stale(rollouts)
    assert [rollout.stale for rollout in rollouts] == [False, False, True]
    assert engine._metrics == {"rollout/staleness_mean": 2.0, "rollout/staleness_max": 3}
    engine._mark_stale(rollouts[:1])
    assert engine._metrics == {"rollout/staleness_mean": 0.0, "rollout/staleness_max": 0}


@pytest.mark.parametrize("restarted", [True, False])
def test_a_server_that_was_restarted_during_a_publish_does_not_count_as_published(stranger, restarted):
    """Its old process had loaded the weights. The new one has those of the folder, and waits for its own publish."""
    fleet, client, _ = stranger
    called: list[str] = []

    async def call(method: str, path: str, **options: object) -> None:
        called.append(path)

    client.call = call
    (server,) = fleet.servers
    server.alive, server.version, server.losses = True, 0, int(restarted)
    engine = ServersEngine.__new__(ServersEngine)
    engine._fleet, engine._rollout, engine._verify = fleet, RolloutConfig(placement="servers"), False
    engine._losses_at_join = {server.name: 0}
    loaded: Future = Future()
    loaded.set_result(None)
    engine._transfer = Transfer("key", 7, [server], {}, {server.name: loaded})
    engine._finish_transfer({})
    assert (server.version, bool(called)) == ((0, False) if restarted else (7, True))


def test_servers_inherit_what_engines_need_and_no_keys_but_what_the_user_names(monkeypatch):
    secrets = ("WANDB_API_KEY", "HF_TOKEN", "VLLM_API_KEY", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY")
    for name in (*secrets, "MINE", "MASTER_ADDR", "RANK", "TORCHELASTIC_RUN_ID", "LD_PRELOAD"):
        monkeypatch.setenv(name, "x")
    kept = ("NCCL_SOCKET_IFNAME", "CUDA_HOME", "VLLM_USE_V1", "HF_HOME", "LD_LIBRARY_PATH", "TOKENIZERS_PARALLELISM")
    for name in kept:
        monkeypatch.setenv(name, "x")
    found = server_environment("token", None, 1, ["MINE"])
    assert all(found[name] == "x" for name in (*kept, "MINE")) and found["MEGATRON_SRPO_ENGINE_TOKEN"] == "token"
    assert not {*secrets, "MASTER_ADDR", "RANK", "TORCHELASTIC_RUN_ID", "LD_PRELOAD"} & found.keys()


def test_token_ids_outside_the_vocabulary_are_no_answer():
    assert decode_inside(10, str, [0, 9]) == "[0, 9]"
    for bad in (10, -1, 2**70, True, 1.0):
        with pytest.raises(ValueError, match=r"outside the vocabulary of model\.path, which has 10"):
            decode_inside(10, str, [0, bad])


TRAINER = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from megatron_srpo.config import Config, RolloutConfig
from megatron_srpo.rollout.vllm import server_process
from megatron_srpo.rollout.vllm.settings import EngineSettings
server_process.server_arguments = lambda made, host, port: ["-m", "tests.fake_server", host, str(port), "none"]
made = EngineSettings("", "", "float32", RolloutConfig(), 1, 0, "cpu", "")
environment = server_process.server_environment("token", None, 1)
server = server_process.VllmServerProcess(made, environment, "127.0.0.1", 0, Path({log!r}))
server.start()
print(server.pid, flush=True)
sys.stdin.read()
"""


def test_servers_end_with_a_trainer_that_is_killed(tmp_path):
    code = TRAINER.format(root=str(ROOT), log=str(tmp_path / "log"))
    trainer = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    watcher = psutil.Process(int(trainer.stdout.readline()))
    processes = [watcher, *watcher.children(recursive=True)]
    os.kill(trainer.pid, signal.SIGKILL)
    trainer.wait(PATIENCE)
    assert psutil.wait_procs(processes, timeout=PATIENCE)[1] == []


def own_servers(rollout: RolloutConfig) -> list:
    """The servers that a run would start, not started."""
    engine = object.__new__(ServersEngine)
    engine._rollout, engine._settings = rollout, EngineSettings("", "", "float32", rollout, 100, 0, "cpu", "")
    return engine._own_servers(Path("unused"))


def test_a_server_that_cannot_listen_is_refused_before_anything_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RolloutError, match=f"--port {port}: another program listens on it"):
            check_address("127.0.0.1", port)
        rollout = RolloutConfig(placement="servers", server_port=port)
        with pytest.raises(RolloutError, match=f"rollout.server_port: port {port}: another program listens on it"):
            own_servers(rollout)
    check_address("127.0.0.1", port)
    for host in ("203.0.113.7", "no-such-host.invalid"):
        with pytest.raises(RolloutError, match=f"--host {host}: .*expected an address of this machine"):
            check_address(host, port)


def test_a_server_for_others_needs_a_token(monkeypatch):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    config = Config(model={"path": "m"}, data={"train": "x.jsonl"})
    with pytest.raises(RolloutError, match=f"{TOKEN_VARIABLE} is not set: set it to a long random text"):
        become_server(config, 100, "cpu", "127.0.0.1", 1)


def test_a_server_for_others_has_the_environment_that_a_runs_own_has(tmp_path, monkeypatch):
    for name in ("TORCHDYNAMO_DISABLE", "VLLM_CPU_OMP_THREADS_BIND", "VLLM_NO_USAGE_STATS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    model = make_tiny_model(tmp_path / "model", "qwen3")
    config = Config(model={"path": str(model)}, data={"train": "x.jsonl"}, rollout={"max_num_seqs": 8})
    started = []
    monkeypatch.setattr(os, "execve", lambda *given: started.append(given))
    become_server(config, 32, "cpu", "127.0.0.1", server_process.free_port("127.0.0.1"))
    ((_, command, environment),) = started
    assert command[3:6] == [str(parent_watcher.__file__), "--alone", sys.executable]
    wanted = COMMON | CPU | {"VLLM_LOGGING_LEVEL": "WARNING", TOKEN_VARIABLE: TOKEN}
    assert wanted.items() <= environment.items()
    assert int(environment["OMP_NUM_THREADS"]) == len(os.sched_getaffinity(0))
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    become_server(config, 32, "cuda", "127.0.0.1", server_process.free_port("127.0.0.1"))
    assert not {"OMP_NUM_THREADS", "VLLM_ENABLE_V1_MULTIPROCESSING", "CUDA_VISIBLE_DEVICES"} & set(started[1][2])


FAMILY = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_server_for_others_ends_whole_with_the_process_that_holds_it(how):
    command = server_process.watched("--alone", sys.executable, "-c", FAMILY)
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    grandchild = psutil.Process(int(holder.stdout.readline()))
    family = psutil.Process(holder.pid).children(recursive=True)
    assert grandchild in family and len(family) == 3  # watcher, server, the server's own
    holder.send_signal(how)
    assert psutil.wait_procs(family, PATIENCE)[1] == []
    assert holder.wait(PATIENCE) == (-how if how == signal.SIGKILL else STOPPED)
    assert holder.stderr.read().strip() == ("" if how == signal.SIGKILL else "stopped by Ctrl-C or SIGTERM")


def test_the_exit_code_of_a_server_for_others_is_its_own():
    command = server_process.watched("--alone", sys.executable, "-c", "exit(3)")
    assert subprocess.run(command, check=False).returncode == 3
