"""Real environments of other libraries. They need a virtual environment that has these:

python -m venv DIR && DIR/bin/pip install textarena==0.7.4 openenv==0.10.0
SRPO_ADAPTERS_PYTHON=DIR/bin/python pytest -m slow tests/unit/test_environments_adapters.py
"""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import time
import urllib.request

import pytest

from examples.tiny.launch import free_port
from megatron_srpo.config import EnvironmentConfig
from megatron_srpo.core.errors import UserError
from megatron_srpo.environments import Task
from megatron_srpo.environments.pool import EnvironmentPool, EpisodeError
from megatron_srpo.environments.verifiers import _response

PYTHON = os.environ.get("SRPO_ADAPTERS_PYTHON", "")
needs_libraries = [
    pytest.mark.slow, pytest.mark.skipif(not PYTHON, reason="SRPO_ADAPTERS_PYTHON names no Python that has them")
]  # fmt: skip

SERVER = """
import sys
import uvicorn
from openenv.core.env_server.http_server import create_fastapi_app
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.types import Action, Observation, State

class Say(Action):
    message: str

class Heard(Observation):
    message: str

class Count(Environment):
    SUPPORTS_CONCURRENT_SESSIONS = True
    def __init__(self):
        super().__init__()
        self.n = 0
    def reset(self, seed=None, episode_id=None, **kwargs):
        self.n = 0
        return Heard(message=f"count to 3 from {seed}", done=False, reward=None)
    def step(self, action, timeout_s=None, **kwargs):
        self.n += 1
        done = self.n == 3
        return Heard(message=f"{action.message}{self.n}", done=done, reward=float(done))
    @property
    def state(self):
        return State(step_count=self.n)

app = create_fastapi_app(Count, Say, Heard, max_concurrent_envs=8)
uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="error")
"""


def play(config, replies, kind="row", sessions=1, **metadata):
    """The first messages, and the steps, of each of several simultaneous episodes."""
    said = []

    async def one(pool):
        process = await pool.open()
        try:
            task = Task(({"role": "user", "content": "play"},), "", metadata, seed=5, sample=0)
            started = await process.start(kind, task)
            steps = []
            for reply in replies:
                steps.append(await process.step(reply))
                if steps[-1].done:
                    break
            return started, steps
        finally:
            await process.close()

    async def all_of_them():
        pool = EnvironmentPool(config, said.append)
        try:
            return await asyncio.gather(*(one(pool) for _ in range(sessions)))
        finally:
            pool.close()

    found = asyncio.run(all_of_them())
    assert said == []
    return found


@pytest.mark.parametrize("mark", [pytest.param(0, marks=needs_libraries)])
def test_a_game_of_textarena_is_played_to_its_end(mark):
    config = EnvironmentConfig(
        classes={"row": "textarena"}, arguments={"row": {"game": "GuessTheNumber-v0"}}, interpreter=PYTHON,
        step_timeout_seconds=120.0,
    )  # fmt: skip
    guesses = [f"[{number}]" for number in (10, 5, 15, 3, 7, 13, 17, 1, 20)]
    (started, steps), again = play(config, guesses, sessions=2)
    assert "between 1 and 20" in started.messages[0]["content"] and started.messages[0]["role"] == "user"
    assert re.search("lower|higher", steps[0].messages[0]["content"])
    assert "between 1 and 20" not in steps[0].messages[0]["content"], "what was said is not said again"
    assert (started, steps) == again, "the seed decides"


@pytest.mark.parametrize("mark", [pytest.param(0, marks=needs_libraries)])
def test_a_game_that_textarena_does_not_have_is_told_with_the_cure(mark):
    config = EnvironmentConfig(
        classes={"row": "textarena"}, arguments={"row": {"game": "NoSuchGame"}}, interpreter=PYTHON,
        step_timeout_seconds=120.0,
    )  # fmt: skip
    with pytest.raises(EpisodeError, match=r"^textarena cannot make the game 'NoSuchGame': .*Name one of its games in"):
        play(config, [])


@pytest.mark.parametrize("mark", [pytest.param(0, marks=needs_libraries)])
def test_a_session_of_a_real_openenv_server(mark, tmp_path):
    (tmp_path / "server.py").write_text(SERVER)
    port = free_port()
    with subprocess.Popen([PYTHON, tmp_path / "server.py", str(port)]) as server:
        try:
            for _ in range(600):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                    break
                except OSError:
                    time.sleep(0.2)
            arguments = {"url": f"http://127.0.0.1:{port}", "action": "message", "observation": "message"}
            config = EnvironmentConfig(classes={"row": "openenv"}, arguments={"row": arguments})
            for started, steps in play(config, ["a", "b", "c"], sessions=4):
                assert started.messages == [{"role": "user", "content": "play\ncount to 3 from 5"}]
                assert [step.messages[0]["content"] for step in steps] == ["a1", "b2", "c3"]
                assert [step.done for step in steps] == [False, False, True] and steps[-1].reward == 1.0
            config = EnvironmentConfig(
                classes={"row": "openenv"}, arguments={"row": {**arguments, "action": ""}}
            )  # fmt: skip
            ((_, steps),) = play(config, ["no JSON", '{"wrong": 1}', '{"message": "d"}'])
            assert [step.tool_errors for step in steps] == [1, 1, 0] and steps[-1].messages[0]["content"] == "d1"
        finally:
            server.terminate()


@pytest.mark.parametrize("mark", [pytest.param(0, marks=needs_libraries)])
def test_a_real_openenv_server_is_started_for_the_episodes(mark, tmp_path):
    (tmp_path / "server.py").write_text(SERVER)
    command = [PYTHON, str(tmp_path / "server.py"), "{port}"]
    arguments = {"command": command, "action": "message", "observation": "message"}
    config = EnvironmentConfig(classes={"row": "openenv"}, arguments={"row": arguments})
    for _, steps in play(config, ["a", "b", "c"], sessions=4):
        assert [step.messages[0]["content"] for step in steps] == ["a1", "b2", "c3"] and steps[-1].reward == 1.0


@pytest.mark.parametrize(
    ("reply", "thought", "said"),
    [
        ("<think>3 + 3</think>\n\nIt is 6.", "3 + 3", "It is 6."),
        ("opened by the template</think>6", "opened by the template", "6"),
        ("<think>cut at its", "cut at its", ""),
        ("It is 6.", None, "It is 6."),
    ],
)
def test_verifiers_gets_the_thinking_of_a_reply_apart(reply, thought, said):
    message = _response(reply, [])["choices"][0]["message"]
    assert (message.get("reasoning_content"), message["content"]) == (thought, said)


def test_without_the_library_the_cure_is_told():
    config = EnvironmentConfig(classes={"row": "textarena"}, arguments={"row": {"game": "x"}})
    try:
        import textarena  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match=r"environment\.interpreter"):
            play(config, [])
