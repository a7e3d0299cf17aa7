"""`check` shows what a run would train on, and refuses a run that could not learn."""

import json

import pytest
from transformers import AutoTokenizer

from megatron_srpo.core import exit_codes
from megatron_srpo.rewards import resolve
from megatron_srpo.rewards.made_up import FORMS
from megatron_srpo.run import cli
from tests.tiny_models import make_tiny_model

JUDGES = """
def fair(response, answer, metadata): return float(response == f"#### {answer}")
def fussy(response, answer, metadata): return 1.0 if answer in response else None
def deaf(response, answer, metadata): return 0.0
def generous(response, answer, metadata): return 1.0
def slow(response, answer, metadata): __import__("time").sleep(60)
def broken(response, answer, metadata): return answer["no such field"] if answer == "4" else {}
"""


@pytest.fixture
def checked(tmp_path, capfd):
    """Runs `check` on rows; returns (exit code, standard output, standard error)."""

    def run(rows, *overrides, template=None):
        model = make_tiny_model(tmp_path / "model")
        if template:
            tokenizer = AutoTokenizer.from_pretrained(model)
            tokenizer.chat_template = template
            tokenizer.save_pretrained(model)
        (tmp_path / "judge.py").write_text(JUDGES)
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = tmp_path / "run.toml"
        config.write_text(
            f'[run]\noutput_dir = "{tmp_path}/out"\n[model]\npath = "{model}"\n'
            f'[data]\ntrain = "{tmp_path}/rows.jsonl"\nmax_prompt_length = 64\n'
            "[rollout]\nmax_response_length = 64\nrollout_batch_size = 2\n[train]\nmax_tokens_per_gpu = 512\n"
        )
        capfd.readouterr()  # what transformers says of the model that it writes
        code = cli.main(["check", str(config), *overrides])
        return code, *capfd.readouterr()

    return run


def row(prompt, answer, kind):
    return {"prompt": prompt, "answer": answer, "kind": kind}


def test_check_shows_prompts_teacher_prompts_rewards_and_memory_and_finds_no_problem(checked, tmp_path):
    rows = [row("2 + 2?", "4", "exact"), row("2 + 3?", "5", "exact"), row("A or B?", "B", "mcq"), row("A?", "A", "mcq")]
    code, out, err = checked(rows)
    assert (code, err) == (exit_codes.DONE, "")
    assert 'kind "exact": 2 train prompts' in out and 'kind "mcq": 2 train prompts' in out
    assert "2 + 2?" in out and "its reference answer: '4'" in out
    assert "what its teacher reads, if a sibling is correct" in out and "(a made-up response) 4" in out
    assert "the answer itself, as <answer>LETTER</answer>: correct in 2 of 2 rows" in out
    assert "the answer of another row: correct in 0 of 2 rows; the first: reward 0, feedback" in out
    assert "an empty response: reward 0" in out and "one reward takes" in out
    assert "memory of the fullest of 1 h100 GPUs" in out and "it fits" in out and "no problem found" in out
    assert not (tmp_path / "out").exists()


def test_check_says_that_it_cannot_try_another_answer_if_all_rows_have_the_same(checked):
    code, out, _ = checked([row("2 + 2?", "4", "exact"), row("1 + 3?", "4", "exact")])
    assert code == exit_codes.DONE
    assert "the answer of another row: not tried, because these rows all have the same answer" in out


def test_check_names_a_reward_function_that_fails_for_wrong_responses(checked, tmp_path):
    rows = [row("2 + 2?", "four", "sums"), row("2 + 3?", "five", "sums")]
    code, _, err = checked(rows, "--reward.functions.sums", f"{tmp_path}/judge.py:fussy")
    assert code == exit_codes.MISTAKE
    assert "reward.functions.sums failed for 3 of 3 wrong responses, the first time with" in err and "NoneType" in err


def test_check_tries_few_rows_of_a_reward_function_that_takes_too_long(checked, tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_srpo.run.check_command.PATIENCE", 2.0)
    rows = [row(f"{number} + 2?", str(number + 2), "sums") for number in range(32)]
    options = ["--reward.functions.sums", f"{tmp_path}/judge.py:slow", "--reward.timeout_seconds", "1.2"]
    code, out, err = checked(rows, *options)
    assert code == exit_codes.MISTAKE and "is not correct in any of 2 rows" in err and "timeout" in err
    assert "one reward takes 1 s, so 2 rows are tried, for up to " in out


@pytest.mark.parametrize(
    ("question", "kind", "told"),
    [
        ('Put the final answer after "####".', "math", True),
        ("Put the final answer in \\boxed{}.", "math", False),
        ("Which one?", "mcq", True),
        ("Which one? <answer>B</answer>, for example.", "mcq", False),
        ("Which one?", "exact", False),
    ],
)
def test_check_warns_if_no_prompt_asks_for_the_form_that_the_reward_reads(checked, question, kind, told):
    code, out, _ = checked([row(f"1: {question}", "A", kind), row(f"2: {question}", "B", kind)])
    assert code == exit_codes.DONE and ("warning: the reward looks for" in out) is told


def test_check_tells_of_variables_that_are_not_set(checked):
    rows = [row("2 + 2?", "4", "exact"), row("2 + 3?", "5", "exact")]
    code, out, _ = checked(rows, "--reward.environment", '["NO_SUCH_VARIABLE"]')
    assert code == exit_codes.DONE and out.count("warning: reward.environment: NO_SUCH_VARIABLE is not set") == 1


@pytest.mark.parametrize(
    ("judge", "problems"),
    [
        ("fair", []),
        ("deaf", ["is the reference answer itself is not correct in any of 2 rows (tried: ANSWER, <answer>ANSWER"]),
        ("generous", ["with the answer of another row is correct in all of 2 rows", "an empty response is correct"]),
        ("broken", ["the function failed: exception: TypeError", "(once); exception: expected 'score' in the dict"]),
    ],
)
def test_check_refuses_a_reward_that_does_not_tell_right_from_wrong(checked, tmp_path, judge, problems):
    rows = [row("2 + 2?", "4", "sums"), row("2 + 3?", "5", "sums")]
    code, out, err = checked(rows, "--reward.functions.sums", f"{tmp_path}/judge.py:{judge}")
    assert code == (exit_codes.MISTAKE if problems else exit_codes.DONE)
    assert all(problem in err for problem in problems)
    assert problems or "as #### ANSWER: correct in 2 of 2 rows" in out


@pytest.mark.parametrize(
    ("kind", "answer"),
    [
        ("mcq", "(b)"),
        ("math", "so it is #### 1/2"),
        ("exact", 7),
        ("tooluse", [{"Action": "find", "Action_Input": {"a": [1, "x"]}}, {"Action": "stop", "Action_Input": "{}"}]),
    ],
)
def test_a_response_made_up_from_the_answer_of_a_built_in_kind_is_correct(kind, answer):
    _, form = FORMS[kind]
    assert resolve(kind)(form(answer), answer, {}).score == 1.0


CHATS = """
from megatron_srpo.environments import Environment, Step


class Chats(Environment):
    def __init__(self, tools):
        self.tools = [{"type": "function", "function": {"name": "count"}}] if tools else []

    async def step(self, reply):
        return Step(done=True, reward=1.0)
"""


@pytest.mark.parametrize(("tools", "shown"), [(True, True), (True, False), (False, False)])
def test_a_chat_template_that_shows_no_tools_is_warned_about(checked, tmp_path, tools, shown):
    """Nor what they return, if it is not `shown`."""
    (tmp_path / "chats.py").write_text(CHATS)
    classes = f'{{talk = "{tmp_path}/chats.py:Chats"}}'
    code, out, _ = checked(
        [row("hello", "4", "talk"), row("hi", "5", "talk")], "--environment.classes", classes,
        "--environment.arguments", f"{{talk = {{tools = {str(tools).lower()}}}}}",
        template=None if shown else "{% for m in messages if m.role != 'tool' %}{{ m.content }}<eos>{% endfor %}",
    )  # fmt: skip
    assert code == exit_codes.DONE and "its environment gives the rewards" in out
    assert ("the chat template of this tokenizer does not show the tools" in out) is tools
    assert ("the model cannot be shown what a tool returns" in out) is (tools and not shown)


FAILS = """
from megatron_srpo.environments import Environment


class Fails(Environment):
    async def step(self, reply):
        print("the reply was", repr(reply))
        return self.task.metadata["level"]
"""


def test_an_environment_that_fails_is_not_said_to_give_rewards_and_its_output_is_shown(checked, tmp_path):
    (tmp_path / "fails.py").write_text(FAILS)
    rows = [row("hello", "4", "talk"), row("hi", "5", "talk")]
    code, out, err = checked(rows, "--environment.classes", f'{{talk = "{tmp_path}/fails.py:Fails"}}')
    assert code == exit_codes.MISTAKE and "its environment does not work: exception: KeyError: 'level'" in err
    assert "its environment has failed, so its rewards" in out and "gives the rewards" not in out
    assert "the reply was ''" in out and "Traceback" in out


ASKS_AGAIN = """
from megatron_srpo.environments import Environment, Step


class Asks(Environment):
    async def step(self, reply):
        return Step([{"role": "user", "content": "And now?"}], reward=1.0)
"""


@pytest.mark.parametrize("history", ["split", "keep"])
def test_what_a_teacher_reads_with_feedback_at_turns_is_shown(checked, tmp_path, history):
    (tmp_path / "asks.py").write_text(ASKS_AGAIN)
    code, out, err = checked(
        [row("hello", "4", "talk"), row("hi", "5", "talk")], "--environment.history", history,
        "--environment.classes", f'{{talk = "{tmp_path}/asks.py:Asks"}}', "--algorithm.use_feedback", "true",
        "--teacher.feedback_at", "turn", "--teacher.max_prompt_length", "320", "--data.max_prompt_length", "100",
    )  # fmt: skip
    assert code == exit_codes.DONE, err
    read = out.partition("reads before turn 2")[2]
    parts = ["hello", "(made-up feedback on turn 1)", "(a made-up turn)", "And now?", "(made-up feedback on turn 2)"]
    places = [read.find(part) for part in parts]
    assert min(places) >= 0 and places == sorted(places), read


def test_a_class_of_a_kind_that_no_row_has_is_told(checked, tmp_path):
    (tmp_path / "asks.py").write_text(ASKS_AGAIN)
    rows = [row("2 + 2?", "4", "exact"), row("2 + 3?", "5", "exact")]
    code, out, _ = checked(rows, "--environment.classes", f'{{exakt = "{tmp_path}/asks.py:Asks"}}')
    assert code == exit_codes.DONE
    assert "environment.classes.exakt is not used: no train row is of this kind, they are of exact." in out
    assert "nearest known name is 'exact'" in out
