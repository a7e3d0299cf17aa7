"""Episodes on a real engine: exact, repeatable, within their budgets, and safe from their environments."""

from __future__ import annotations

import asyncio
import os
import signal

import numpy as np
import psutil
import pytest
from transformers import AutoTokenizer

from megatron_srpo.core.errors import UserError
from megatron_srpo.core.records import Rollout
from megatron_srpo.environments.tools import Tools, read_hermes
from megatron_srpo.rollout import engine_tool_parser, turn_seed
from tests.tiny_engines import tiny_engine
from tests.tiny_episodes import (
    FAITHFUL,
    FORGETFUL,
    episode_engine,
    gaps_by_turn,
    make_config,
    make_model,
    make_prompts,
    talk,
)
from tests.unit.chat_tokenizer import chat_tokenizer

EXACT = 1e-5  # nats


@pytest.fixture(scope="module")
def faithful(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("faithful"))


@pytest.fixture(scope="module")
def engine(faithful):
    with tiny_engine(faithful, max_model_len=700, cpu_kv_cache_gib=0.2) as engine:
        yield engine


def run(engine, folder, prompts=None, *, samples=3, **changes):
    config = make_config(folder, **changes)
    with episode_engine(engine, config) as talking:
        return talk(talking, config, prompts or make_prompts(folder), samples)


def rendered(folder, messages, *, answered=False):
    """Tokens of the chat template's text, up to the model's turn unless it has `answered`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=not answered)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def facts(rollouts):
    """All of it, bit for bit."""
    return [
        (r.prompt, r.sample, r.token_ids, r.logprobs, r.trained.tolist(), r.contexts, r.episode, r.finish_reason)
        for r in rollouts
    ]


def test_every_turn_is_exact_and_the_environments_tokens_are_untrained(engine, faithful):
    prompts = make_prompts(faithful)
    rollouts = run(engine, faithful, prompts)
    assert len(rollouts) == 12 and [(r.prompt, r.sample) for r in rollouts] == sorted(
        (r.prompt, r.sample) for r in rollouts
    )
    whole = [r for r in rollouts if len(r.episode.turns) == 3]
    assert len(whole) >= 6, "most episodes come to their end"
    gaps = gaps_by_turn(faithful, prompts, rollouts)
    assert set(gaps) == {1, 2, 3} and max(gaps.values()) <= EXACT
    for rollout in whole:
        assert rollout.contexts == () and sum(rollout.episode.turns) == rollout.response_length
        assert not rollout.trained.all()
        said = "".join(message["content"] for message in rollout.episode.messages if message["role"] == "assistant")
        assert rollout.episode.reward.score == pytest.approx(np.mean([letter.isdigit() for letter in said]))


def test_the_tokens_are_those_of_the_rendered_conversation(engine, faithful):
    """Where the template keeps history, the sequence is the template's text of the whole conversation."""
    prompts = make_prompts(faithful)
    for rollout in run(engine, faithful, prompts):
        messages = [*prompts[rollout.prompt].messages, *rollout.episode.messages]
        ids = rendered(faithful, messages, answered=True)
        mine = [*prompts[rollout.prompt].token_ids, *rollout.token_ids]
        assert mine == ids[: len(mine)] and len(ids) - len(mine) <= 1  # a cut turn has no end


def test_the_same_batch_again_is_equal_bit_for_bit_whatever_the_environments_take(engine, faithful):
    once = facts(run(engine, faithful))
    other = facts(run(engine, faithful, settings={"arguments": {"talk": {"wait": 0.1}}, "processes": 4}))
    assert once == other


class Publishing:
    """An engine whose weights are published between two turns of an episode, and in the middle of the second."""

    def __init__(self, end):
        self._reply = [40, 41, end]

    def converse(self, requests, sampling, begin):
        feed, turn = begin(list(requests)), 0
        while (ready := feed.ready(wait=True)) is not None:
            for request in ready:
                versions = [[4, 4, 4], [4, 5, 6]][turn] if turn < 2 else None
                feed.answer(
                    Rollout(
                        request.prompt, request.sample, self._reply, [-1.0] * 3, "", "stop", min(versions or [6]),
                        token_versions=versions,
                    )
                )  # fmt: skip
                turn += 1


def test_an_episode_says_which_weights_sampled_each_token(faithful):
    prompts = make_prompts(faithful, 1)
    tokenizer = AutoTokenizer.from_pretrained(faithful)
    config = make_config(faithful)
    with episode_engine(Publishing(tokenizer.eos_token_id), config) as talking:
        (rollout,) = talk(talking, config, prompts, 1)
    assert rollout.weight_version == 4 and len(rollout.token_versions) == len(rollout.token_ids)
    sampled = [version for version, own in zip(rollout.token_versions, rollout.trained, strict=True) if own]
    assert sampled == [4, 4, 4, 4, 5, 6, 6, 6, 6]


def test_turns_have_seeds_of_their_own():
    assert turn_seed(5, 0) == 5
    assert len({turn_seed(seed, turn) for seed in (5, 6) for turn in range(4)}) == 8
    assert all(0 <= turn_seed(2**63 - 1, turn) < 2**63 for turn in range(3))


def test_a_template_that_rewrites_history_splits_the_episode_or_keeps_it(engine, tmp_path):
    folder = make_model(tmp_path, FORGETFUL)  # with the weights that the engine has
    prompts = make_prompts(folder)
    found = {way: run(engine, folder, prompts, settings={"history": way}) for way in ("split", "keep")}
    for way, rollouts in found.items():
        gaps = gaps_by_turn(folder, prompts, rollouts)
        assert set(gaps) == {1, 2, 3} and max(gaps.values()) <= EXACT, way
    assert all(r.contexts == () for r in found["keep"])
    for rollout in found["split"]:
        said = [message["content"] for message in rollout.episode.messages if message["role"] == "assistant"]
        assert len(rollout.sequences) == 1 + sum("z" in text for text in said[:-1])
        for context in rollout.contexts:
            assert list(context.token_ids) == rendered(folder, context.messages)
    assert any(rollout.contexts for rollout in found["split"])
    first = [[rollout.token_ids[: rollout.episode.turns[0]] for rollout in rollouts] for rollouts in found.values()]
    assert first[0] == first[1], "the first turns are the same"


@pytest.mark.slow
def test_keep_and_split_are_the_same_where_nothing_is_rewritten(engine, faithful):
    assert facts(run(engine, faithful)) == facts(run(engine, faithful, settings={"history": "keep"}))


def test_an_environment_with_tools_begins_a_sequence_of_its_own(engine, faithful):
    prompts = make_prompts(faithful)
    rollouts = run(engine, faithful, prompts, settings={"arguments": {"talk": {"tools": True}}})
    assert all(r.contexts[0].start == 0 and r.contexts[0].tools for r in rollouts)
    assert all(len(r.contexts[0].token_ids) == len(prompts[r.prompt].token_ids) + len("tcount") + 1 for r in rollouts)
    assert max(gaps_by_turn(faithful, prompts, rollouts).values()) <= EXACT


def test_a_chat_template_that_shows_no_tools_is_told_once(engine, tmp_path):
    deaf = make_model(tmp_path / "deaf", FAITHFUL.partition("{% endfor %}")[2])
    config = make_config(deaf, settings={"arguments": {"talk": {"tools": True}}})
    said = []
    with episode_engine(engine, config, said) as talking:
        talk(talking, config, make_prompts(deaf, 2), samples=2)
    assert len(said) == 1 and said[0].startswith("kind 'talk': the chat template of this tokenizer does not show the")


@pytest.mark.parametrize(
    ("settings", "rollout", "cut"),
    [
        ({"max_turns": 2}, {}, "turns"),
        ({"max_turn_tokens": 5}, {}, "tokens"),
        ({}, {"max_response_length": 40}, "tokens"),
    ],
)
def test_budgets_cut_an_episode_and_say_so(engine, faithful, settings, rollout, cut):
    rollouts = run(engine, faithful, settings=settings, rollout=rollout)
    found = [r for r in rollouts if r.episode.cut == cut]
    assert found and all(r.finish_reason == "length" for r in found)
    assert all((r.finish_reason == "length") == bool(r.episode.cut) for r in rollouts)
    assert all(len(r.episode.turns) <= settings.get("max_turns", 3) for r in rollouts)
    assert all(n <= settings.get("max_turn_tokens", 600) for r in rollouts for n in r.episode.turns)
    assert all(len(r.token_ids) <= rollout.get("max_response_length", 600) for r in rollouts)
    assert all(r.trained[-1] for r in rollouts), "nothing of the environment's follows the last turn"
    assert all(r.episode.reward.error is None for r in rollouts)


WAYS = {
    "crash": "crash: killed by SIGSEGV",
    "exit": "crash: exit code 7",
    "hang": "time-out after 15 s",
    "raise": "KeyError: 'no such thing'",
    "flood": "more than 1048576 bytes",
    "garbage": "must return a Step",
    "silence": "neither a message nor the end",
    "nan": "expected a finite number",
    "memory": "out of memory",
    "start": "cannot start",
}


def test_an_environment_that_fails_costs_its_own_episode(engine, faithful):
    prompts = [
        prompt for way in (*WAYS, "print", "fork") for prompt in [make_prompts(faithful, 1, way=way)[0]]
    ]  # fmt: skip
    config = make_config(faithful, "Bad", settings={"step_timeout_seconds": 15.0, "memory_mib": 4096})
    with episode_engine(engine, config) as talking:
        rollouts = talk(talking, config, prompts, samples=2)
        for rollout in rollouts:
            way = prompts[rollout.prompt].metadata["way"]
            error, turns = rollout.episode.reward.error, len(rollout.episode.turns)
            if rollout.sample == 1 and way in WAYS:
                if way == "start":
                    assert turns == 0
                if turns == 2 or way == "start":  # a turn that was cut before says nothing
                    assert WAYS[way] in error and rollout.episode.reward.score == 0.0, way
            else:
                assert error is None, way
        assert sum(r.episode.reward.error is not None for r in rollouts) >= 7
        again = talk(talking, config, make_prompts(faithful, 1, way=""), samples=2)
        assert all(r.episode.reward.error is None for r in again)
        program = psutil.Process(talking._runner.pool._process.pid)
        gone = psutil.wait_procs(program.children(recursive=True), timeout=20)[1]
        assert not gone, "no process of an episode is left"


@pytest.mark.slow
def test_a_lost_program_is_reported_and_started_again(engine, faithful):
    said = []
    config = make_config(faithful, settings={"arguments": {"talk": {"wait": 0.3}}})
    undisturbed = facts(run(engine, faithful))
    with episode_engine(engine, config, said) as talking:
        pool = talking._runner.pool
        first = pool._process.pid
        answered = engine._rollout

        def kill_once(*given):
            if pool._process is not None and pool._process.pid == first:
                os.kill(first, signal.SIGKILL)
            return answered(*given)

        engine._rollout = kill_once
        try:
            rollouts = talk(talking, config, make_prompts(faithful))
        finally:
            del engine._rollout
    assert said and "started again" in said[0]
    assert facts(rollouts) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("reply", ["plain", '<tool_call>{"name": "add", "arguments": {"a": 2}}</tool_call>'])
def test_vllms_parser_reads_calls_as_our_own(engine, faithful, reply):
    """The engine's fixture has imported vLLM."""
    parse = engine_tool_parser("hermes", str(faithful))
    assert parse(reply) == (read_hermes(reply).calls, "")
    assert parse("<tool_call>{broken")[0] == [] and "cannot be read" in parse("<tool_call>{broken")[1]
    with pytest.raises(UserError, match="no tool parser 'herms'"):
        engine_tool_parser("herms", str(faithful))
    with pytest.raises(
        UserError, match=r"tokenizer = 'nope': no such folder .* expected the model's Hugging Face folder"
    ):
        engine_tool_parser("hermes", "nope")


def test_vllms_parser_knows_the_types_of_the_tools(engine, tmp_path):
    """Qwen3-Coder's format writes every argument as it is, without a type. The engine's fixture has imported vLLM."""
    tokenizer = chat_tokenizer()
    tokenizer.add_tokens(["<tool_call>", "</tool_call>"])
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "texts.py").write_text(
        "def join(parts: list[int], by: str) -> str:\n    return by.join(map(str, parts))\n"
    )
    tools = Tools([f"{tmp_path}/texts.py:join"], "qwen3_coder", str(tmp_path))
    arguments = "".join(
        f"<parameter={name}>\n{value}\n</parameter>\n" for name, value in (("parts", [1, 2]), ("by", 0))
    )
    step = asyncio.run(tools.step(f"<tool_call>\n<function=join>\n{arguments}</function>\n</tool_call>"))
    assert [message["content"] for message in step.messages] == ["102"]


def test_environments_do_not_inherit_secrets(engine, faithful, tmp_path, monkeypatch):
    (tmp_path / "tell.py").write_text(
        "import os\nfrom megatron_srpo.environments import Environment, Step\n"
        "class Tell(Environment):\n"
        "    async def step(self, reply):\n"
        "        return Step(done=True, reward=float('WANDB_API_KEY' in os.environ), "
        "feedback=os.environ.get('NAMED', 'none'))\n"
    )
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    monkeypatch.setenv("NAMED", "given")
    for variables, feedback in (([], "none"), (["NAMED"], "given")):
        settings = {"classes": {"talk": f"{tmp_path}/tell.py:Tell"}, "variables": variables}
        rollouts = run(engine, faithful, make_prompts(faithful, 1), samples=2, settings=settings)
        assert {(r.episode.reward.score, r.episode.reward.feedback) for r in rollouts} == {(0.0, feedback)}
