"""The part of `check` about environments: begins one episode of each kind, shows what the model would
read, and has the environment answer an empty turn."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_srpo.config import Config
from megatron_srpo.core.environment import unset_variables
from megatron_srpo.core.records import Prompt, TurnFeedback
from megatron_srpo.core.text import visible
from megatron_srpo.data import Chat, DataError, TeacherPromptBuilder
from megatron_srpo.data.conversation import Conversation
from megatron_srpo.data.tokenizer import Tokenizer
from megatron_srpo.environments import Task
from megatron_srpo.environments.base import Message
from megatron_srpo.environments.pool import EnvironmentPool, EpisodeError, Started
from megatron_srpo.environments.sandbox import weakness

SHOWN = 2000  # characters of what environments print
MADE_UP_TURN, MADE_UP_FEEDBACK = "(a made-up turn)", "(made-up feedback on turn {})"
MADE_UP_RESULT = {"role": "tool", "content": "(a made-up result)"}  # where the environment has not answered the turn


@dataclass(frozen=True)
class Reading:
    """What is read of one kind of episodes, as tokens."""

    first: Sequence[int]  # by the policy, before its first turn
    teacher: Sequence[int] = ()  # by its teacher before turn 2, with feedback on both turns (teacher.feedback_at)


def first_readings(
    config: Config,
    tokenizer: Tokenizer,
    options: Mapping[str, object],
    prompts: Sequence[Prompt],
    teacher: TeacherPromptBuilder,
    say: Callable[[str], None],
) -> tuple[dict[str, Reading], list[str]]:
    """By kind what is read of an episode of the first of its prompts; and a line for everything that cannot be.
    UserError if a class cannot be imported."""
    at_turns = config.teacher.feedback_at == "turn"
    chat = Chat(tokenizer, options, config.environment.history, gaps=at_turns)
    readings: dict[str, Reading] = {}
    problems: list[str] = []

    for line in [
        *unset_variables("environment.variables", config.environment.variables), *weakness(config.environment)
    ]:  # fmt: skip
        say(f"\nwarning: {line}")

    async def begin_all() -> None:
        pool = EnvironmentPool(config.environment, problems.append)
        try:
            await pool.begin()
            for prompt in {prompt.kind: prompt for prompt in reversed(prompts)}.values():
                if prompt.kind not in config.environment.classes:
                    continue
                try:
                    started, answer = await _start(pool, prompt)
                    conversation = chat.begin(prompt, started.messages, started.tools)
                    reading = Reading(tuple(conversation.context))
                    _answer(conversation, answer, tokenizer)
                except (EpisodeError, DataError) as error:
                    problems.append(f'kind "{prompt.kind}": its environment does not work: {error}')
                    continue
                if at_turns and answer:
                    reading = replace(reading, teacher=_with_feedback(conversation, prompt, teacher))
                readings[prompt.kind] = reading
                if started.tools and not answer:
                    try:
                        _answer(conversation, [MADE_UP_RESULT], tokenizer)
                    except DataError as error:
                        say(f'\nwarning: kind "{prompt.kind}": the model cannot be shown what a tool returns: {error}')
                if not conversation.shows_tools:
                    say(
                        f'\nwarning: kind "{prompt.kind}": the chat template of this tokenizer does not show the tools '
                        "of the environment"
                    )
                first, limit = len(reading.first), config.data.max_prompt_length
                if first > limit:
                    problems.append(
                        f'kind "{prompt.kind}": the first messages and the tools have {first} '
                        f"tokens, and data.max_prompt_length = {limit}; raise it"
                    )
        finally:
            pool.close()
            if printed := pool.log.tail.decode(errors="replace").strip():
                say(f"\nthe last of what the environments have printed, and tracebacks:\n{visible(printed[-SHOWN:])}")

    asyncio.run(begin_all())
    return readings, problems


def _answer(conversation: Conversation, messages: Sequence[Message], tokenizer: Tokenizer) -> None:
    """Let the model make a turn, and the environment answer it. DataError if the chat template cannot show that."""
    if messages:
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        turn = [*tokenizer.encode(MADE_UP_TURN, add_special_tokens=False), *end]
        conversation.add_reply(turn, [0.0] * len(turn), stopped=bool(end))
        conversation.add_messages(messages, room=sys.maxsize, longest=sys.maxsize)


def _with_feedback(conversation: Conversation, prompt: Prompt, teacher: TeacherPromptBuilder) -> Sequence[int]:
    """What a teacher reads before the second turn, with feedback on both turns; nothing if it cannot be shown."""
    if conversation.contexts:  # of the sequence in which that turn is
        context = conversation.contexts[-1]
        prompt = replace(
            prompt, messages=context.messages, tools=context.tools, question=context.question,
            token_ids=list(context.token_ids),
        )  # fmt: skip
    first, second = (MADE_UP_FEEDBACK.format(turn) for turn in (1, 2))
    if conversation.gaps:
        (gap,) = conversation.gaps
        shown = teacher(prompt, None, first, TurnFeedback(gaps=((gap, second),)))
        return () if shown is None else [*shown.ids, *conversation.token_ids[: gap.begin], *shown.filled[0]]
    shown = teacher(prompt, None, first, TurnFeedback({len(conversation.messages) - 1: second}))
    return () if shown is None else shown.ids


async def _start(pool: EnvironmentPool, prompt: Prompt) -> tuple[Started, list[Message]]:
    """What an episode begins with, and what the environment answers to an empty turn."""
    process = await pool.open()
    try:
        started = await process.start(
            prompt.kind, Task(prompt.messages, prompt.answer, dict(prompt.metadata), seed=0, sample=0)
        )
        step = await process.step("")
        return started, [] if step.done else list(step.messages)
    finally:
        await process.close()
