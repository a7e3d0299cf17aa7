"""Runs the episodes of a batch. Each is a coroutine that asks the engine for its next turn and its environment for an
answer; no episode waits for another. They run in a thread of their own, while the engine generates in the caller's.

    engine's thread     ready() ◄─ requests ── ⎫            ⎧ start ─► turn ─► step ─► turn ─► step …
                        answer() ── tokens ──► ⎭  episodes  ⎩             each in its own process
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Collection, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import TypeVar

import numpy as np

from megatron_srpo.config import Config
from megatron_srpo.core.environment import unset_variables
from megatron_srpo.core.errors import UserError
from megatron_srpo.core.output_log import OutputLog
from megatron_srpo.core.records import Episode, Experts, Prompt, Reward, Rollout
from megatron_srpo.data import Chat, Conversation, DataError
from megatron_srpo.environments.base import Step, Task
from megatron_srpo.environments.pool import EnvironmentPool, EpisodeError, EpisodeProcess, ProgramLost
from megatron_srpo.environments.sandbox import weakness
from megatron_srpo.rollout import GenerateRequest, OnRollout, SamplingSettings, experts_of_turns, turn_seed

ATTEMPTS = 3  # of an episode whose program was lost, before that counts as its failure

T = TypeVar("T")


class EpisodeRunner:
    """The environments of one engine. `scored`: kinds that have a reward function. `say` takes a line for the user, and
    `log` what environments print."""

    def __init__(
        self, config: Config, chat: Chat, scored: Collection[str], say: Callable[[str], None],
        log: OutputLog | None = None,
    ) -> None:  # fmt: skip
        self.config, self.chat, self.scored = config, chat, scored
        self._say, self._told = say, set[str]()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="episodes", daemon=True)
        self._thread.start()
        self.pool = self._run(self._open(say, log))
        for line in [
            *unset_variables("environment.variables", config.environment.variables), *weakness(config.environment)
        ]:  # fmt: skip
            say(line)
        self._run(self.pool.begin())

    async def _open(self, say: Callable[[str], None], log: OutputLog | None) -> EnvironmentPool:
        return EnvironmentPool(self.config.environment, say, log)

    def _run(self, work: Coroutine[None, None, T]) -> T:
        return self.start(work).result()

    def start(self, work: Coroutine[None, None, T]) -> Future[T]:
        """Begin `work` in the episodes' thread."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def call(self, function: Callable[[], object]) -> None:
        """Call `function` in the episodes' thread."""
        self._loop.call_soon_threadsafe(function)

    def feed(
        self, requests: Sequence[GenerateRequest], sampling: SamplingSettings, on_rollout: OnRollout | None
    ) -> BatchFeed:
        """The feed of a batch of episodes; a request without a row is an episode of one turn."""
        return BatchFeed(self, requests, sampling, on_rollout)

    def tell_once(self, text: str) -> None:
        """A line for the user, unless it was told before."""
        if text not in self._told:
            self._told.add(text)
            self._say(text)

    def close(self) -> None:
        """End everything. It may be called again."""
        if self._loop.is_closed():
            return

        async def end() -> None:
            self.pool.close()
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        self._run(end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class BatchFeed:
    """A Feed (rollout/engine.py) of episodes. `rollouts` has those that are complete."""

    def __init__(
        self, runner: EpisodeRunner, requests: Sequence[GenerateRequest], sampling: SamplingSettings,
        on_rollout: OnRollout | None,
    ) -> None:  # fmt: skip
        self.rollouts: list[Rollout] = []
        self._runner, self._sampling, self._on_rollout = runner, sampling, on_rollout
        self._left = len(requests)
        self._events: queue.SimpleQueue[GenerateRequest | Rollout | BaseException | None] = queue.SimpleQueue()
        self._waiting: dict[tuple[int, int], asyncio.Future[Rollout]] = {}
        self._running = runner.start(self._run(requests))

    # ---- the engine's thread -----------------------------------------------------------------------------------------

    def ready(self, *, wait: bool) -> list[GenerateRequest] | None:
        """See Feed. Complete episodes are handed on from here."""
        found: list[GenerateRequest] = []
        while self._left and not (wait and found and self._events.empty()):
            try:
                event = self._events.get(block=wait and not found)
            except queue.Empty:
                break
            if event is None:  # stopped
                self._left = 0
            elif isinstance(event, BaseException):
                raise event
            elif isinstance(event, GenerateRequest):
                found.append(event)
            else:
                self._left -= 1
                self.rollouts.append(event)
                if self._on_rollout is not None:
                    self._on_rollout(event)
        return found if found or self._left else None

    def answer(self, rollout: Rollout) -> None:
        """See Feed."""

        def set_result() -> None:
            future = self._waiting.pop((rollout.prompt, rollout.sample), None)
            if future is not None and not future.done():
                future.set_result(rollout)

        self._runner.call(set_result)

    def stop(self) -> None:
        """See Feed."""
        self._events.put(None)

    def close(self) -> None:
        """End the episodes that are still running."""
        self._running.cancel()

    # ---- the episodes' thread ----------------------------------------------------------------------------------------

    async def _run(self, requests: Sequence[GenerateRequest]) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for request in requests:
                    group.create_task(self._episode(request))
        except BaseExceptionGroup as failed:
            self._events.put(failed.exceptions[0])

    async def _episode(self, request: GenerateRequest) -> None:
        if request.row is None:
            self._events.put(await self.turn(request))
            return
        for attempt in range(ATTEMPTS):
            try:
                self._events.put(await _OneEpisode(self, self._runner, request, request.row, self._sampling).run())
                return
            except ProgramLost:
                if attempt == ATTEMPTS - 1:
                    raise UserError(
                        f"the program of the environments was lost {ATTEMPTS} times in an episode; the last time: "
                        f"{self._runner.pool.last_loss}"
                    ) from None

    async def turn(self, request: GenerateRequest) -> Rollout:
        """The engine's response to a request."""
        future: asyncio.Future[Rollout] = asyncio.get_running_loop().create_future()
        self._waiting[request.prompt, request.sample] = future
        self._events.put(request)
        return await future


class _OneEpisode:
    """One episode from its start to its end."""

    def __init__(
        self, feed: BatchFeed, runner: EpisodeRunner, request: GenerateRequest, prompt: Prompt,
        sampling: SamplingSettings,
    ) -> None:  # fmt: skip
        self._feed, self._runner, self._request, self._prompt = feed, runner, request, prompt
        self._sampling, self._settings = sampling, runner.config.environment
        self._room = runner.config.rollout.max_response_length  # tokens behind the first prompt
        self._longest = runner.config.data.max_prompt_length + self._room  # tokens of a sequence
        self._step = Step()  # what the environment has said so far
        self._turn_feedback: list[str] = []
        self._calls = self._errors = 0
        self._drafted = self._accepted = 0
        self._experts: dict[int, list[Experts]] = {}  # of each sequence's turns, where the engine returns them
        self._versions: list[int] = []  # the publish behind each token; of the environment's: that of the next turn
        self._cut = self._trouble = ""

    async def run(self) -> Rollout:
        """The episode as a rollout. A failure of its environment is the error of its reward."""
        process: EpisodeProcess | None = None
        conversation: Conversation | None = None
        task = Task(
            self._prompt.messages, self._prompt.answer, dict(self._prompt.metadata), self._request.group_seed,
            self._request.sample,
        )  # fmt: skip
        try:
            process = await self._runner.pool.open()
            started = await process.start(self._prompt.kind, task)
            same = tuple(started.messages) == self._prompt.messages
            conversation = self._runner.chat.begin(self._prompt, None if same else started.messages, started.tools)
            if not conversation.shows_tools:
                self._runner.tell_once(
                    f"kind {self._prompt.kind!r}: the chat template of this tokenizer does not show the tools of the "
                    "environment, so the model knows them from the prompt at most. Use a model whose template knows "
                    "tools, or describe them in the rows"
                )
            limit = self._runner.config.data.max_prompt_length
            if len(conversation.context) > limit:
                raise EpisodeError(
                    f"its first messages and tools have {len(conversation.context)} tokens, more than "
                    f"data.max_prompt_length = {limit}"
                )
            while True:
                reply, stopped = await self._sample(conversation)
                await self._answer(process, reply)
                if self._step.done or not stopped or not self._goes_on(conversation):
                    break
        except (EpisodeError, DataError) as error:
            self._trouble = str(error)
        finally:
            if process is not None:
                await process.close()
        return self._rollout(conversation)

    async def _sample(self, conversation: Conversation) -> tuple[str, bool]:
        """The model's next turn: its text, and whether it ended by itself."""
        turn = len(conversation.turns)
        request = replace(
            self._request, token_ids=list(conversation.context), seed=turn_seed(self._request.seed, turn),
            max_tokens=self._turn_limit(conversation), row=None,
        )  # fmt: skip
        answer = await self._feed.turn(request)
        if (experts := answer.experts_of(0)) is not None:
            self._experts.setdefault(len(conversation.contexts), []).append(experts)
        self._drafted += answer.drafted
        self._accepted += answer.accepted
        self._versions += [answer.weight_version] * (len(conversation.token_ids) - len(self._versions))
        self._versions += answer.token_versions or [answer.weight_version] * len(answer.token_ids)
        stopped = answer.finish_reason == "stop"
        if not stopped:
            self._cut = "tokens"
        return conversation.add_reply(list(answer.token_ids), answer.logprobs, stopped=stopped), stopped

    def _turn_limit(self, conversation: Conversation) -> int:
        """Tokens that the next turn may have."""
        left = min(self._room - len(conversation.token_ids), self._longest - len(conversation.context))
        return min(left, self._settings.max_turn_tokens or left)

    async def _answer(self, process: EpisodeProcess, reply: str) -> None:
        """Let the environment answer. What it has said before about reward and feedback stays until it says more."""
        step = await process.step(reply)
        self._calls += step.tool_calls
        self._errors += step.tool_errors
        self._turn_feedback.append((step.feedback if step.turn_feedback is None else step.turn_feedback) or "")
        self._step = replace(
            step,
            reward=self._step.reward if step.reward is None else step.reward,
            feedback=self._step.feedback if step.feedback is None else step.feedback,
        )

    def _goes_on(self, conversation: Conversation) -> bool:
        """Give the environment's messages to the model, if the budgets allow another turn."""
        if len(conversation.turns) >= self._settings.max_turns:
            self._cut = "turns"
            return False
        room = self._room - len(conversation.token_ids) - 1  # one token for the turn
        if room < 0 or not conversation.add_messages(self._step.messages, room, self._longest - 1):
            self._cut = "tokens"
            return False
        return True

    def _rollout(self, conversation: Conversation | None) -> Rollout:
        if conversation is None:  # it did not even start
            conversation = self._runner.chat.begin(self._prompt)
        turns, contexts = conversation.turns, tuple(conversation.contexts) if conversation.turns else ()
        unanswered = [""] * (len(turns) - len(self._turn_feedback))  # the environment has failed
        versions = self._versions + self._versions[-1:] * (len(conversation.token_ids) - len(self._versions))
        return Rollout(
            self._request.prompt, self._request.sample, conversation.token_ids, conversation.logprobs,
            conversation.transcript, "length" if self._cut else "stop", min(versions, default=0),
            token_versions=versions if len(set(versions)) > 1 else None,
            trained=np.array(conversation.trained, dtype=bool), contexts=contexts,
            experts=tuple(map(experts_of_turns, self._experts.values())) or None,
            drafted=self._drafted, accepted=self._accepted,
            episode=Episode(
                tuple(turns), conversation.said, conversation.reply, self._reward(), self._step.feedback, self._calls,
                self._errors, self._cut, (*self._turn_feedback, *unanswered), tuple(conversation.answers),
                tuple(conversation.gaps),
            ),
        )  # fmt: skip

    def _reward(self) -> Reward | None:
        failure = self._runner.config.reward.failure_score
        if self._trouble:
            return Reward(failure, error=f"environment of kind {self._prompt.kind!r}: {self._trouble}")
        if self._step.reward is not None:
            return Reward(self._step.reward, self._step.feedback)
        if self._prompt.kind in self._runner.scored:
            return None
        if self._cut:
            return Reward(failure, self._step.feedback or "The conversation did not come to its end.")
        return Reward(
            failure,
            error=f"environment of kind {self._prompt.kind!r}: it gave no reward, and there is no reward function",
        )  # fmt: skip
