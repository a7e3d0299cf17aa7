"""The part of `check` about environments: begins one episode of each kind, shows what the model would
read, and has the environment answer an empty turn."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

from megatron_srpo.config import Config
from megatron_srpo.core.environment import unset_variables
from megatron_srpo.core.records import Prompt
from megatron_srpo.data import Chat
from megatron_srpo.data.tokenizer import Tokenizer
from megatron_srpo.environments import Task
from megatron_srpo.environments.pool import EnvironmentPool, EpisodeError, Started


def first_readings(
    config: Config,
    tokenizer: Tokenizer,
    options: Mapping[str, object],
    prompts: Sequence[Prompt],
    say: Callable[[str], None],
) -> tuple[dict[str, list[int]], list[str]]:
    """By kind the tokens of an episode's first turn, for the first of its prompts; and a line for everything that
    cannot be. UserError if a class cannot be imported."""
    chat = Chat(tokenizer, options, config.environment.history)
    readings: dict[str, list[int]] = {}
    problems: list[str] = []

    for line in unset_variables("environment.variables", config.environment.variables):
        say(f"\nwarning: {line}")

    async def begin_all() -> None:
        pool = EnvironmentPool(config.environment, problems.append)
        try:
            await pool.begin()
            for prompt in {prompt.kind: prompt for prompt in reversed(prompts)}.values():
                if prompt.kind not in config.environment.classes:
                    continue
                try:
                    started = await _start(pool, prompt)
                    conversation = chat.begin(prompt, started.messages, started.tools)
                except EpisodeError as error:
                    problems.append(f'kind "{prompt.kind}": its environment does not work: {error}')
                    continue
                readings[prompt.kind] = conversation.context
                if not conversation.shows_tools:
                    say(
                        f'\nwarning: kind "{prompt.kind}": the chat template of this tokenizer does not show the tools '
                        "of the environment"
                    )
                limit = config.data.max_prompt_length
                if len(conversation.context) > limit:
                    problems.append(
                        f'kind "{prompt.kind}": the first messages and the tools have {len(conversation.context)} '
                        f"tokens, and data.max_prompt_length = {limit}; raise it"
                    )
        finally:
            pool.close()

    asyncio.run(begin_all())
    return readings, problems


async def _start(pool: EnvironmentPool, prompt: Prompt) -> Started:
    """What an episode begins with, if the environment can also answer an empty turn."""
    process = await pool.open()
    try:
        started = await process.start(
            prompt.kind, Task(prompt.messages, prompt.answer, dict(prompt.metadata), seed=0, sample=0)
        )
        await process.step("")
        return started
    finally:
        await process.close()
