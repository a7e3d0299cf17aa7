"""rollouts.jsonl says of every response what it earned, which branch it took and who taught it."""

import datetime
import json
from dataclasses import replace

import pytest

from megatron_srpo.algorithms.routing import route
from megatron_srpo.algorithms.section import algorithm
from megatron_srpo.config import Config
from megatron_srpo.core.records import Prompt, Reward, Rollout
from megatron_srpo.observe import Observer
from megatron_srpo.observe.rollouts import groups_record
from tests.made_samples import make_groups
from tests.unit.test_routing import Teacher

LONG = "wrong " * 50


def routed(outcomes, teacher=None, finish="stop", **keys):
    """Routed groups; `outcomes` by prompt and sample, 1 right."""
    prompts = [
        Prompt(f"train:{i}", ({"role": "user", "content": f"question {i}"},), [1], "7", "exact") for i in range(2)
    ]
    pairs = [(i, j, right) for i, group in enumerate(outcomes) for j, right in enumerate(group)]
    rollouts = [Rollout(i, j, [2] * (j + 1), [-1.0] * (j + 1), f"answer {i}.{j}", finish, 0) for i, j, _ in pairs]
    wrong = Reward(0.0, feedback=LONG, error="time-out", prediction="8")
    rewards = [Reward(1.0) if right else wrong for *_, right in pairs]
    groups = make_groups(prompts, rollouts, rewards)
    route(groups, algorithm(**keys), seed=1, iteration=0, teacher_prompt=teacher or Teacher())
    return groups


def test_every_response_is_in_it_and_the_first_prompts_with_their_texts(tmp_path):
    config = Config(
        model={"path": "unused"}, data={"train": "unused"}, run={"output_dir": str(tmp_path)},
        observe={"tensorboard": False, "progress": "off"},
    )  # fmt: skip
    observer = Observer(config, decode=lambda ids: f"{len(ids)} tokens")
    observer.record(1, routed([[1, 0, 0], [0, 0, 0]]))
    observer.record(2, routed([[1, 1, 0], [0, 1, 1]], name="sdpo"))
    observer.close()
    first, second = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert first == {
        "step": 1,
        "groups": [
            {
                "uid": "train:0", "kind": "exact", "answer": "7", "scores": [1.0, 0.0, 0.0],
                "correct": [True, False, False], "predictions": [None, "8", "8"], "feedback": [None, LONG, LONG],
                "errors": [None, "time-out", "time-out"], "lengths": [1, 2, 3], "finish_reasons": ["stop"] * 3,
                "advantages": pytest.approx([2 / 3, -1 / 3, -1 / 3]), "branches": ["grpo", "sdpo", "sdpo"],
                "why": ["correct, nothing to show a teacher", *["wrong, taught by sibling"] * 2],
                "teachers": [None, 0, 0], "versions": [[0]] * 3, "prompt": "question 0",
                "responses": ["answer 0.0", "answer 0.1", "answer 0.2"],
                "teacher_prompts": [None, "3 tokens", "3 tokens"],
            },
            {
                "uid": "train:1", "kind": "exact", "answer": "7", "scores": [0.0] * 3, "correct": [False] * 3,
                "predictions": ["8"] * 3, "feedback": [LONG[:200]] * 3, "errors": ["time-out"] * 3,
                "lengths": [1, 2, 3], "finish_reasons": ["stop"] * 3, "advantages": [0.0] * 3,
                "branches": ["grpo"] * 3, "why": ["wrong, nothing to show a teacher"] * 3, "teachers": [None] * 3,
                "versions": [[0]] * 3,
            },
        ],
    }  # fmt: skip
    assert second["groups"][0]["teachers"][:2] == [1, 0]
    assert second["groups"][1]["branches"] == ["sdpo"] * 3


def test_an_answer_that_json_cannot_hold_is_written_as_text():
    (group, _) = routed([[1, 0], [0, 0]])
    group.prompt = replace(group.prompt, answer={"day": datetime.date(2026, 3, 1)})
    assert groups_record([group], 0, str)[0]["answer"] == {"day": "2026-03-01"}


def test_why_an_attempt_has_its_branch_names_what_taught_it_or_what_was_missing():
    def why(outcomes, teacher=None, **keys):
        return [attempt.why for attempt in routed([*outcomes, [1, 1]], teacher, **keys)[0].attempts]

    assert why([[1, 0]], Teacher(fits=False))[1] == "wrong, no teacher prompt fits"
    assert why([[1, 0]], Teacher(truncated=True))[1] == "wrong, taught by sibling, cut to fit"
    assert why([[0, 0]], use_feedback=True) == ["wrong, taught by feedback"] * 2
    assert why([[1, 0]], name="grpo") == ["correct", "wrong"]
    assert why([[0, 0]], name="sdpo") == ["wrong, nothing to show a teacher"] * 2
    assert why([[1, 0]], finish="length", mask_truncated=True)[1] == (
        "wrong, left out: cut at rollout.max_response_length"
    )


def test_a_resumed_run_drops_what_was_recorded_after_its_checkpoint(tmp_path):
    config = Config(
        model={"path": "unused"}, data={"train": "unused"}, run={"output_dir": str(tmp_path)},
        observe={"tensorboard": False, "progress": "off", "rollout_texts": 0},
    )  # fmt: skip
    for start in (0, 1):
        observer = Observer(config, start_step=start)
        for step in range(start + 1, 4):
            observer.record(step, routed([[1, 0], [0, 0]]))
        observer.close()
    steps = [json.loads(line)["step"] for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]
