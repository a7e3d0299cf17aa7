"""vLLM servers in processes of their own: the driver asks, and sends them the weights."""

from __future__ import annotations

import os
import queue
import secrets
import urllib.parse
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_srpo.config import RolloutConfig
from megatron_srpo.core.records import Rollout
from megatron_srpo.rollout.engine import GenerateRequest, OnRollout, SamplingSettings, check_lengths
from megatron_srpo.rollout.fleet import Fleet, Server
from megatron_srpo.rollout.guard import TOKEN_VARIABLE
from megatron_srpo.rollout.http import ServerClient, ServerError, UnacceptableRequest, everywhere
from megatron_srpo.rollout.server_process import ServerProcess, server_environment, visible_devices
from megatron_srpo.rollout.vllm_engine import EngineSettings, check_model

Weights = Iterable[tuple[str, torch.Tensor]]


@dataclass
class Delivery:
    """One publish to some servers, on its way."""

    key: str
    version: int
    servers: list[Server]
    updates: dict[str, Future]


class ServersEngine:
    """A RolloutEngine whose engines are HTTP servers, started by the driver or given as rollout.servers.

    Making one is collective; the driver alone has servers. `control` shares results between ranks (mcore.control).
    `make_sender(host)` makes the driver's end of the weight streams (bridge.wire.Sender) to servers on that host.
    `verifier`: a bridge.verify.Verifier. `logs`: a folder. `decode`
    turns response ids into text (driver). `say` takes a line for the user (driver).
    """

    def __init__(
        self, *, hf_dir: str, tokenizer: str, dtype: str, rollout: RolloutConfig, max_model_len: int, seed: int,
        device: str, control: Any, make_sender: Callable[[str], Any], verifier: Any, logs: Path,
        decode: Callable[[list[int]], str], say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._rollout, self._control, self._max_model_len = rollout, control, max_model_len
        self._verifier, self._verify = verifier, False
        self._settings = EngineSettings(hf_dir, tokenizer or hf_dir, dtype, rollout, max_model_len, seed, device, "")
        self._events: queue.SimpleQueue = queue.SimpleQueue()  # servers that need weights, and None at an answer's end
        self._weights: Weights = ()
        self._calls = 0
        self._metrics: dict[str, float] = {}
        self._delivery: Delivery | None = None
        self._met: dict[str, int] = {}
        self._half_published = False
        self._fleet: Fleet | None = None
        self.weight_version = 0
        control.share(lambda: self._open(logs, make_sender, decode, say))

    def _open(self, logs: Path, make_sender: Callable, decode: Callable, say: Callable) -> None:
        rollout = self._rollout
        check_model(self._settings.hf_dir, rollout, self._max_model_len, self._settings.device)
        servers = self._given() if rollout.servers else self._own(logs)
        self._sender = make_sender(host_of(rollout.servers[0]) if rollout.servers else rollout.server_host)
        self._fleet = Fleet(
            servers, limit=rollout.max_num_seqs, exact=rollout.max_staleness == 0,
            timeout_s=rollout.server_timeout_seconds, start_timeout_s=rollout.server_start_seconds,
            max_restarts=rollout.max_server_restarts, say=say, needs_weights=self._events.put, decode=decode,
        )  # fmt: skip
        try:
            self._fleet.run(self._fleet.bring_up())
        except BaseException:
            self._fleet.close()
            raise

    def _client(self, url: str, token: str) -> ServerClient:
        return ServerClient(
            url, token, request_timeout_s=self._rollout.request_timeout_seconds,
            control_timeout_s=self._rollout.server_timeout_seconds,
        )  # fmt: skip

    def _given(self) -> list[Server]:
        token = os.environ.get(TOKEN_VARIABLE, "")
        urls = [url.rstrip("/") for url in self._rollout.servers]
        return [Server(f"server {i}", self._client(url, token)) for i, url in enumerate(urls)]

    def _own(self, logs: Path) -> list[Server]:
        rollout, cpu = self._rollout, self._settings.device == "cpu"
        token = secrets.token_urlsafe(32)
        workers = rollout.num_servers * rollout.tensor_parallel_size
        threads = max(1, len(os.sched_getaffinity(0)) // workers)
        servers = []
        for i in range(rollout.num_servers):
            devices = None if cpu else visible_devices(i, rollout.tensor_parallel_size, rollout.server_devices)
            environment = server_environment(token, devices, threads if cpu else None)
            port = rollout.server_port and rollout.server_port + i
            process = ServerProcess(self._settings, environment, rollout.server_host, port, logs / f"server-{i}.log")
            servers.append(Server(f"server {i}", self._client("", token), process))
        return servers

    # ---- responses ---------------------------------------------------------------------------------------------------

    def generate(
        self, requests: Sequence[GenerateRequest], sampling: SamplingSettings, on_rollout: OnRollout | None = None
    ) -> list[Rollout] | None:
        """See RolloutEngine. Servers that fail meanwhile are restarted and given the weights, by all ranks together.

        Raises RolloutError for a prompt that leaves no room for `max_tokens`, and when no server is left.
        """
        return self.collect(self.submit(requests, sampling, on_rollout))

    def submit(
        self, requests: Sequence[GenerateRequest], sampling: SamplingSettings, on_rollout: OnRollout | None = None
    ) -> Future | None:
        """Begin to generate, on the driver; `collect` waits for the answers."""
        check_lengths(requests, sampling, self._max_model_len)
        if self._half_published:
            raise RuntimeError("the last publish failed: no engine has whole weights. Publish again first.")
        if self._fleet is None:
            return None
        self._calls += 1
        salt = f"{secrets.token_hex(4)}-{self._calls}"
        answers = self._fleet.start(self._fleet.generate(requests, sampling, salt, on_rollout))
        answers.add_done_callback(lambda _: self._events.put(None))
        return answers

    def collect(self, answers: Future | None) -> list[Rollout] | None:
        """What was submitted, sorted by (prompt, sample), on the driver; None on the other ranks. Collective."""
        while names := self._control.share(lambda: self._next_event(answers)):
            self._deliver(names)
        if answers is None:
            return None
        rollouts = answers.result()
        self._mark_stale(rollouts)
        return rollouts

    def _next_event(self, answers: Future) -> list[str]:
        """Names of servers to send weights to; empty when all answers are there. Waits for either."""
        while not answers.done():
            server = self._events.get()
            if server is not None and server.alive and server.version != self.weight_version:
                return [server.name]
        answers.result()  # raises here, and so on every rank
        return []

    def _mark_stale(self, rollouts: list[Rollout]) -> None:
        """Mark what is older than allowed: it is left out of the loss."""
        ages = [self.weight_version - rollout.weight_version for rollout in rollouts]
        for rollout, age in zip(rollouts, ages, strict=True):
            rollout.stale = age > self._rollout.max_staleness
        self._metrics = {
            "rollout/staleness_mean": sum(ages) / max(1, len(ages)),
            "rollout/staleness_max": max(ages, default=0),
        }

    def metrics(self) -> dict[str, float]:
        fleet = self._fleet
        return self._metrics | {"rollout/server_restarts": fleet.restarted, "rollout/retried_requests": fleet.retried}

    # ---- weights -----------------------------------------------------------------------------------------------------

    def publish(self, weights: Weights, version: int) -> None:
        """See RolloutEngine. `weights` is iterated again for every server that is restarted before the next publish,
        and must then still give this version: an iterator does not do.

        Raises BridgeError when the tensors are not the engines' model, or did not arrive as they were. A server that
        fails is restarted; it answers nothing until a whole publish has reached it.
        """
        if iter(weights) is weights:
            raise ValueError("publish() needs weights that can be iterated again, got an iterator")
        self._half_published = True
        self._weights, self.weight_version, self._verify = weights, version, self._verifier.begin()
        self._control.share(self._settle)
        self._deliver(None)
        self._half_published = False
        if self._fleet is not None:
            self._fleet.loop.call_soon_threadsafe(self._fleet.release)

    def _settle(self) -> None:
        """Requests in flight finish, are aborted (and asked for again), or stay where they are, to be paused."""
        fleet, mode = self._fleet, self._rollout.in_flight

        async def settle() -> None:
            fleet.hold()
            fleet.version = self.weight_version
            if mode == "finish":
                await fleet.finish_running()
            elif mode == "abort":
                await fleet.abort_running()

        fleet.run(settle())

    def _deliver(self, names: list[str] | None) -> None:
        """The weights to these servers (None: all that answer), by all ranks together."""
        self._control.share(lambda: self._begin(names))
        failed: dict[str, str] = {}
        if self._fleet is None:
            for _ in self._weights:
                pass
        else:
            weights = self._verifier.record(self._weights) if self._verify else self._weights
            failed = self._sender.send([server.name for server in self._delivery.servers], weights)
        self._control.share(lambda: self._complete(failed))

    def _begin(self, names: list[str] | None) -> None:
        """Driver: pause the servers, meet their workers where that has not happened, and let them wait for weights."""
        fleet = self._fleet
        self._calls += 1
        servers = [server for server in fleet.usable() if names is None or server.name in names]
        for server in servers:
            server.version = None
        mode = "keep" if self._rollout.in_flight == "pause" else "abort"
        self._all(servers, lambda server: server.client.call("POST", "/pause", mode=mode))
        for server in servers:
            if server.alive and not self._is_met(server):
                self._meet(server)
        self._all(servers, lambda server: server.client.call("POST", "/start_weight_update"))
        ready = [server for server in servers if server.alive and self._is_met(server)]
        key = f"report/{self._calls}"
        body = {"update_info": {"report": key, "verify": self._verify}}
        updates = {
            server.name: fleet.start(
                server.client.call("POST", "/update_weights", body=body, timeout=self._rollout.request_timeout_seconds)
            )
            for server in ready
        }
        self._delivery = Delivery(key, self.weight_version, ready, updates)

    def _all(self, servers: list[Server], call: Callable) -> None:
        """The same call to all that are alive; who fails is lost."""
        alive = [server for server in servers if server.alive]
        for server, result in zip(alive, self._fleet.run(everywhere([call(server) for server in alive])), strict=True):
            if isinstance(result, ServerError | UnacceptableRequest):
                self._lose(server, str(result))
            elif isinstance(result, Exception):
                raise result

    def _lose(self, server: Server, why: str) -> None:
        self._sender.leave(server.name)

        async def lose() -> None:
            self._fleet.lost(server, why)

        self._fleet.run(lose())

    def _is_met(self, server: Server) -> bool:
        """Whether its workers, those of its present life, have joined."""
        return self._sender.joined(server.name) and self._met.get(server.name) == server.losses

    def _meet(self, server: Server) -> None:
        self._met[server.name] = server.losses
        meeting = self._sender.meeting(server.name, server.world_size)
        body = {"init_info": {"meeting": meeting}}
        answer = self._fleet.start(server.client.call("POST", "/init_weight_transfer_engine", body=body))
        try:
            self._sender.join(server.name, meeting)
            answer.result()
        except (RuntimeError, ServerError, UnacceptableRequest) as error:
            self._lose(server, f"its workers did not join for the weights: {error}")

    def _complete(self, failed: dict[str, str]) -> None:
        """Driver: see that every server has loaded everything, and let it go on."""
        delivery = self._delivery
        try:
            for server in delivery.servers:
                self._check(server, delivery, failed.get(server.name))
        except Exception:  # refused, or found wrong: all stay paused, and are left ready for another publish
            calls = [server.client.call("POST", "/finish_weight_update") for server in delivery.servers]
            self._fleet.run(everywhere(calls))
            raise
        done = [server for server in delivery.servers if server.alive]
        body = {"weight_version": str(delivery.version)}
        self._all(done, lambda server: server.client.call("POST", "/finish_weight_update", body=body))
        self._all(done, lambda server: server.client.call("POST", "/reset_prefix_cache"))
        self._all(done, lambda server: server.client.call("POST", "/resume"))
        for server in done:
            if server.alive:
                server.version = delivery.version
        self._fleet.loop.call_soon_threadsafe(self._fleet.pump)

    def _check(self, server: Server, delivery: Delivery, failure: str | None) -> None:
        """Wait until it has loaded everything. A server that fails is lost; raises when the weights are at fault."""
        try:
            if failure is not None:
                raise RuntimeError(failure)
            self._loaded(server, delivery)
        except (RuntimeError, ServerError, UnacceptableRequest) as error:
            self._lose(server, f"the publish of version {delivery.version} failed: {error}")

    def _loaded(self, server: Server, delivery: Delivery) -> None:
        """What its workers say goes before what its HTTP says."""
        patience = self._rollout.server_timeout_seconds
        try:  # it has been sent everything: what is left is its last layer
            failure = delivery.updates[server.name].exception(patience)
        except TimeoutError:
            raise RuntimeError(f"it has not loaded them {patience:g} s after the last was sent") from None
        reports = [self._sender.report(server.name, delivery.key, worker) for worker in range(server.world_size)]
        if failure is not None:
            raise failure
        if self._verify:
            self._verifier.compare(server.name, [report["checksums"] for report in reports])

    # ---- the rest ----------------------------------------------------------------------------------------------------

    def sleep(self) -> None:
        """Servers have devices of their own: nothing to free."""

    def close(self) -> None:
        """End the servers that we started. Not collective."""
        if self._fleet is not None:
            self._fleet.close()


def host_of(url: str) -> str:
    """The host in a server's address."""
    return urllib.parse.urlsplit(url).hostname or ""
