"""What is tokenized in the background is what rank 0 would tokenize when it routes."""

from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_srpo.config import DataConfig, TeacherConfig
from megatron_srpo.core.records import Prompt
from megatron_srpo.data import DataError, Demonstrations, TeacherPromptBuilder
from tests.unit.chat_tokenizer import chat_tokenizer

TEACHER = TeacherConfig(template="{question}{solution}", solution_section="|S:{solution}:S")
PROMPT = Prompt("train:0", ({"role": "user", "content": "Q"},), [], "", "exact")
TEXTS = st.lists(
    st.sampled_from(["a", " b", "<think>", "</think>", "<|im_end|>", "<|im_start|>user\n", "é"]), max_size=8
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    chat_tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def demonstrations(folder):
    made = Demonstrations(folder, {})
    yield made
    made.close()


@settings(max_examples=100, deadline=None)
@given(st.lists(TEXTS.map("".join), min_size=1, max_size=4), st.integers(20, 60))
def test_a_teacher_prompt_is_the_same_with_tokens_that_were_made_before(demonstrations, texts, limit):
    build = TeacherPromptBuilder(chat_tokenizer(), TEACHER, DataConfig(train="unused"), limit)
    for text in texts:
        demonstrations.begin(text)
    for text, ids in demonstrations.take(texts).items():
        assert build(PROMPT, text, None, solution_ids=ids[:]) == build(PROMPT, text, None)


def test_what_is_given_is_used_and_not_changed(demonstrations):
    build = TeacherPromptBuilder(chat_tokenizer(), TEACHER, DataConfig(train="unused"), 60)
    plain, other = (
        build(PROMPT, "abc", None),
        array("i", chat_tokenizer()("x" * 90, add_special_tokens=False)["input_ids"]),
    )
    kept = other[:]
    built = build(PROMPT, "abc", None, solution_ids=other)
    assert built.truncated and built.ids != plain.ids and other == kept


def test_only_what_was_begun_is_there_and_it_is_there_once(demonstrations):
    demonstrations.begin("one")
    demonstrations.begin("one")
    assert list(demonstrations.take(["one", "two", "one"])) == ["one"]
    assert demonstrations.take(["one"]) == {}


def test_whoever_takes_the_tokens_learns_what_went_wrong(tmp_path):
    broken = Demonstrations(str(tmp_path / "missing"), {})
    broken.begin("text")
    with pytest.raises(DataError, match="not there"):
        broken.take(["text"])
    broken.close()
