"""rollouts.jsonl says of every response what it earned, which branch it took and who taught it."""

import json

from megatron_srpo.algorithms.routing import route
from megatron_srpo.algorithms.section import algorithm
from megatron_srpo.config import Config
from megatron_srpo.core.records import Prompt, Reward, Rollout
from megatron_srpo.observe import Observer
from tests.made_samples import make_groups
from tests.unit.test_routing import Teacher


def routed(outcomes, **keys):
    """Routed groups; `outcomes` by prompt and sample, 1 right."""
    prompts = [
        Prompt(f"train:{i}", ({"role": "user", "content": f"question {i}"},), [1], "", "exact") for i in range(2)
    ]
    pairs = [(i, j, right) for i, group in enumerate(outcomes) for j, right in enumerate(group)]
    rollouts = [Rollout(i, j, [2] * (j + 1), [-1.0] * (j + 1), f"answer {i}.{j}", "stop", 0) for i, j, _ in pairs]
    rewards = [Reward(float(right)) for *_, right in pairs]
    groups = make_groups(prompts, rollouts, rewards)
    route(groups, algorithm(**keys), seed=1, iteration=0, teacher_prompt=Teacher())
    return groups


def test_every_response_is_in_it_and_the_first_prompts_with_their_texts(tmp_path):
    config = Config(
        model={"path": "unused"}, data={"train": "unused"}, run={"output_dir": str(tmp_path)},
        observe={"tensorboard": False, "progress": "off"},
    )  # fmt: skip
    observer = Observer(config)
    observer.record(1, routed([[1, 0, 0], [0, 0, 0]]))
    observer.record(2, routed([[1, 1, 0], [0, 1, 1]], name="sdpo"))
    observer.close()
    first, second = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert first == {
        "step": 1,
        "groups": [
            {
                "uid": "train:0", "scores": [1.0, 0.0, 0.0], "branches": ["grpo", "sdpo", "sdpo"],
                "teachers": [None, 0, 0], "lengths": [1, 2, 3], "prompt": "question 0",
                "responses": ["answer 0.0", "answer 0.1", "answer 0.2"],
            },
            {
                "uid": "train:1", "scores": [0.0] * 3, "branches": ["grpo"] * 3, "teachers": [None] * 3,
                "lengths": [1, 2, 3],
            },
        ],
    }  # fmt: skip
    assert second["groups"][0]["teachers"][:2] == [1, 0]
    assert second["groups"][1]["branches"] == ["sdpo"] * 3


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
