"""avg@k, pass@k and maj@k of sampled answers, by hand."""

import json
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest

from megatron_srpo.config import Config, DataConfig, TeacherConfig
from megatron_srpo.config.schema import EvalConfig
from megatron_srpo.core.errors import UserError
from megatron_srpo.core.records import Prompt, Reward, Rollout
from megatron_srpo.data import TeacherPromptBuilder
from megatron_srpo.run import launch
from megatron_srpo.run.evaluation import accuracy_metrics, chosen_prompts, taught_prompts
from megatron_srpo.run.generation import Evaluator
from tests.made_samples import make_groups
from tests.unit.chat_tokenizer import chat_tokenizer


def answers(prompt, *given):
    """One group: (text, prediction, score) each."""
    rollouts = [Rollout(0, i, [1, 2], [-1.0, -1.0], text, "stop", 0) for i, (text, _, _) in enumerate(given)]
    rewards = [Reward(score, prediction=prediction) for _, prediction, score in given]
    return make_groups([Prompt(f"test:{prompt}", (), [1], "", "exact")], rollouts, rewards)


def test_shares_of_correct_any_correct_and_majority():
    first = answers(0, ("B, I think", "B", 0.0), ("A", "A", 1.0), ("so A", "A", 1.0), ("C", "C", 0.0))
    second = answers(1, (" x ", None, 0.0), ("y", None, 1.0), ("x", None, 0.0), ("z", None, 0.0))
    metrics = accuracy_metrics(first + second, k=4)
    assert metrics["eval/accuracy"] == metrics["eval/avg@4"] == (2 / 4 + 1 / 4) / 2
    assert metrics["eval/pass@4"] == 1.0
    assert metrics["eval/maj@4"] == 0.5  # A wins the first group though no two texts are equal; x the second
    assert (metrics["eval/prompts"], metrics["eval/response_length"], metrics["eval/truncated"]) == (2, 2.0, 0.0)


def test_partial_credit_is_in_the_mean_score_and_every_kind_has_its_own_values():
    groups = answers(0, ("x", None, 0.4), ("y", None, 1.0)) + answers(1, ("x", None, 0.2), ("y", None, 0.0))
    assert "eval/exact/accuracy" not in accuracy_metrics(groups, k=2)  # one kind: the same values twice
    groups[1].prompt = replace(groups[1].prompt, kind="math")
    groups[1].attempts[1].reward.error = "time-out"
    metrics = accuracy_metrics(groups, k=2)
    assert (metrics["eval/accuracy"], metrics["eval/score"]) == (0.25, pytest.approx(0.4))
    assert (metrics["eval/exact/accuracy"], metrics["eval/exact/score"]) == (0.5, 0.7)
    assert (metrics["eval/math/accuracy"], metrics["eval/math/score"]) == (0.0, 0.1)
    assert (metrics["eval/exact/pass@2"], metrics["eval/math/pass@2"], metrics["eval/math/prompts"]) == (1.0, 0.0, 1)
    assert (metrics["eval/errors"], metrics["eval/exact/errors"], metrics["eval/math/errors"]) == (1, 0, 1)


def test_an_evaluation_says_which_prompts_it_takes():
    prompts = [Prompt(f"test:{i}", (), [1], "", kind) for i, kind in enumerate(("mcq", "mcq", "math"))]
    everything = chosen_prompts(prompts, EvalConfig(), "test")
    assert everything == (prompts, "evaluation: all 3 test prompts")
    first, text = chosen_prompts(prompts, EvalConfig(max_prompts=2), "test")
    assert first == prompts[:2]
    assert text == ("evaluation: the first 2 of 3 test prompts (eval.max_prompts): 2 of kind mcq; none of kind math")


def test_the_responses_of_an_evaluation_are_kept_and_earlier_ones_are_set_aside(tmp_path):
    file = tmp_path / "test.jsonl"
    for score in (0.0, 1.0):
        launch._write_responses(file, print, answers(0, ("I say B", "B", score), ("\ud800", None, 0.0)))
    record = json.loads(file.read_text())
    assert (record["responses"][0], record["predictions"], record["scores"]) == ("I say B", ["B", None], [1.0, 0.0])
    assert json.loads((tmp_path / "test.previous.1.jsonl").read_text())["scores"] == [0.0, 0.0]


def test_responses_that_the_disk_does_not_take_cost_no_metrics(tmp_path):
    told: list[str] = []
    launch._write_responses(tmp_path / "absent" / "test.jsonl", told.append, answers(0, ("B", "B", 1.0)))
    (line,) = told
    assert line.startswith("warning: the responses could not be written to") and "No such file" in line


def test_the_first_of_equally_frequent_answers_is_the_majority():
    assert accuracy_metrics(answers(0, ("A", None, 1.0), ("B", None, 0.0)), k=2)["eval/maj@2"] == 1.0


def test_answers_that_the_scorer_takes_for_the_same_are_one_answer():
    fractions = {"1/2": 0.5, "0.5": 0.5, "\\frac12": 0.5}

    def same(pairs):
        return [fractions.get(text) == fractions.get(other, -1) for _, text, other in pairs]

    def majority(*given, same=None):
        groups = answers(0, *[(text, text, score) for text, score in given])
        return accuracy_metrics(groups, k=len(given), same=same)[f"eval/maj@{len(given)}"]

    right = [("1/2", 1.0), ("0.5", 1.0), ("\\frac12", 1.0)]
    assert majority(("7", 0.0), ("7", 0.0), *right) == 1.0  # three texts, one answer, because all are correct
    wrong = [(text, 0.0) for text in fractions]
    assert majority(("3", 1.0), ("3", 1.0), *wrong) == 1.0  # as texts, no wrong answer occurs twice
    assert majority(("3", 1.0), ("3", 1.0), *wrong, same=same) == 0.0
    assert majority(("3", 1.0), ("3", 1.0), *wrong[:2], same=same) == 1.0  # ties go to the first
    assert majority(*wrong[:2], ("3", 1.0), ("3", 1.0), same=same) == 0.0


def test_only_answers_that_can_decide_a_majority_are_compared():
    def never(pairs):
        raise AssertionError(pairs)

    groups = answers(0, ("a", "a", 1.0), ("b", "b", 1.0), ("c", "c", 0.0))  # correct whatever c is
    groups += answers(1, ("a", "a", 0.0), ("a", "a", 0.0), ("b", "b", 0.0), ("c", "c", 1.0))  # wrong already
    groups += answers(2, ("a", None, 0.0), ("b", None, 0.0), ("c", None, 1.0))  # nothing was read from the responses
    assert accuracy_metrics(groups, k=3, same=never)["eval/prompts"] == 3


def test_tokens_of_the_environment_are_no_response():
    groups = answers(0, ("A", None, 1.0), ("B", None, 0.0))
    groups[0].attempts[0].rollout.trained[0] = False
    assert accuracy_metrics(groups, k=2)["eval/response_length"] == 1.5


class Answering:
    """An engine and a scorer in one: prompt i is answered right where i is even."""

    def __init__(self, error=None):
        self.batches, self._prompts, self._error = [], [], error

    def start(self, prompts, *, taught=True):
        self._prompts = prompts
        self.batches.append(len(prompts))

    def generate(self, requests, sampling, on_rollout):
        return [Rollout(r.prompt, r.sample, [1, 2], [-1.0, -1.0], str(r.seed), "stop", 0) for r in requests]

    def finish(self, rollouts):
        right = [self._prompts[rollout.prompt].token_ids[0] % 2 == 0 for rollout in rollouts]
        rewards = [Reward(float(correct), error=None if correct else self._error) for correct in right]
        return make_groups(self._prompts, rollouts, rewards)

    def same_answers(self, pairs):
        return [False for _ in pairs]


def _evaluation(error=None, **options):
    config = Config.model_validate({"model": {"path": "m"}, "data": {"train": "t"}, "eval": {"n_samples": 2}})
    prompts = [Prompt(f"test:{i}", (), [i], "", "exact") for i in range(7)]
    answering = Answering(error)
    timer = SimpleNamespace(phase=lambda name: nullcontext())
    return Evaluator(config, answering, prompts, answering, **options)(timer), answering.batches


def test_an_evaluation_in_batches_gives_what_one_batch_gives():
    whole, batches = _evaluation()
    assert batches == [7] and whole["eval/accuracy"] == 4 / 7
    assert _evaluation(stop=lambda: False, requests=4) == (whole, [2, 2, 2, 1])


def test_a_request_to_stop_ends_an_evaluation_after_its_batch_without_half_a_result():
    said, asked = [], iter([False, True])
    found = _evaluation(stop=lambda: next(asked), requests=6, say=said.append)
    assert found == ({}, [3, 3])
    assert said == ["the run was asked to stop: its evaluation ends after 6 of 7 prompts, without a result"]


def test_rewards_that_fail_in_an_evaluation_are_told_with_their_reasons():
    said = []
    _evaluation(error="crash: KeyError", say=said.append)
    assert said == ["warning: evaluation: 6 of 14 rewards failed, and count as reward.failure_score: crash: KeyError"]


def test_a_prompt_is_evaluated_as_its_teacher_reads_it():
    decode = chat_tokenizer().decode
    teacher = TeacherConfig(template="{question}{solution}", solution_section="|S:{solution}:S")
    build = TeacherPromptBuilder(chat_tokenizer(), teacher, DataConfig(train="unused"), 40)
    asked = Prompt("test:0", ({"role": "user", "content": "Q"},), [1], "A", "exact", solution="so A")
    given = [asked, replace(asked, solution=" "), replace(asked, solution="A" * 90)]
    prompts, (line, warning) = taught_prompts(given, build, decode, "test")
    shown = "<|im_start|>user\nQ|S:so A:S<|im_end|>\n<|im_start|>assistant\n"
    assert chat_tokenizer().decode(prompts[0].token_ids) == shown and prompts[0].answer == "A"
    assert prompts[0].messages == ({"role": "user", "content": shown},)  # what the file of responses shows
    assert len(prompts) == 2 and "2 test prompts" in line and "1 have none" in line
    assert "1 of 2 solutions are cut to fit" in warning
    with pytest.raises(UserError, match=r"none of 1 test prompts has a solution.*data\.solution_key"):
        taught_prompts([replace(asked, solution="")], build, decode, "test")
