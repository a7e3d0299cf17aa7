"""What a run says of rewards that fail: all causes with their counts, and where user code has printed."""

from __future__ import annotations

from types import SimpleNamespace

from megatron_srpo.algorithms.history import NoHistories
from megatron_srpo.batching.handover import Handover
from megatron_srpo.batching.source import DriverSource
from megatron_srpo.config import Config, RewardConfig
from megatron_srpo.core.output_log import rank_log
from megatron_srpo.core.records import Padding, Prompt, Reward, Rollout
from megatron_srpo.core.text import causes
from megatron_srpo.rewards import RewardPool, RewardTask
from tests.made_samples import make_groups


def test_causes_are_counted_and_the_most_frequent_three_are_named():
    assert causes([]) == ""
    assert causes(["time-out", "time-out"]) == "time-out"
    assert causes(["crash", "time-out", "time-out"]) == "time-out (2 times); crash (once)"
    assert causes("aabbbcde") == "b (3 times); a (2 times); c (once); and 2 other causes"
    assert len(causes(["x" * 10_000])) < 1000


def test_exceptions_that_differ_in_what_they_quote_are_one_cause():
    keys = [f"kind 'sums': exception: KeyError: {key!r} (judge.py, line 3)" for key in ("a", "b c", "a")]
    assert causes(keys) == "kind 'sums': exception: KeyError: '…' (judge.py, line 3)"
    assert (
        causes([keys[0], keys[2], "crash: 'x'", "crash: 'y'"])
        == f"{keys[0]} (2 times); crash: 'x' (once); crash: 'y' (once)"
    )


def test_the_warning_of_an_iteration_names_all_causes_and_the_first_response(tmp_path):
    errors = ["time-out", None, "crash", "time-out"]
    prompts = [Prompt(f"train:{i}", (), [1], "", "exact") for i in range(2)]
    rollouts = [Rollout(i, j, [i, j], [-1.0] * 2, "", "stop", 0) for i in range(2) for j in range(2)]
    groups = make_groups(prompts, rollouts, [Reward(0.0 if error else 1.0, error=error) for error in errors])
    config = Config(
        model={"path": "unused"}, data={"train": "unused"}, run={"output_dir": str(tmp_path)},
        algorithm={"name": "grpo"},
    )  # fmt: skip
    warned = []
    source = DriverSource(
        config, None, None, None, None, NoHistories(), SimpleNamespace(warn=warned.append), dp_size=1,
        padding=Padding(), engine_metrics=dict, handover=Handover(config, {}),
    )  # fmt: skip
    (tmp_path / "rewards").mkdir()
    source._route(groups, 6)
    assert warned == [
        "iteration 7: 3 of 4 rewards failed, and count as reward.failure_score: time-out (2 times); crash (once); the "
        f"first is that of train:0 sample 0; what user code printed is in {tmp_path}/rewards"
    ]


JUDGE = """
import os
def judge(response, answer, metadata):
    print("the judge has read", response)
    if response == "die":
        os._exit(5)
    return 1.0
"""


def test_what_a_reward_function_prints_is_in_a_log(tmp_path):
    (tmp_path / "judge.py").write_text(JUDGE)
    config = RewardConfig(functions={"own": f"{tmp_path}/judge.py:judge"}, workers=2)
    with RewardPool(config, ["own"], rank_log(str(tmp_path), "rewards", 1, [].append)) as pool:
        first, second = pool.score([RewardTask("own", text, "") for text in ("something", "die")])
    assert first.score == 1.0 and second.error == "crash: exit code 5: the judge has read die"
    text = (tmp_path / "rewards/rank1.log").read_text()
    assert text.startswith("---- process ") and "the judge has read something\n" in text
