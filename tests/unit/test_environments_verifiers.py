"""Real v1 environments of verifiers, in a virtual environment of their own. Without it these tests are skipped:

python -m venv DIR && DIR/bin/pip install -r requirements/verifiers.txt
SRPO_VERIFIERS_PYTHON=DIR/bin/python pytest -m slow tests/unit/test_environments_verifiers.py
"""

from __future__ import annotations

import os

import pytest

from megatron_srpo.config import EnvironmentConfig
from megatron_srpo.core.errors import UserError
from megatron_srpo.environments.pool import EpisodeError
from tests.tiny_engines import tiny_engine
from tests.tiny_episodes import episode_engine, gaps_by_turn, make_config, make_model, make_prompts, talk
from tests.unit.test_environments_adapters import play

PYTHON = os.environ.get("SRPO_VERIFIERS_PYTHON", "")
needs_verifiers = [
    pytest.mark.slow, pytest.mark.skipif(not PYTHON, reason="SRPO_VERIFIERS_PYTHON names no Python that has verifiers")
]  # fmt: skip
SECONDS = 300.0  # a busy machine takes long to start a server of tools

SUMS = """
import verifiers.v1 as vf


class Data(vf.TaskData):
    answer: int


class Sum(vf.Task[Data, vf.State, vf.TaskConfig]):
    @vf.reward(weight=2.0)
    async def right(self, trace: vf.Trace) -> float:
        return float(str(self.data.answer) in trace.assistant_messages[-1].content)

    @vf.reward
    async def thinks(self, trace: vf.Trace) -> float:
        return float(bool(trace.assistant_messages[-1].reasoning_content))


class Sums(vf.Taskset[Sum, vf.TasksetConfig]):
    def load(self):
        return [
            Sum(Data(prompt=f"What is {i} + {i}?", system_prompt="Be brief.", answer=2 * i), self.config.task)
            for i in range(4)
        ]


__all__ = ["Sums"]
"""
GUESSES = '''
import random

import verifiers.v1 as vf


class Data(vf.TaskData):
    number: int


class Guess(vf.Task[Data, vf.State, vf.TaskConfig]):
    pass


class GuessConfig(vf.EnvConfig):
    player: vf.AgentConfig = vf.AgentConfig()
    tries: int = 3


class GuessEnv(vf.Env[GuessConfig]):
    """The environment plays the user, and judges at the end."""

    async def run(self, task, agents):
        said = []
        async with agents.player.interaction(task) as interaction:
            segment = await interaction.turn()
            while not segment.terminated:
                said.append(segment.last_reply)
                if said[-1] == "crash":
                    raise KeyError("no such guess")
                if said[-1] == str(task.data.number) or len(said) == self.config.tries:
                    break
                hint = "more" if said[-1].isdigit() and int(said[-1]) < task.data.number else "less"
                segment = await interaction.turn(f"{hint}{random.randrange(10)}")
        interaction.trace.record_reward("found", float(said[-1] == str(task.data.number)), 1.0)
        interaction.trace.info["said"] = f"{len(said)} tries"


class Guesses(vf.Taskset[Guess, vf.TasksetConfig]):
    INFINITE = True

    def load(self):
        number = 0
        while True:
            yield Guess(Data(prompt="Guess.", number=number), self.config.task)
            number += 10


__all__ = ["GuessEnv", "Guesses"]
'''
TOOLS = '''
import verifiers.v1 as vf


class Adder(vf.Toolset[vf.ToolsetConfig, vf.State]):
    @vf.tool
    async def add(self, a: int, b: int) -> int:
        """The sum of two numbers."""
        return a + b


class Data(vf.TaskData):
    answer: int


class AddConfig(vf.TaskConfig):
    tools: vf.ToolsetConfig = vf.ToolsetConfig()


class Add(vf.Task[Data, vf.State, AddConfig]):
    @classmethod
    def toolsets(cls, config):
        return [Adder(config.tools)]

    @vf.reward
    async def right(self, trace: vf.Trace) -> float:
        used = any(message.tool_calls for message in trace.assistant_messages)
        return float(used and trace.assistant_messages[-1].content == str(self.data.answer))


class AddsConfig(vf.TasksetConfig):
    task: AddConfig = AddConfig()


class Adds(vf.Taskset[Add, AddsConfig]):
    def load(self):
        return [Add(Data(prompt="What is 17 + 25?", answer=42), self.config.task)]


__all__ = ["Adds"]

if __name__ == "__main__":
    Adder.run()
'''

# A harness of its own that asks for streams, as the library's programs do.
STREAMS = """
import openai
import verifiers.v1 as vf
from verifiers.v1.harnesses.utils.core import chat


class Streams(vf.Harness[vf.HarnessConfig]):
    EXECUTES_CODE = NEEDS_CONTAINER = False

    async def launch(self, ctx, trace, runtime, endpoint, secret, mcp_urls, data):
        client = openai.AsyncOpenAI(base_url=endpoint, api_key=secret)
        messages = [{"role": "user", "content": data.prompt}]
        function = {"name": "look", "description": "", "parameters": {"type": "object", "properties": {}}}
        for answer in ("Look first.", "It is 6.", ""):
            found = await chat(client, ctx.model, messages, [{"type": "function", "function": function}])
            reply = found.choices[0].message.model_dump(exclude_none=True)
            messages.append(reply)
            for call in reply.get("tool_calls", []):
                answer = f"called {call['function']['name']} with {call['function']['arguments']}"
                messages.append({"role": "tool", "tool_call_id": call["id"], "content": answer})
            if not reply.get("tool_calls"):
                messages.append({"role": "user", "content": answer})
        return vf.ProgramResult(exit_code=0, stdout="", stderr="")


__all__ = ["Streams"]
"""


@pytest.fixture
def tasksets(tmp_path, monkeypatch):
    for name, text in {"sums": SUMS, "guesses": GUESSES, "adds": TOOLS, "streams": STREAMS}.items():
        (tmp_path / f"srpo_test_{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)


def config(name, **arguments):
    return EnvironmentConfig(
        classes={"row": "verifiers"}, arguments={"row": {"taskset": f"srpo_test_{name}", **arguments}},
        interpreter=PYTHON, step_timeout_seconds=SECONDS,
    )  # fmt: skip


@pytest.mark.parametrize("mark", [pytest.param(0, marks=needs_verifiers)])
def test_a_single_turn_environment_scores_the_reply(mark, tasksets):
    ((started, (step,)),) = play(config("sums"), ["<think>3 + 3</think>\n\nIt is 6."], task=3)
    assert started.messages == [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 3 + 3?"}
    ]  # fmt: skip
    assert step.done and step.reward == 3.0 and step.feedback is None
    ((_, (step,)),) = play(config("sums"), ["No idea."], task=3)
    assert step.done and step.reward == 0.0
    with pytest.raises(EpisodeError, match=r'has no task 4 .*"task"'):
        play(config("sums"), ["?"], task=4)
    with pytest.raises(EpisodeError, match='field "task": expected the number of a task, from 0, got None'):
        play(config("sums"), ["?"])


@pytest.mark.parametrize("mark", [pytest.param(0, marks=needs_verifiers)])
def test_a_multi_turn_environment_is_stepped_by_the_replies(mark, tasksets):
    one, other = play(config("guesses", feedback="said"), ["10", "30", "20"], sessions=2, task=2)
    started, steps = one
    assert started.messages == [{"role": "user", "content": "Guess."}] and started.tools == []
    assert [step.messages[0]["content"][:4] for step in steps[:2]] == ["more", "less"]
    assert [step.done for step in steps] == [False, False, True]
    assert steps[-1].reward == 1.0 and steps[-1].feedback == "3 tries"
    assert one == other, "the seed decides"
    ((_, steps),) = play(config("guesses", config={"tries": 1}), ["10"], task=2)
    assert steps[-1].done and steps[-1].reward == 0.0
    ((_, steps),) = play(config("guesses", config={"player": {"max_turns": 1}}), ["10"], task=2)
    assert steps[-1].done and steps[-1].reward == 0.0, "what the library limits ends the episode"
    with pytest.raises(EpisodeError, match="no such guess"):
        play(config("guesses"), ["10", "crash"], task=2)


@pytest.mark.parametrize("mark", [pytest.param(0, marks=needs_verifiers)])
def test_its_tools_are_called(mark, tasksets):
    call = '<tool_call>{"name": "%s", "arguments": {"a": 17, "b": 25}}</tool_call>'
    ((started, steps),) = play(config("adds"), [call % "adder_add", call % "adder", "42"], task=0)
    assert [tool["function"]["name"] for tool in started.tools] == ["adder_add"]
    assert steps[0].messages == [{"role": "tool", "content": "42"}] and steps[0].tool_calls == 1
    assert "there is no tool 'adder'" in steps[1].messages[0]["content"]
    assert steps[2].done and steps[2].reward == 1.0


@pytest.mark.parametrize("mark", [pytest.param(0, marks=needs_verifiers)])
def test_a_harness_that_asks_for_streams_gets_the_reply_whole(mark, tasksets):
    arguments = {"agent": {"harness": {"id": "srpo_test_streams"}}}
    call = '<think>hm</think>I look.<tool_call>{"name": "look", "arguments": {"at": 1}}</tool_call>'
    ((_, steps),) = play(config("sums", config=arguments), ["Well.", call, "It is 6."], task=3)
    assert steps[0].messages == [{"role": "user", "content": "Look first."}]
    assert steps[1].messages == [{"role": "tool", "content": 'called look with {"at": 1}'}] and steps[1].tool_calls == 1
    assert steps[2].done and steps[2].reward == 2.0


@pytest.mark.parametrize("mark", [pytest.param(0, marks=needs_verifiers)])
def test_what_cannot_be_loaded_is_refused_at_the_start(mark, tasksets):
    with pytest.raises(UserError, match=r"taskset 'srpo_test_none': ModuleNotFoundError"):
        play(config("none"), [])
    with pytest.raises(UserError, match=r"config of taskset 'srpo_test_guesses': attempts: Extra inputs"):
        play(config("guesses", config={"attempts": 1}), [])


@pytest.mark.parametrize("mark", [pytest.param(0, marks=needs_verifiers)])
def test_episodes_of_a_real_engine_are_exact(mark, tasksets, tmp_path):
    folder = make_model(tmp_path / "model")
    settings = {
        "classes": {"talk": "verifiers"}, "interpreter": PYTHON, "step_timeout_seconds": SECONDS, "max_turn_tokens": 60,
        "arguments": {"talk": {"taskset": "srpo_test_guesses", "feedback": "said"}},
    }  # fmt: skip
    prompts = make_prompts(folder, 3, task=1)
    with tiny_engine(folder, max_model_len=700, cpu_kv_cache_gib=0.2) as engine:
        run_config = make_config(folder, settings=settings)
        found = []
        for _ in range(2):
            with episode_engine(engine, run_config) as talking:
                found.append(talk(talking, run_config, prompts, samples=2))
    assert found[0] == found[1], "bit for bit"
    whole = [rollout for rollout in found[0] if not rollout.episode.cut]
    assert whole and max(len(rollout.episode.turns) for rollout in whole) > 1
    assert all(rollout.episode.reward.feedback == f"{len(rollout.episode.turns)} tries" for rollout in whole)
    assert max(gaps_by_turn(folder, prompts, found[0]).values()) <= 1e-5


def test_without_the_library_the_cure_is_told():
    with pytest.raises(UserError, match=r"requirements/verifiers\.txt\) and name its Python: environment\.interpreter"):
        play(EnvironmentConfig(classes={"row": "verifiers"}, arguments={"row": {"taskset": "any"}}), [])
