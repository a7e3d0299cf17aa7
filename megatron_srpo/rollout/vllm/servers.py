"""A rollout engine of vLLM servers in processes of their own: rank 0 asks them, and all ranks send them the weights.

rank 0, ServersEngine          generate ─► requests over HTTP ─► answers       publish ─► pause ─► send ─► resume
other ranks, ServersFollower   wait                                                             join, send

An export gives the whole weights to every rank. The servers are shared out among the ranks, each of which sends to its
own (weight_stream.sender_of). A publish, also the one to a restarted server, has these turns of the control channel:

rank 0 → all   Joins: the groups that are to be joined, and by which rank       all → rank 0   which could not be joined
rank 0 → all   the servers that are ready, and who sends to them                all → rank 0   which failed
rank 0 → all   the publish is complete, or why it is not
"""

from __future__ import annotations

import os
import queue
import secrets
import urllib.parse
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from megatron_srpo.bridge import Verifier
from megatron_srpo.bridge.weight_stream import GroupAddress, Sender, Streams, sender_of
from megatron_srpo.config import LoraConfig, RolloutConfig
from megatron_srpo.core.records import Rollout
from megatron_srpo.rollout.engine import (
    Control,
    Feed,
    GenerateRequest,
    OnRollout,
    SamplingSettings,
    check_lengths,
    decode_inside,
)
from megatron_srpo.rollout.fleet import Fleet, Server
from megatron_srpo.rollout.http import ServerError, UnacceptableRequest, results_or_errors
from megatron_srpo.rollout.vllm.adapter_loader import ADAPTER
from megatron_srpo.rollout.vllm.client import MODEL_NAME, VllmClient
from megatron_srpo.rollout.vllm.server_process import (
    VllmServerProcess,
    check_address,
    server_environment,
    visible_devices,
)
from megatron_srpo.rollout.vllm.settings import EngineSettings, check_model, model_shape
from megatron_srpo.rollout.vllm.token_middleware import TOKEN_VARIABLE

Weights = Iterable[tuple[str, torch.Tensor]]
Answers = Future[list[Rollout]]


@dataclass(eq=False)
class VllmServer(Server):
    """A server of the fleet, whose client knows vLLM's routes."""

    client: VllmClient


Joins = dict[int, dict[str, GroupAddress]]  # sending rank → server's name → the group to join
Shares = dict[int, list[str]]  # sending rank → the names of the servers to which it sends


@dataclass
class Transfer:
    """One publish on its way to some servers."""

    key: str
    version: int
    servers: list[VllmServer]  # that take part: they answer and have joined
    joining: dict[str, Future[Any]]  # server's name → the call to /init_weight_transfer_engine
    updates: dict[str, Future[Any]]  # server's name → the call to /update_weights


class ServersFollower:
    """The RolloutEngine of all ranks but rank 0, which has the servers. Making one is collective."""

    def __init__(self, control: Control, max_model_len: int, device: torch.device) -> None:
        self._control, self._max_model_len = control, max_model_len
        self._streams = Streams(device)
        self._weights: Weights = ()
        self._half_published = False
        self.weight_version = 0
        control.receive()

    def generate(
        self, requests: Sequence[GenerateRequest], sampling: SamplingSettings, on_rollout: OnRollout | None = None
    ) -> list[Rollout]:
        """See RolloutEngine. Takes part in the publish to servers that are restarted meanwhile."""
        check_lengths(requests, sampling, self._max_model_len)
        _require_whole_publish(self._half_published)
        while self._control.receive():
            self._send_weights()
        return []

    def converse(
        self, requests: Sequence[GenerateRequest], sampling: SamplingSettings,
        begin: Callable[[list[GenerateRequest]], Feed],
    ) -> None:  # fmt: skip
        """As `generate`."""
        self.generate(requests, sampling)

    def publish(self, weights: Weights, version: int) -> None:
        """See ServersEngine.publish."""
        _require_repeatable(weights)
        self._half_published = True
        self._weights, self.weight_version = weights, version
        self._control.receive()
        self._send_weights()
        self._half_published = False

    def _send_weights(self) -> None:
        """See ServersEngine._send_weights."""
        joins, rank = cast(Joins, self._control.receive()), self._control.rank
        self._control.gather(self._streams.join_all(joins.get(rank, {})))
        shares = cast(Shares, self._control.receive())
        self._control.gather(self._streams.send(shares.get(rank, []), self._weights))
        self._control.receive()

    def metrics(self) -> dict[str, float]:
        """Rank 0 has them."""
        return {}

    def sleep(self, *, publish_next: bool = False) -> None:
        """Does nothing, as on rank 0."""

    def close(self) -> None:
        """Does nothing: rank 0 ends the servers."""


def _merged(by_rank: Sequence[dict[str, str]]) -> dict[str, str]:
    """The reasons of all ranks; every server is one rank's."""
    return {name: reason for reasons in by_rank for name, reason in reasons.items()}


def _require_whole_publish(half_published: bool) -> None:
    if half_published:
        raise RuntimeError("the last publish failed: no engine has whole weights. Publish again first.")


def _require_repeatable(weights: Weights) -> None:
    if iter(weights) is weights:
        raise ValueError("publish() needs weights that can be iterated again, got an iterator")


class ServersEngine:
    """Rank 0's RolloutEngine, whose engines are HTTP servers that it starts unless rollout.servers names running ones.

    Making one is collective. It launches the servers and does not wait for them: the first publish or generation does,
    and raises RolloutError on all ranks if one did not start. `make_sender(host)` makes this end of the weight streams
    to servers on that host. `logs` is a folder. `decode` turns response ids into text, and `say` takes a line for the
    user. `adapters`: what publishes bring, if not whole models. `folder_is_first`: whether the weights of `hf_dir` are
    those of version 0; a new server else needs a publish before it answers.
    """

    _sender: Sender
    _fleet: Fleet[VllmServer]

    def __init__(
        self, *, hf_dir: str, tokenizer: str, dtype: str, rollout: RolloutConfig, max_model_len: int, seed: int,
        device: str, control: Control, make_sender: Callable[[str], Sender], verifier: Verifier, logs: Path,
        decode: Callable[[list[int]], str], say: Callable[[str], None], adapters: LoraConfig | None = None,
        folder_is_first: bool = True,
    ) -> None:  # fmt: skip
        self._rollout, self._control, self._max_model_len = rollout, control, max_model_len
        self._verifier, self._verify, self._folder_is_first = verifier, False, folder_is_first
        self._settings = EngineSettings(
            hf_dir, tokenizer or hf_dir, dtype, rollout, max_model_len, seed, device, adapters=adapters
        )
        self._shape = model_shape(hf_dir)
        # Servers that need weights, and None when all answers of a call have come.
        self._events: queue.SimpleQueue[VllmServer | None] = queue.SimpleQueue()
        self._weights: Weights = ()
        self._calls = 0
        self._metrics: dict[str, float] = {}
        self._transfer: Transfer | None = None  # the last one
        self._losses_at_join: dict[str, int] = {}  # server's name → Server.losses when its workers joined
        self._half_published = False
        self.weight_version = 0
        control.share(lambda: self._open(logs, make_sender, decode, say))

    def _open(
        self, logs: Path, make_sender: Callable[[str], Sender], decode: Callable[[list[int]], str],
        say: Callable[[str], None],
    ) -> None:  # fmt: skip
        """Launch the servers, or begin to look for those that run already."""
        rollout = self._rollout
        settings = self._settings
        check_model(settings.hf_dir, rollout, self._max_model_len, settings.device, settings.adapters)
        servers = self._running_servers() if rollout.servers else self._own_servers(logs)
        self._sender = make_sender(host_of(rollout.servers[0]) if rollout.servers else rollout.server_host)
        self._fleet = Fleet(
            servers, limit=rollout.max_num_seqs, exact=rollout.max_staleness == 0,
            timeout_s=rollout.server_timeout_seconds, start_timeout_s=rollout.server_start_seconds,
            max_restarts=rollout.max_server_restarts, say=say, needs_weights=self._events.put,
            decode=partial(decode_inside, self._shape.vocab, decode), folder_is_first=self._folder_is_first,
        )  # fmt: skip
        try:
            self._fleet.launch()
        except BaseException:
            self._fleet.close()
            raise
        if not rollout.servers:
            say(f"engine servers are starting ({rollout.num_servers}); their logs are in {logs}")

    def _client(self, url: str, token: str) -> VllmClient:
        return VllmClient(
            url, token, request_timeout_s=self._rollout.request_timeout_seconds,
            control_timeout_s=self._rollout.server_timeout_seconds, shape=self._shape,
            model=MODEL_NAME if self._settings.adapters is None else ADAPTER,
        )  # fmt: skip

    def _running_servers(self) -> list[VllmServer]:
        token = os.environ.get(TOKEN_VARIABLE, "")
        urls = [url.rstrip("/") for url in self._rollout.servers]
        return [VllmServer(f"server {i}", self._client(url, token)) for i, url in enumerate(urls)]

    def _own_servers(self, logs: Path) -> list[VllmServer]:
        rollout, cpu = self._rollout, self._settings.device == "cpu"
        token = secrets.token_urlsafe(32)
        workers = rollout.num_servers * rollout.tensor_parallel_size
        threads = max(1, len(os.sched_getaffinity(0)) // workers)
        servers = []
        for i in range(rollout.num_servers):
            devices = None if cpu else visible_devices(i, rollout.tensor_parallel_size, rollout.server_devices)
            environment = server_environment(token, devices, threads if cpu else None, rollout.server_environment)
            port = rollout.server_port and rollout.server_port + i
            if port:
                check_address(rollout.server_host, port, "rollout.server_host", "rollout.server_port: port")
            log = logs / f"server-{i}.log"
            process = VllmServerProcess(self._settings, environment, rollout.server_host, port, log)
            servers.append(VllmServer(f"server {i}", self._client("", token), process))
        return servers

    # ---- responses ---------------------------------------------------------------------------------------------------

    def generate(
        self, requests: Sequence[GenerateRequest], sampling: SamplingSettings, on_rollout: OnRollout | None = None
    ) -> list[Rollout]:
        """See RolloutEngine. Servers that fail meanwhile are restarted and given the weights, by all ranks together.

        Raises RolloutError for a prompt that leaves no room for `max_tokens`, and when no server is left.
        """
        return self.collect(self.submit(requests, sampling, on_rollout))

    def submit(
        self, requests: Sequence[GenerateRequest], sampling: SamplingSettings, on_rollout: OnRollout | None = None
    ) -> Answers:
        """Begin to generate. `collect` waits for the answers."""
        check_lengths(requests, sampling, self._max_model_len)
        _require_whole_publish(self._half_published)
        answers = self._fleet.start(self._fleet.generate(requests, sampling, self._salt(), on_rollout))
        answers.add_done_callback(lambda _: self._events.put(None))
        return answers

    def _salt(self) -> str:
        """What separates a call's entries in the servers' prefix caches."""
        self._calls += 1
        return f"{secrets.token_hex(4)}-{self._calls}"

    def converse(
        self, requests: Sequence[GenerateRequest], sampling: SamplingSettings,
        begin: Callable[[list[GenerateRequest]], Feed],
    ) -> None:  # fmt: skip
        """See RolloutEngine. Rank 0 has the feed of all servers."""
        self.collect(self.submit_feed(requests, sampling, begin))

    def submit_feed(
        self, requests: Sequence[GenerateRequest], sampling: SamplingSettings,
        begin: Callable[[list[GenerateRequest]], Feed],
    ) -> Answers:  # fmt: skip
        """Begin to converse. `collect` waits for the end, and returns the feed's rollouts."""
        check_lengths(requests, sampling, self._max_model_len)
        _require_whole_publish(self._half_published)
        feed = begin(list(requests))
        answers = self._fleet.start(self._fleet.converse(feed, sampling, self._salt()))
        answers.add_done_callback(lambda _: self._events.put(None))
        return answers

    def collect(self, answers: Answers) -> list[Rollout]:
        """The answers to what was submitted; those to requests are sorted by (prompt, sample). Collective: the others
        are in `generate` or `converse`."""
        while names := self._control.share(lambda: self._next_event(answers)):
            self._send_weights(names)
        rollouts = answers.result()
        self._mark_stale(rollouts)
        return rollouts

    def _next_event(self, answers: Answers) -> list[str]:
        """Wait until a server needs weights, or all answers have come. Returns the server's name, or no
        name at the end."""
        while not answers.done():
            server = self._events.get()
            if server is not None and server.alive and server.version != self.weight_version:
                return [server.name]
        answers.result()  # an error is raised here, and so on every rank
        return []

    def _mark_stale(self, rollouts: list[Rollout]) -> None:
        """Mark the rollouts that are older than allowed: they are left out of the loss. One without tokens, of an
        environment that did not start, has no age."""
        sampled = [rollout for rollout in rollouts if rollout.token_ids]
        ages = [self.weight_version - rollout.weight_version for rollout in sampled]
        for rollout, age in zip(sampled, ages, strict=True):
            rollout.stale = age > self._rollout.max_staleness
        self._metrics = {
            "rollout/staleness_mean": sum(ages) / max(1, len(ages)),
            "rollout/staleness_max": max(ages, default=0),
        }

    def metrics(self) -> dict[str, float]:
        return self._metrics | {
            "rollout/server_restarts": self._fleet.restarted, "rollout/retried_requests": self._fleet.retried
        }  # fmt: skip

    # ---- weights -----------------------------------------------------------------------------------------------------

    def publish(self, weights: Weights, version: int) -> None:
        """See RolloutEngine. `weights` is iterated again for every server that is restarted before the next publish,
        and must give the same tensors each time, so it cannot be an iterator.

        Raises BridgeError when the tensors are not those of the engines' model, or did not arrive as they were. A
        server that fails is restarted; it gets no requests until a whole publish has reached it.
        """
        _require_repeatable(weights)
        self._half_published = True
        self._weights, self.weight_version, self._verify = weights, version, self._verifier.begin()
        self._control.share(self._settle_requests)
        self._send_weights(None)
        self._half_published = False
        self._fleet.loop.call_soon_threadsafe(self._fleet.release)

    def _settle_requests(self) -> None:
        """Let requests in flight finish, abort them (they are sent again later), or leave them to be paused."""
        fleet, mode = self._fleet, self._rollout.in_flight

        async def settle() -> None:
            await fleet.wait_until_up()
            fleet.hold()
            fleet.version = self.weight_version
            if mode == "finish":
                await fleet.finish_running()
            elif mode == "abort":
                await fleet.abort_running()

        fleet.run(settle())

    def _send_weights(self, names: list[str] | None) -> None:
        """Send the weights to the servers of these names, or to all that answer. Collective: the module's docstring has
        the turns."""
        control, rank = self._control, self._control.rank
        joins = control.share(lambda: self._begin_transfer(names))
        not_joined = _merged(control.gather(self._sender.join_all(joins.get(rank, {}))))
        shares = control.share(lambda: self._begin_updates(not_joined))
        weights = self._verifier.record(self._weights) if self._verify else self._weights
        failed = _merged(control.gather(self._sender.send(shares.get(rank, []), weights)))
        control.share(lambda: self._finish_transfer(failed))

    def _begin_transfer(self, names: list[str] | None) -> Joins:
        """Pause the servers, and ask those that have not joined a group with us to join one."""
        fleet = self._fleet
        self._calls += 1
        servers = [server for server in fleet.usable() if names is None or server.name in names]
        for server in servers:
            server.version = None
        mode = "keep" if self._rollout.in_flight == "pause" else "abort"
        self._call_all(servers, lambda server: server.client.call("POST", "/pause", mode=mode))
        self._transfer = Transfer(f"report/{self._calls}", self.weight_version, servers, {}, {})
        joins: Joins = {}
        for server in servers:
            if server.alive and not self._has_joined(server):
                self._losses_at_join[server.name] = server.losses
                address = self._sender.new_address(server.name, server.world_size)
                joins.setdefault(self._sending_rank(server), {})[server.name] = address
                call = server.client.call(
                    "POST", "/init_weight_transfer_engine", body={"init_info": {"group": asdict(address)}}
                )
                self._transfer.joining[server.name] = fleet.start(call)
        return joins

    def _begin_updates(self, not_joined: dict[str, str]) -> Shares:
        """Let the servers that have joined wait for weights."""
        transfer = self._transfer
        assert transfer is not None
        for server in transfer.servers:
            try:
                if server.name in not_joined:
                    raise RuntimeError(not_joined[server.name])
                if server.name in transfer.joining:
                    transfer.joining[server.name].result()
            except (RuntimeError, ServerError, UnacceptableRequest) as error:
                self._lose(server, f"its workers did not join for the weights: {error}")
        self._call_all(transfer.servers, lambda server: server.client.call("POST", "/start_weight_update"))
        transfer.servers = list(filter(self._is_of_the_publish, transfer.servers))
        adapters = self._settings.adapters
        section = None if adapters is None else adapters.model_dump()
        body = {"update_info": {"report": transfer.key, "verify": self._verify, "adapters": section}}
        timeout = self._rollout.request_timeout_seconds
        shares: Shares = {}
        for server in transfer.servers:
            call = server.client.call("POST", "/update_weights", body=body, timeout=timeout)
            transfer.updates[server.name] = self._fleet.start(call)
            shares.setdefault(self._sending_rank(server), []).append(server.name)
        return shares

    def _sending_rank(self, server: VllmServer) -> int:
        servers = self._fleet.servers
        return sender_of(servers.index(server), len(servers), self._control.world_size)

    def _call_all(self, servers: list[VllmServer], call: Callable[[VllmServer], Coroutine[Any, Any, object]]) -> None:
        """Make the same call to all servers that are alive. A server whose call fails is lost."""
        alive = [server for server in servers if server.alive]
        results = self._fleet.run(results_or_errors([call(server) for server in alive]))
        for server, result in zip(alive, results, strict=True):
            if isinstance(result, ServerError | UnacceptableRequest):
                self._lose(server, str(result))
            elif isinstance(result, BaseException):
                raise result

    def _lose(self, server: VllmServer, why: str) -> None:
        self._losses_at_join.pop(server.name, None)
        fleet = self._fleet

        async def lose() -> None:
            fleet.lost(server, why)

        fleet.run(lose())

    def _has_joined(self, server: VllmServer) -> bool:
        """Whether the workers of its current process have joined a group with us."""
        return self._losses_at_join.get(server.name) == server.losses

    def _is_of_the_publish(self, server: VllmServer) -> bool:
        """Whether it answers with the process that takes part. One that was restarted meanwhile waits for a publish of
        its own: it has the weights of its folder."""
        return server.alive and self._has_joined(server)

    def _finish_transfer(self, failed: dict[str, str]) -> None:
        """Check that every server has loaded all weights, and let it continue."""
        transfer = self._transfer
        assert transfer is not None
        try:
            for server in transfer.servers:
                self._check(server, transfer, failed.get(server.name))
        except Exception:  # a server refused the weights, or has wrong ones: all stay paused until another publish
            calls = [server.client.call("POST", "/finish_weight_update") for server in transfer.servers]
            self._fleet.run(results_or_errors(calls))
            raise
        done = list(filter(self._is_of_the_publish, transfer.servers))
        body = {"weight_version": str(transfer.version)}
        self._call_all(done, lambda server: server.client.call("POST", "/finish_weight_update", body=body))
        self._call_all(done, lambda server: server.client.call("POST", "/reset_prefix_cache"))
        self._call_all(done, lambda server: server.client.call("POST", "/resume"))
        for server in filter(self._is_of_the_publish, done):
            server.version = transfer.version
        fleet = self._fleet
        fleet.loop.call_soon_threadsafe(fleet.pump)

    def _check(self, server: VllmServer, transfer: Transfer, failure: str | None) -> None:
        """Wait until the server has loaded all weights. A server that fails is lost; wrong weights raise
        BridgeError."""
        try:
            if failure is not None:
                raise RuntimeError(failure)
            self._wait_until_loaded(server, transfer)
        except (RuntimeError, ServerError, UnacceptableRequest) as error:
            self._lose(server, f"the publish of version {transfer.version} failed: {error}")

    def _wait_until_loaded(self, server: VllmServer, transfer: Transfer) -> None:
        """The workers' own reports say more than the HTTP status, so their errors are raised first."""
        timeout_s = self._rollout.server_timeout_seconds
        try:  # all tensors have been sent: only the last layer is still to be loaded
            failure = transfer.updates[server.name].exception(timeout_s)
        except TimeoutError:
            raise RuntimeError(f"it has not loaded them {timeout_s:g} s after the last was sent") from None
        reports = [self._sender.report(server.name, transfer.key, worker) for worker in range(server.world_size)]
        if failure is not None:
            raise failure
        if self._verify:
            checksums = [report.get("checksums") if report else None for report in reports]
            self._verifier.compare(server.name, [found for found in checksums if found is not None])

    # ---- the rest ----------------------------------------------------------------------------------------------------

    def sleep(self, *, publish_next: bool = False) -> None:
        """Does nothing: servers have devices of their own."""

    def close(self) -> None:
        """End the servers that we started. Not collective."""
        self._fleet.close()


def host_of(url: str) -> str:
    """The host in a server's address."""
    return urllib.parse.urlsplit(url).hostname or ""
