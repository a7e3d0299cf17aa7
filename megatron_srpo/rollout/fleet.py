"""Rank 0's view of its rollout servers: which are usable, how much work each has, and which one answers a request.

Everything here runs in one event loop, in a thread of its own. `Fleet.run` and `Fleet.start` are called from outside.

    starting ─► stale ─► ready ─► failed ─► starting …        a server that we started
                  ▲________________│ (the wanted version changes: a publish)
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, Protocol, TypeVar

from megatron_srpo.core.records import Rollout
from megatron_srpo.core.text import clause
from megatron_srpo.rollout.engine import Feed, GenerateRequest, OnRollout, RolloutError, SamplingSettings
from megatron_srpo.rollout.http import BadAnswer, ServerError, UnacceptableRequest

KEEP_TOGETHER = 8  # a prompt's samples stay on one server, for its prefix cache, until it is this many requests ahead
ATTEMPTS = 4  # failures of one request after which the request itself counts as their cause
HEALTH_SECONDS = 1.0  # time between two health checks of a server
START_AGAIN_SECONDS = 30.0  # time until a start that failed is tried again: what was full may be cleared meanwhile

T = TypeVar("T")
ServerT = TypeVar("ServerT", bound="Server")


class StartFailed(RolloutError):
    """The process of a server has ended before it answered; `ended` says how."""

    def __init__(self, text: str, ended: str = "") -> None:  # pickled for the other ranks, it is made of its text
        super().__init__(text)
        self.ended = ended


class ServerClient(Protocol):
    """What the fleet asks of a server. Calls raise ServerError, or UnacceptableRequest. Time-outs are in seconds."""

    url: str

    async def close(self) -> None: ...

    async def health(self, timeout: float) -> None: ...

    async def world_size(self, timeout: float) -> int:
        """The number of the engine's workers."""
        ...

    async def weight_version(self) -> int | None:
        """0 for the weights of the folder, None for others."""
        ...

    async def generate(
        self, request: GenerateRequest, sampling: SamplingSettings, salt: str, decode: Callable[[list[int]], str]
    ) -> Rollout | None:
        """One response, or None when the server aborted it."""
        ...


class ServerProcess(Protocol):
    """The process of a server that we started."""

    url: str
    fixed_port: int  # 0: any free port

    def start(self) -> None: ...

    def ended(self) -> str | None:
        """How it ended, in words, or None while it runs."""
        ...

    def port_was_taken(self) -> bool: ...

    def last_words(self) -> str:
        """The last lines of its log that tell something, on one line."""
        ...

    def ask_to_stop(self) -> None: ...

    def wait(self) -> None:
        """Return when it has ended."""
        ...

    def stop(self) -> None:
        """`ask_to_stop`, then `wait`."""
        ...


@dataclass(eq=False)
class Server:
    """One engine. `version` is that of its weights, None while it is unknown or mixed. A server gets requests only
    while it has the wanted version."""

    name: str
    client: ServerClient
    process: ServerProcess | None = None  # None: the server was started by somebody else
    alive: bool = False  # it answers, as far as we know
    version: int | None = None
    world_size: int = 0
    outstanding: int = 0  # tokens of the requests it works on: prompt and longest response
    jobs: set[asyncio.Task[Rollout | None]] = field(default_factory=set)
    restarts: int = 0  # since it last answered a request
    losses: int = 0  # how often it was lost in all
    gone: bool = False  # we have given it up
    answered: int = 0
    trouble: str = ""  # why it was lost last


@dataclass(eq=False)
class Job:
    """One request on its way to an answer."""

    request: GenerateRequest
    sampling: SamplingSettings
    salt: str
    on_rollout: OnRollout | None
    answer: asyncio.Future[Rollout]
    attempts: list[str] = field(default_factory=list)

    @property
    def cost(self) -> int:
        """Its tokens, if the response is of full length."""
        return len(self.request.token_ids) + self.request.longest(self.sampling)


class Fleet(Generic[ServerT]):
    """Starts, watches and restarts servers, and distributes requests among them.

    `limit` is the number of requests that one server works on at a time. `say` takes a line for the user.
    `needs_weights(server)` is called, in the loop's thread, when a server has come up with weights of another version
    than the wanted one. With `exact`, a response with a token of another version counts as a failure.
    `folder_is_first`: a new server, which has the weights of its folder, has those of version 0.
    """

    def __init__(
        self, servers: Sequence[ServerT], *, limit: int, exact: bool, timeout_s: float, start_timeout_s: float,
        max_restarts: int, say: Callable[[str], None], needs_weights: Callable[[ServerT], None],
        decode: Callable[[list[int]], str], folder_is_first: bool = True,
    ) -> None:  # fmt: skip
        self.servers = list(servers)
        self.version = 0  # the wanted one
        self.restarted = self.retried = 0
        self._limit, self._exact, self._timeout, self._start_timeout = limit, exact, timeout_s, start_timeout_s
        self._folder_is_first = folder_is_first
        self._max_restarts, self._say, self._needs_weights, self._decode = max_restarts, say, needs_weights, decode
        self._pending: deque[Job] = deque()
        self._homes: dict[tuple[str, int], ServerT] = {}  # (salt of the call, prompt) → the server of its samples
        self._held = False
        self._closing = False
        self._all_up: Future[None] | None = None  # None: not launched
        self._tasks: set[asyncio.Task[None]] = set()
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="engine-servers", daemon=True)
        self._thread.start()

    # ---- from outside ------------------------------------------------------------------------------------------------

    def start(self, work: Coroutine[None, None, T]) -> Future[T]:
        """Begin `work` in the loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def run(self, work: Coroutine[None, None, T]) -> T:
        """The result of `work`, which runs in the loop."""
        return self.start(work).result()

    def close(self) -> None:
        """End all servers that we started. It is safe to call this twice."""
        if self._closing:
            return
        self._closing = True
        self.run(self._close())  # first, because what it cancels may start a server again
        own = [server.process for server in self.servers if server.process is not None]
        for process in own:
            process.ask_to_stop()
        for process in own:
            process.wait()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    async def _close(self) -> None:
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for server in self.servers:
            await server.client.close()

    # ---- life of servers ---------------------------------------------------------------------------------------------

    def launch(self) -> None:
        """Start all servers. Returns at once; `wait_until_up`, `generate` and `converse` wait until they answer. Called
        once, from outside."""
        for server in self.servers:
            if server.process is not None:
                server.process.start()
        self._all_up = self.start(self._bring_up())

    async def wait_until_up(self) -> None:
        """Wait until all servers have answered once. Raises RolloutError when one has not."""
        assert self._all_up is not None, "launch() comes first"
        await asyncio.shield(asyncio.wrap_future(self._all_up))  # several calls may wait, and one may be cancelled

    async def _bring_up(self) -> None:
        await asyncio.gather(*(self._until_up(server) for server in self.servers))
        for server in self.servers:
            self._keep(asyncio.ensure_future(self._watch(server)))

    async def _until_up(self, server: ServerT) -> None:
        """Wait for the first answer. If another program has taken the port meanwhile, start again on another port."""
        process, deadline = server.process, asyncio.get_running_loop().time() + self._start_timeout
        while True:
            if process is not None:
                server.client.url = process.url
                ended = process.ended()
                if ended and process.port_was_taken() and not process.fixed_port:
                    self._say(f"{server.name}: port of {process.url} was taken; trying another")
                    process.start()
                elif ended:
                    cure = "Choose another rollout.server_port" if process.port_was_taken() else "See its log"
                    raise StartFailed(f"{server.name} did not start: {clause(ended)}. {cure}", ended)
            try:
                server.world_size = await server.client.world_size(timeout=5)
                # What we did not start may have the weights of an earlier run; ours has just loaded the folder.
                found = await server.client.weight_version() if process is None else 0
                break
            except UnacceptableRequest as error:  # it answers, but refuses us
                raise RolloutError(f"{server.name} at {server.client.url} refuses us: {error}") from error
            except ServerError as error:
                if asyncio.get_running_loop().time() > deadline:
                    raise RolloutError(
                        f"no server answers at {server.client.url}: {clause(_with_last_words(server, str(error)))}. Is "
                        "it running, or does it need longer (rollout.server_start_seconds)?"
                    ) from error
                await asyncio.sleep(0.2)
        server.alive, server.version = True, found if self._folder_is_first else None

    async def _watch(self, server: ServerT) -> None:
        """Check a server's process and health until it is given up."""
        while not server.gone:
            await asyncio.sleep(HEALTH_SECONDS)
            if not server.alive:
                continue
            if server.process is not None and server.process.ended() is not None:
                self.lost(server)
                continue
            try:
                await server.client.health(timeout=self._timeout)
            except (ServerError, UnacceptableRequest) as error:
                self.lost(server, str(error))

    def lost(self, server: ServerT, why: str = "") -> None:
        """A server has failed: its requests go to others, and it is started again if it is ours. `why` may be "" if its
        process has ended."""
        if not server.alive or self._closing:
            return
        why = _with_last_words(server, why)
        server.alive, server.version, server.trouble = False, None, why
        server.losses += 1
        for job in list(server.jobs):
            job.cancel()
        if server.restarts >= self._max_restarts:
            self._give_up(server, f", it was lost {server.restarts + 1} times in a row: {why}")
        else:
            server.restarts += 1
            self.restarted += 1
            what = "waited for" if server.process is None else "started again"
            self._say(f"{server.name} is lost and {what}: {why}")
            self._keep(asyncio.ensure_future(self._restart(server)))

    async def _restart(self, server: ServerT) -> None:
        """Start a lost server again, and wait until it answers. A start that fails (a full disk, no memory) is tried
        again, and counts as a restart. So is one whose process ends while it loads, as where the device still has the
        memory of the lost one."""
        while not server.alive:
            try:
                if server.process is not None:
                    await asyncio.to_thread(server.process.stop)
                    server.process.start()
                await self._until_up(server)
            except Exception as error:  # any: requests would wait for ever for a server that is neither up nor gone
                if isinstance(error, RolloutError) and not isinstance(error, StartFailed):
                    server.trouble = str(error)
                    return self._give_up(server, f": {error}")
                why = error.ended if isinstance(error, StartFailed) else str(error) or type(error).__name__
                server.trouble = f"it could not be started: {why}"
                if server.restarts >= self._max_restarts:
                    return self._give_up(server, f", {server.trouble}")
                server.restarts += 1
                self.restarted += 1
                self._say(f"{server.name} is tried again in {START_AGAIN_SECONDS:g} s, {server.trouble}")
                await asyncio.sleep(START_AGAIN_SECONDS)
        if server.version != self.version:
            self._needs_weights(server)
        self.pump()

    def _give_up(self, server: ServerT, why: str) -> None:
        server.gone = True
        if server.process is not None:
            server.process.ask_to_stop()
        self._say(f"{server.name} is given up{why}")
        self._fail_if_none_left()

    def _keep(self, task: asyncio.Task[None]) -> None:
        """Hold a reference to a task: the event loop itself holds only a weak one."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def usable(self) -> list[ServerT]:
        """The servers that answer, at any version of the weights."""
        return [server for server in self.servers if server.alive and not server.gone]

    def _fail_if_none_left(self) -> None:
        if not all(server.gone for server in self.servers):
            return
        troubles = [f"{server.name}: {server.trouble}" for server in self.servers]
        error = RolloutError(f"no rollout server is left: {'; '.join(troubles)}")
        while self._pending:
            answer = self._pending.popleft().answer
            if not answer.done():
                answer.set_exception(error)

    # ---- requests ----------------------------------------------------------------------------------------------------

    async def generate(
        self, requests: Sequence[GenerateRequest], sampling: SamplingSettings, salt: str, on_rollout: OnRollout | None
    ) -> list[Rollout]:
        """An answer to each request, sorted by (prompt, sample). `salt` separates this call's entries in the prefix
        cache, because entries of an earlier call would change roundings."""
        await self.wait_until_up()
        ordered = sorted(requests, key=lambda request: (request.prompt, request.sample))
        jobs = [self._job(request, sampling, salt, on_rollout) for request in ordered]
        return await self._answers(jobs, salt)

    def _job(
        self, request: GenerateRequest, sampling: SamplingSettings, salt: str, on_rollout: OnRollout | None
    ) -> Job:
        return Job(request, sampling, salt, on_rollout, asyncio.get_running_loop().create_future())

    async def _answers(self, jobs: Sequence[Job], salt: str) -> list[Rollout]:
        self._pending.extend(jobs)
        self._fail_if_none_left()
        self.pump()
        try:
            return list(await asyncio.gather(*(job.answer for job in jobs)))
        except BaseException:
            for job in jobs:
                job.answer.cancel()
            raise
        finally:
            self._forget_homes(salt)

    async def converse(self, feed: Feed, sampling: SamplingSettings, salt: str) -> list[Rollout]:
        """Answer the requests of a feed until it has no more; see RolloutEngine. The turns of an episode share the
        prefix cache, and so do the samples of a prompt. Returns the feed's rollouts."""
        await self.wait_until_up()
        jobs: set[asyncio.Future[Rollout]] = set()
        failed: list[BaseException] = []

        def done(answer: asyncio.Future[Rollout]) -> None:
            jobs.discard(answer)
            if not answer.cancelled() and answer.exception() is not None:
                failed.append(answer.exception() or RuntimeError())
                feed.stop()

        # A thread of its own: feeds that wait would take all those of the loop's pool, in which answers are read.
        thread = ThreadPoolExecutor(1, thread_name_prefix="feed")
        ready = partial(feed.ready, wait=True)
        try:
            while (requests := await self.loop.run_in_executor(thread, ready)) is not None:
                for request in requests:
                    job = self._job(request, sampling, salt, feed.answer)
                    jobs.add(job.answer)
                    job.answer.add_done_callback(done)
                    self._pending.append(job)
                self._fail_if_none_left()
                self.pump()
            if failed:
                raise failed[0]
            return feed.rollouts
        finally:
            for answer in list(jobs):
                answer.cancel()
            feed.stop()  # its thread, which may still wait, ends
            thread.shutdown(wait=False)
            self._forget_homes(salt)

    def _forget_homes(self, salt: str) -> None:
        self._homes = {place: server for place, server in self._homes.items() if place[0] != salt}

    def hold(self) -> None:
        """Send no further request until `release`."""
        self._held = True

    def release(self) -> None:
        self._held = False
        self.pump()

    async def finish_running(self) -> None:
        """Wait until no server works on a request."""
        while running := [job for server in self.servers for job in server.jobs]:
            await asyncio.wait(running)

    async def abort_running(self) -> None:
        """Cancel the requests that servers work on. They are sent again later."""
        for server in self.servers:
            for job in list(server.jobs):
                job.cancel()
        await self.finish_running()

    def pump(self) -> None:
        """Send waiting requests to servers that have room for them."""
        while self._pending and not self._held:
            if self._pending[0].answer.done():  # cancelled
                self._pending.popleft()
                continue
            server = self._choose(self._pending[0])
            if server is None:
                return
            job = self._pending.popleft()
            server.outstanding += job.cost
            task = asyncio.ensure_future(
                server.client.generate(job.request, job.sampling, job.salt, self._decode)
            )  # fmt: skip
            server.jobs.add(task)
            # A callback and not the task's own code, because a task that is cancelled before it starts runs no code.
            task.add_done_callback(partial(self._served, server, job))

    def _choose(self, job: Job) -> ServerT | None:
        """The prompt's earlier server if it has not much more to do than others, else the one with the fewest
        tokens."""
        ready = [
            server for server in self.usable() if server.version == self.version and len(server.jobs) < self._limit
        ]
        if not ready:
            return None
        least = min(ready, key=lambda server: server.outstanding)
        place = job.salt, job.request.prompt
        home = self._homes.get(place)
        if home is not None and home in ready and home.outstanding <= least.outstanding + KEEP_TOGETHER * job.cost:
            return home
        self._homes[place] = least
        return least

    def _served(self, server: ServerT, job: Job, task: asyncio.Task[Rollout | None]) -> None:
        """Called after one attempt: the job gets an answer or an error, or goes back into the queue."""
        server.jobs.discard(task)
        server.outstanding -= job.cost
        error = None if task.cancelled() else task.exception()
        rollout = None if task.cancelled() or error else task.result()
        versions = {self.version}
        if rollout is not None:
            versions = set(rollout.token_versions or [rollout.weight_version])
        if self._exact and versions != {self.version}:
            error = BadAnswer(f"weights of version {sorted(versions)}, wanted {self.version}")
        if self._closing or job.answer.done():
            return
        if isinstance(error, ServerError):
            self._note_failure(server, job, error)
        elif isinstance(error, UnacceptableRequest):
            job.answer.set_exception(RolloutError(str(error)))
        elif error is not None:
            job.answer.set_exception(error)
        elif rollout is not None:
            server.restarts = 0
            server.answered += 1
            job.answer.set_result(rollout)
            if job.on_rollout is not None:
                job.on_rollout(rollout)
        if not job.answer.done():  # it failed, or it was cancelled or aborted for a publish
            self._pending.appendleft(job)
            self._fail_if_none_left()
        self.pump()

    def _note_failure(self, server: ServerT, job: Job, error: ServerError) -> None:
        self.retried += 1
        job.attempts.append(f"{server.name}: {error}")
        if len(job.attempts) >= ATTEMPTS:
            job.answer.set_exception(
                RolloutError(
                    f"prompt {job.request.prompt}, sample {job.request.sample} failed {ATTEMPTS} times: "
                    + "; ".join(job.attempts)
                )
            )
        self.lost(server, str(error))


def _with_last_words(server: Server, why: str) -> str:
    """Why a server is lost, with the end of its log if it is ours: a request sees only that nobody answers."""
    if server.process is None:
        return why
    ended = server.process.ended() or f"its last words: {server.process.last_words()}"
    return f"{clause(why)}; {ended}" if why else ended
