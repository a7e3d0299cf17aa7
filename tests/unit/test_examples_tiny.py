"""The tiny examples: prompts and templates agree, the warm start trains and is cached, the judge is right."""

import dataclasses
import json
import random
import tomllib
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoTokenizer

from examples.quickstart.task import Ordering
from examples.tiny import warm_start
from examples.tiny.sample import Judge
from examples.tiny.task import Example, draw_question, is_held_out, make_rows, write_splits
from examples.tiny.tokenizer import EOS, UNKNOWN, character_tokenizer
from examples.tiny.warm_start import IGNORED, WarmStart, collate, supervised_loss, warm_started_model
from examples.worksheet.task import Worksheet, facts, result
from megatron_srpo.config import Config

ROOT = Path(__file__).resolve().parents[2]
TASKS = {"quickstart": Ordering(), "worksheet": Worksheet()}
TINY = WarmStart(
    hidden_size=64, layers=1, heads=2, key_value_heads=1, ffn_size=64,
    steps=12, batch_size=16, lr=3e-3, warmup_steps=2, seed=0,
)  # fmt: skip


@pytest.fixture(params=TASKS)
def example(request):
    return request.param, TASKS[request.param]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A warm-started model, hardly trained."""
    return warm_started_model(Ordering(), TINY, tmp_path_factory.mktemp("cache"), report=lambda line: None)


def read_config(name):
    return Config.model_validate(tomllib.loads((ROOT / f"examples/{name}/{name}.toml").read_text()))


def test_the_tokenizer_is_one_token_a_character_and_survives_the_disk(example, tmp_path):
    _, task = example
    character_tokenizer(task.characters, task.chat_template).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = task.shown(task.question(random.Random(0)), "123")
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text) and tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text
    assert tokenizer.convert_ids_to_tokens(tokenizer("é\n")["input_ids"]) == [UNKNOWN, UNKNOWN]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.eos_token) == (0, 1, EOS)


def test_the_alphabet_must_not_repeat_itself():
    with pytest.raises(ValueError, match="repeats"):
        character_tokenizer("abca", "")


def test_the_chat_template_renders_the_prompt_of_the_warm_start(example):
    _, task = example
    tokenizer = character_tokenizer(task.characters, task.chat_template)
    question = task.question(random.Random(1))
    message = [{"role": "user", "content": question}]
    assert tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False) == task.plain(question)
    answered = tokenizer.apply_chat_template([*message, {"role": "assistant", "content": "12"}], tokenize=False)
    assert answered == task.plain(question) + "12" + EOS


def test_the_teacher_of_the_configuration_reads_the_shown_prompt_of_the_warm_start(example):
    name, task = example
    teacher = read_config(name).teacher
    question, demonstration = task.question(random.Random(2)), "9876"
    section = teacher.solution_section.format(solution=demonstration)
    content = teacher.template.format(question=question, solution=section, feedback="", instruction="")
    tokenizer = character_tokenizer(task.characters, task.chat_template)
    message = [{"role": "user", "content": content}]
    shown = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    assert shown == task.shown(question, demonstration)


def test_the_configurations_leave_room_for_every_prompt_and_answer(example):
    name, task = example
    config = read_config(name)
    question = task.question(random.Random(3))
    answer = task.answer(question)
    assert len(task.plain(question)) <= config.data.max_prompt_length
    assert len(answer) + 1 <= config.rollout.max_response_length == task.max_new_tokens
    longest = config.teacher.max_prompt_length or config.data.max_prompt_length + config.rollout.max_response_length
    assert len(task.shown(question, answer)) <= longest
    vocabulary = len(character_tokenizer(task.characters, task.chat_template))
    assert config.algorithm.distillation_topk < vocabulary


def test_splits_are_disjoint_distinct_and_the_same_every_time(example, tmp_path):
    _, task = example
    train, test = (
        [json.loads(line) for line in path.read_text().splitlines()] for path in write_splits(task, tmp_path, 300, 60)
    )
    asked = {row["prompt"] for row in train}, {row["prompt"] for row in test}
    assert (len(asked[0]), len(asked[1])) == (300, 60) and asked[0].isdisjoint(asked[1])
    assert all(is_held_out(question) for question in asked[1])
    assert train == make_rows(task, 300, held_out=False, seed=0)
    assert all(row["answer"] == task.answer(row["prompt"]) and row["kind"] == "exact" for row in train)


def test_asking_for_more_rows_than_there_are_questions_is_refused():
    with pytest.raises(ValueError, match="fewer than 500 distinct"):
        make_rows(Ordering(digits=2), 500, held_out=False, seed=0)


def test_ordering_is_right_a_third_of_the_time_and_repeats_what_it_is_shown():
    task, rng = Ordering(), random.Random(4)
    right, shown = 0, 0
    for _ in range(600):
        question = draw_question(task, rng, held_out=False)
        example = task.warm_start_example(rng, question, 0.5)
        right += example.target == task.answer(question)
        if example.prompt != task.plain(question):
            shown += 1
            assert example.prompt == task.shown(question, example.target)
    assert 0.27 < right / 600 < 0.42 and 0.43 < shown / 600 < 0.57


def test_worksheet_answers_write_every_item_out():
    assert facts("3+57*24+48+1") == ["3+5", "7*2", "4+4", "8+1"]
    assert Worksheet().answer("3+57*24+48+1") == "3+5=87*2=44+4=88+1=9"


def test_each_misconception_shows_with_its_own_probability():
    task, rng = Worksheet(), random.Random(5)
    error = task.misconceptions["7*2"]
    assert error.wrong != result("7*2") and 0.1 <= error.probability <= 0.7
    written = [task.attempt("7*2" * 4, rng)[4] for _ in range(2000)]
    assert set(written) == {error.wrong, "4"}
    assert written.count(error.wrong) / 2000 == pytest.approx(error.probability, abs=0.04)


def test_a_planted_slip_is_context_and_never_a_target():
    task, rng = Worksheet(slip_share=1.0, shown_share=1.0), random.Random(6)
    for _ in range(100):
        question = draw_question(task, rng, held_out=False)
        example = task.warm_start_example(rng, question, progress=0.9)
        demonstration = example.prompt[len(question) + 2 : -1]
        differ = [i for i, (a, b) in enumerate(zip(demonstration, example.target, strict=True)) if a != b]
        assert differ == [example.ignored]
    assert task.warm_start_example(rng, question, progress=0.1).prompt == task.plain(question)


def test_labels_sit_on_the_target_and_its_end_alone():
    task = Ordering()
    tokenizer = character_tokenizer(task.characters, task.chat_template)
    ids, labels = collate([Example("Q:1;A:", "12"), Example("Q:", "345", ignored=1)], tokenizer)
    assert ids.shape == labels.shape == (2, 9)
    end = tokenizer.eos_token_id
    three, five = tokenizer.convert_tokens_to_ids(["3", "5"])
    assert labels[0].tolist() == [IGNORED] * 6 + [*tokenizer.convert_tokens_to_ids(["1", "2"]), end]
    assert labels[1].tolist() == [IGNORED] * 2 + [three, IGNORED, five, end] + [IGNORED] * 3


def test_the_loss_of_the_warm_start_is_the_cross_entropy_of_its_targets():
    task, rng = Worksheet(), random.Random(7)
    tokenizer = character_tokenizer(task.characters, task.chat_template)
    torch.manual_seed(0)
    model = warm_start.build_model(TINY, tokenizer).double()
    batch = [task.warm_start_example(rng, draw_question(task, rng, False), 0.9) for _ in range(6)]
    ids, labels = collate(batch, tokenizer)
    logits = model(input_ids=ids).logits[:, :-1]
    expected = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
    torch.testing.assert_close(supervised_loss(model, ids, labels), expected)


def test_the_learning_rate_warms_up_and_ends_at_its_floor():
    settings = dataclasses.replace(TINY, steps=100, warmup_steps=10, final_lr=0.05)
    assert warm_start.lr_factor(settings, 0) == pytest.approx(0.1)
    assert warm_start.lr_factor(settings, 50) == pytest.approx(0.5)
    assert warm_start.lr_factor(settings, 99) == pytest.approx(0.05)
    assert warm_start.lr_factor(TINY, 11) == 1.0


def test_the_warm_start_learns_and_is_made_once_per_setting(tmp_path, monkeypatch):
    lines = []
    folder = warm_started_model(Ordering(), TINY, tmp_path, report=lines.append)
    losses = [float(line.split("loss ")[1].split()[0]) for line in lines]
    assert losses[-1] < losses[0]

    def refuse(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(warm_start, "train", refuse)
    assert warm_started_model(Ordering(), TINY, tmp_path) == folder
    with pytest.raises(KeyboardInterrupt):
        warm_started_model(Ordering(), dataclasses.replace(TINY, seed=1), tmp_path)
    assert list(tmp_path.iterdir()) == [folder], "an interrupted warm start leaves nothing behind"


def test_the_judge_samples_what_the_model_says_for_prompts_of_any_length(folder):
    judge = Judge(folder)
    prompts = ["Q:order 1;A:", "Q:order 53142;S:12345;A:", "Q:;A:"]
    together = judge.sample(prompts, 6, temperature=0.0)
    for prompt, response in zip(prompts, together, strict=True):
        ids = judge.tokenizer(prompt)["input_ids"]
        written = []
        for _ in range(6):  # greedy by hand: no cache, no padding
            with torch.no_grad():
                written.append(int(judge.model(input_ids=torch.tensor([ids + written])).logits[0, -1].argmax()))
            if written[-1] == judge.tokenizer.eos_token_id:
                break
        ended = written[-1] == judge.tokenizer.eos_token_id
        assert response == (judge.tokenizer.decode(written[:-1]) if ended else None)


def test_accuracy_counts_exact_answers_that_end(folder, monkeypatch):
    judge = Judge(folder)
    rows = make_rows(Ordering(), 4, held_out=True, seed=0)
    said = [rows[0]["answer"], rows[1]["answer"] + "0", None, rows[3]["answer"]]
    monkeypatch.setattr(judge, "sample", lambda *arguments: said)
    assert judge.accuracy(rows, 8, 1.0) == 0.5
    assert judge.render(rows[0]["prompt"]) == Ordering().plain(rows[0]["prompt"])
