"""What is told about OpenEnv servers that are not there, or are something else."""

from __future__ import annotations

import asyncio
import json

import pytest
from aiohttp import WSMsgType, web

from examples.tiny.launch import free_port
from megatron_srpo.core.errors import UserError
from megatron_srpo.environments import Task
from megatron_srpo.environments.openenv import OpenEnv
from megatron_srpo.environments.registry import check_arguments

TASK = Task(({"role": "user", "content": "x"},), "", {}, 0, 0)
RESET = {"type": "observation", "data": {"observation": {"message": "hello"}, "reward": None, "done": False}}


async def played(path, answers, observation="message", turns=1):
    """The environment's answer to its last turn, with a server that gives `answers` at `path`."""

    async def talk(request):
        session = web.WebSocketResponse()
        await session.prepare(request)
        for answer in answers:
            if (await session.receive()).type is not WSMsgType.TEXT:
                break
            await session.send_str(answer if isinstance(answer, str) else json.dumps(answer))
        await session.close()
        return session

    app = web.Application()
    app.router.add_get(path, talk)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port := free_port()).start()
    environment = OpenEnv(url=f"http://127.0.0.1:{port}", action="message", observation=observation)
    try:
        await environment.start(TASK)
        return [await environment.step("go") for _ in range(turns)][-1]
    finally:
        await environment.close()
        await runner.cleanup()


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "localhost", "http://", "http://host:port", "ws://127.0.0.1:8000"])
def test_what_is_no_address_is_told_in_our_words(url):
    with pytest.raises(UserError) as caught:
        check_arguments(OpenEnv, {"url": url}, "openenv", "echo")
    assert f"environment.arguments.echo.url = {url!r}: expected an address as http://HOST:PORT" in str(caught.value)


def test_a_server_that_is_down_is_told_with_the_cure():
    async def begin():
        environment = OpenEnv(url=f"http://127.0.0.1:{free_port()}/")
        try:
            await environment.start(TASK)
        finally:
            await environment.close()

    with pytest.raises(UserError, match=r"expected an OpenEnv server at http://127.0.0.1:\d+, but it cannot be reached "
                       r"\(Connection refused\); start it, or correct url"):  # fmt: skip
        asyncio.run(begin())


def test_another_server_is_told_by_its_status():
    with pytest.raises(UserError, match=r"expected an OpenEnv server at .*/ws answers with status 404 .*; url must be"):
        asyncio.run(played("/elsewhere", []))


@pytest.mark.parametrize(
    ("answers", "told"),
    [
        (["hello"], "expected JSON from the OpenEnv server at .*, got 'hello'"),
        ([{"hello": 1}], "expected observation, reward and done from the OpenEnv server at .* after a reset, got "),
        ([{"type": "error", "data": {"message": "no such seed"}}], "refuses the reset: no such seed. Correct options"),
        ([RESET], r"the OpenEnv server at .* has ended the session \(CLOSE"),
        ([RESET, {**RESET, "data": {"observation": {}, "reward": "high"}}], "after a step, got .*high"),
    ],
)
def test_answers_that_are_not_openenvs_end_the_episode_and_are_not_told_to_the_model(answers, told):
    with pytest.raises(UserError, match=told):
        asyncio.run(played("/ws", answers))


def test_an_action_that_the_server_refuses_is_told_to_the_model():
    step = asyncio.run(played("/ws", [RESET, {"type": "error", "data": {"message": "no such move"}}]))
    assert (step.messages[0]["content"], step.tool_errors) == ("Error: no such move", 1)


def observed(observation, done=False, reward=1.0):
    return {**RESET, "data": {"observation": observation, "reward": reward, "done": done}}


@pytest.mark.parametrize(("rewards", "total"), [([1.0, None, 2.5, 0.0], 3.5), ([None, 0.0], 0.0), ([None], None)])
def test_the_reward_of_an_episode_is_the_sum_of_those_of_its_steps(rewards, total):
    answers = [observed({"message": "x"}, reward=reward) for reward in rewards]
    assert asyncio.run(played("/ws", [RESET, *answers], turns=len(rewards))).reward == total


@pytest.mark.parametrize(
    ("answers", "field", "told"),
    [
        ([RESET], "text", "'text' in the observation .* after a reset, got message. Correct observation"),
        ([RESET, observed({"b": 1, "message": None})], "message", "'message' in .* after a step, got b, message. Corr"),
        ([RESET, observed({})], "message", "'message' in the observation .* after a step, got no field. Correct"),
        ([RESET, observed("hello")], "message", "expected observation, reward and done .* after a step, got .*hello"),
        ([observed(None)], "", "expected observation, reward and done from the OpenEnv server at .* after a reset"),
        ([{**RESET, "data": {"reward": 1.0, "done": False}}], "", "expected observation, reward and done from"),
    ],
)
def test_an_observation_without_what_the_model_should_read_is_told_with_its_fields(answers, field, told):
    with pytest.raises(UserError, match=told):
        asyncio.run(played("/ws", answers, field))


@pytest.mark.parametrize("last", [{}, {"message": None}, None])
def test_the_last_observation_which_nobody_reads_may_be_empty(last):
    step = asyncio.run(played("/ws", [RESET, observed(last, done=True)]))
    assert (step.done, step.reward, step.messages[0]["content"]) == (True, 1.0, "")


def test_a_whole_observation_is_read_as_json():
    assert asyncio.run(played("/ws", [RESET, observed({"é": 1})], "")).messages[0]["content"] == '{"é": 1}'
