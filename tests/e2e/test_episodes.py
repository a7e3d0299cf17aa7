"""Whole runs whose rows are talked about with an environment: repeatable, resumable, on both placements."""

from __future__ import annotations

import json
import time

import pytest

from tests.e2e.test_resume import kill_everything
from tests.tiny_run import make_run, records, start, train

ENVIRONMENT = """
import asyncio
import random

from megatron_srpo.environments import Environment, Step


class Digits(Environment):
    turn = 0

    async def step(self, reply):
        await asyncio.sleep(0.02 * random.random())  # not seeded: what it takes must not matter
        self.turn += 1
        with open("FOLDER/steps", "a") as steps:
            steps.write(".")
        good = float(reply[:1].isdigit())
        more = [{"role": "user", "content": f"more {self.turn}"}]
        return Step(more, self.turn == 3, good, None if good else f"{reply[:1]!r} is no digit", tool_calls=1)
"""
EXTRA = """
[environment]
max_turn_tokens = 90
[environment.classes]
digit = "{folder}/digits.py:Digits"
"""


@pytest.fixture
def config(tmp_path):
    file = make_run(tmp_path)
    (tmp_path / "digits.py").write_text(ENVIRONMENT.replace("FOLDER", str(tmp_path)))
    text = file.read_text().replace("max_response_length = 4", "max_response_length = 200")
    text = text.replace("max_tokens_per_gpu = 128", "max_tokens_per_gpu = 700")
    text = text.replace("{question}{solution}", "{question}{solution}{feedback}")
    file.write_text(text.replace("[algorithm]", "[algorithm]\nuse_feedback = true") + EXTRA.format(folder=tmp_path))
    return file


def out(config, name):
    return config.parent / name


def check(lines):
    assert max(line["rollout_corr/logprob_diff_max"] for line in lines) <= 1e-5
    assert max(line["episode/turns_max"] for line in lines) == 3
    assert all(line["rollout_corr/logprob_diff_turn_2"] <= 1e-5 for line in lines if line["episode/turns_mean"] > 1.2)
    assert any(line["episode/sequences"] > 1 for line in lines), "the template has no end of turn: history is rewritten"


@pytest.mark.slow
@pytest.mark.parametrize("engine", [1, 2])
def test_a_run_with_episodes_repeats_and_resumes_bit_for_bit(config, engine):
    layout = ("--parallel.tensor_model_parallel_size=2", f"--rollout.tensor_parallel_size={engine}")
    found = []
    for name, stops in (("once", [4]), ("again", [4]), ("resumed", [2, 4])):
        for iterations in stops:
            output = (f"--run.output_dir={out(config, name)}", f"--run.iterations={iterations}")
            train(config, *output, *layout, "--checkpoint.every=2", ranks=2)
        found.append(records(out(config, name)))
    assert found[0] == found[1] == found[2]
    check(found[0])
    first = json.loads((out(config, "once") / "rollouts.jsonl").read_text().splitlines()[0])["groups"][0]
    assert len(first["episodes"]) == len(first["scores"]) == 4
    assert all(episode["messages"][0]["role"] == "assistant" for episode in first["episodes"])


@pytest.mark.slow
def test_a_run_that_is_killed_in_the_middle_of_a_batch_draws_it_again(config):
    options = ("--run.iterations=16", "--checkpoint.every=2")
    train(config, f"--run.output_dir={out(config, 'once')}", *options)
    process = start(config, f"--run.output_dir={out(config, 'killed')}", *options)
    for line in process.stdout:
        if line.split("/")[0].split() == ["iteration", "3"]:
            break
    steps = config.parent / "steps"
    before = steps.stat().st_size
    while steps.stat().st_size < before + 3:  # in the middle of a batch of 8 episodes
        assert process.poll() is None
        time.sleep(0.001)
    kill_everything(process)
    assert 3 <= len(records(out(config, "killed"))) < 16
    assert "going on from" in train(config, f"--run.output_dir={out(config, 'killed')}", *options)
    assert records(out(config, "killed")) == records(out(config, "once"))


@pytest.mark.slow
def test_servers_give_the_same_episodes_as_engines_in_the_ranks(config):
    train(config, f"--run.output_dir={out(config, 'colocated')}", "--run.iterations=1")
    train(config, f"--run.output_dir={out(config, 'servers')}", "--run.iterations=1", "--rollout.placement=servers")
    texts = [
        json.loads((out(config, name) / "rollouts.jsonl").read_text().splitlines()[0])["groups"]
        for name in ("colocated", "servers")
    ]
    assert texts[0] == texts[1]
    check(records(out(config, "servers")))


@pytest.mark.slow
@pytest.mark.parametrize("in_flight", ["finish", "pause"])
def test_servers_run_episodes_ahead_of_the_training(config, in_flight):
    lines = []
    for iterations in (2, 4):  # stopped with a batch under way, and resumed
        options = (f"--run.iterations={iterations}", "--eval.every=3", f"--data.test={config.parent}/data.jsonl")
        servers = ("--rollout.placement=servers", "--rollout.max_staleness=1", f"--rollout.in_flight={in_flight}")
        train(config, f"--run.output_dir={out(config, 'ahead')}", *options, *servers)
        lines = records(out(config, "ahead"))
    lines = [line for line in lines if "episode/turns_max" in line]
    assert len(lines) == 4 and [line["rollout/weight_version"] for line in lines] == [0, 0, 2, 2]
    assert [line["rollout/staleness_max"] for line in lines] == [0, 1, 0, 1], (
        "a resumed run draws its first batch again"
    )
    assert all(line["rollout/stale_samples"] == 0 for line in lines)
    assert max(line["episode/turns_max"] for line in lines) == 3
    assert max(lines[0]["rollout_corr/logprob_diff_max"], lines[2]["rollout_corr/logprob_diff_max"]) <= 1e-5
    assert max(line["rollout_corr/logprob_diff_max"] for line in lines) > 1e-5, "importance weights see the difference"


@pytest.mark.slow
@pytest.mark.parametrize("history", ["split", "keep"])
def test_feedback_stands_at_its_turn_on_both_placements(config, history):
    options = (
        "--run.iterations=2", "--teacher.feedback_at=turn", '--algorithm.teachers=["feedback"]',
        f"--environment.history={history}",
    )  # fmt: skip
    train(config, f"--run.output_dir={out(config, 'colocated')}", *options)
    train(config, f"--run.output_dir={out(config, 'servers')}", *options, "--rollout.placement=servers")
    texts = [
        json.loads((out(config, name) / "rollouts.jsonl").read_text().splitlines()[0])["groups"]
        for name in ("colocated", "servers")
    ]
    assert texts[0] == texts[1]
    lines = records(out(config, "colocated"))
    assert all(line["srpo/sdpo_fraction"] > 0.3 for line in lines)
    if history == "split":  # the first sequence of an episode has its first turn, as the template rewrites every turn
        return
    group = texts[0][0]
    read = [
        (prompt, [text for text in episode["turn_feedback"][1:] if text])
        for prompt, episode in zip(group["teacher_prompts"], group["episodes"], strict=True)
        if prompt is not None
    ]
    assert any(said for _, said in read), "some episode was told something behind its first turn"
    assert all(text in prompt for prompt, said in read for text in said)


@pytest.mark.slow
def test_an_evaluation_runs_episodes_too(config):
    folder = config.parent
    (folder / "test.jsonl").write_text((folder / "data.jsonl").read_text())
    train(
        config, "--run.iterations=1", f"--data.test={folder}/test.jsonl", "--eval.every=1", "--eval.max_prompts=4",
        "--eval.n_samples=2",
    )  # fmt: skip
    lines = records(folder / "out")
    assert [line["eval/prompts"] for line in lines] == [4, 4] and all("eval/accuracy" in line for line in lines)
