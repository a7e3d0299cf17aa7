"""Rewards are scored on the rank that has the response, and the driver gets all of them in order."""

import pytest

from megatron_srpo.config import RewardConfig
from megatron_srpo.core.errors import UserError
from megatron_srpo.core.records import Prompt, Reward, Rollout
from tests.distributed_harness import run_distributed
from tests.unit.chat_tokenizer import chat_tokenizer

JUDGE = """
import os

def judge(response, answer, metadata):
    return (float(response == answer), f"{metadata['k']} by {os.getppid()}")
"""
PROMPTS = [Prompt(f"train:{i}", (), [1], str(i), "own", {"k": i}) for i in range(3)]


def _rollouts():
    return [Rollout(prompt, sample, [1], [0.0], str(sample), "stop", 0) for prompt in range(3) for sample in range(4)]


def _score(judge, broken):
    """Rank r's engine hands over the samples with sample % 3 == r: no rank has the third, fourth is rank 0's too."""
    import os

    from megatron_srpo.config import ParallelConfig
    from megatron_srpo.mcore import groups
    from megatron_srpo.mcore.control import Control
    from megatron_srpo.mcore.device import choose_device
    from megatron_srpo.rewards import RewardPool
    from megatron_srpo.run.scorer import PoolScorer

    topology = groups.initialize(ParallelConfig(), choose_device("cpu", 0), seed=1, timeout_minutes=2)
    control = Control(topology)
    rank = topology.rank

    def build():
        path = judge if rank == 0 or broken != "import" else "no_such_module:judge"
        return RewardPool(RewardConfig(functions={"own": path}, workers=1), ["own"])

    try:
        pool = control.everywhere(build)
    except UserError as error:
        return str(error)
    with pool:
        scorer = PoolScorer(pool, control, threshold=0.5, leads=rank == 0)
        found = []
        for _ in range(2):  # a batch leaves nothing to the next one
            hand_over = scorer.start(PROMPTS)
            for rollout in _rollouts():
                if rollout.sample % 3 == rank:
                    hand_over(rollout)
                    hand_over(rollout)  # a second time: an engine that tried again
            if broken == "scoring" and rank == 1:
                pool.close()
                hand_over(_rollouts()[0])
            try:
                found.append(scorer.finish(_rollouts()[::-1] if rank == 0 else []))
            except RuntimeError as error:
                return str(error)
        return os.getpid(), found


@pytest.fixture
def judge(tmp_path):
    path = tmp_path / "judge.py"
    path.write_text(JUDGE)
    return f"{path}:judge"


def test_the_driver_gets_every_reward_in_order_and_each_was_made_where_its_response_was(judge):
    (driver, (first, second)), (other, nothing) = run_distributed(_score, 2, judge, "")
    makers = {0: driver, 1: other, 2: driver, 3: driver}  # sample 2 came from no rank
    assert first == second and [group.prompt for group in first] == PROMPTS
    attempts = [attempt for group in first for attempt in group.attempts]
    assert [attempt.reward for attempt in attempts] == [
        Reward(float(r.prompt == r.sample), f"{r.prompt} by {makers[r.sample]}") for r in _rollouts()
    ]
    assert [attempt.correct for attempt in attempts] == [r.prompt == r.sample for r in _rollouts()]
    assert nothing == [[], []]


@pytest.mark.parametrize(("broken", "complaint"), [("import", "no_such_module"), ("scoring", "pool is closed")])
def test_a_failure_on_one_rank_is_raised_on_all(judge, broken, complaint):
    heard = run_distributed(_score, 2, judge, broken)
    assert all(complaint in text for text in heard), heard


def _read(judge, folder, wrong):
    """As `_score`; the texts are 0 … 3, and prompt i is right about i. (prompt, sample, tokens) of what was read."""
    from megatron_srpo.config import ParallelConfig
    from megatron_srpo.data import Demonstrations
    from megatron_srpo.mcore import groups
    from megatron_srpo.mcore.control import Control
    from megatron_srpo.mcore.device import choose_device
    from megatron_srpo.rewards import RewardPool
    from megatron_srpo.run.scorer import PoolScorer

    topology = groups.initialize(ParallelConfig(), choose_device("cpu", 0), seed=1, timeout_minutes=2)
    rank, found = topology.rank, []
    with RewardPool(RewardConfig(functions={"own": judge}, workers=1), ["own"]) as pool:
        demonstrations = Demonstrations(folder, {})
        scorer = PoolScorer(pool, Control(topology), threshold=0.5, leads=rank == 0)
        scorer.tokenize(demonstrations, wrong=wrong)
        for taught in (True, False):  # the second is an evaluation
            hand_over = scorer.start(PROMPTS, taught=taught)
            for rollout in _rollouts():
                if rollout.sample % 3 == rank:
                    hand_over(rollout)
            found.append([
                (attempt.rollout.prompt, attempt.rollout.sample, attempt.demonstration.tolist())
                for group in scorer.finish(_rollouts() if rank == 0 else [])
                for attempt in group.attempts
                if attempt.demonstration is not None
            ])  # fmt: skip
        demonstrations.close()
    return found


@pytest.mark.parametrize("wrong", [False, True])
def test_what_teachers_may_be_shown_is_tokenized_where_it_was_answered(judge, tmp_path, wrong):
    tokenizer = chat_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (trained, evaluated), nothing = run_distributed(_read, 2, judge, str(tmp_path / "tokenizer"), wrong)
    assert trained == [
        (rollout.prompt, rollout.sample, tokenizer(rollout.text, add_special_tokens=False)["input_ids"])
        for rollout in _rollouts()
        if (wrong or rollout.prompt == rollout.sample) and rollout.sample != 2  # no rank had the third
    ]
    assert evaluated == [] and nothing == [[], []]
