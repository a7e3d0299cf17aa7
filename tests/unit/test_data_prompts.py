"""Prompts are the chat template's, within their length; batches come in an order that a checkpoint continues."""

import json
import os
from collections import Counter
from dataclasses import replace
from datetime import date

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_srpo.config import DataConfig
from megatron_srpo.core.records import Prompt
from megatron_srpo.data import DataError, Example, PromptLoader, load_tokenizer, prompt_cache, render_prompts
from megatron_srpo.data import prompts as rendering
from tests.unit.chat_tokenizer import chat_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return chat_tokenizer()


def example(row, text, system=None):
    messages = [{"role": "system", "content": system}] if system else []
    return Example(row, (*messages, {"role": "user", "content": text}), "answer", "exact", {"row": row}, f"f:{row}")


def config(**changes):
    return DataConfig(train="unused", **changes)


def test_a_prompt_is_the_chat_template_with_the_assistants_turn_open(tokenizer):
    (prompt,), dropped = render_prompts([example(5, "hé", "sys")], tokenizer, config(), "train")
    assert tokenizer.decode(prompt.token_ids) == (
        "<|im_start|>system\nsys<|im_end|>\n<|im_start|>user\nhé<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (prompt.uid, prompt.answer, prompt.kind, prompt.metadata) == ("train:5", "answer", "exact", {"row": 5})
    assert prompt.token_ids.count(tokenizer.eos_token_id) == 2 and dropped == 0


def test_the_chat_templates_own_options_reach_it(tokenizer):
    (prompt,), _ = render_prompts(
        [example(0, "q")], tokenizer, config(chat_template_kwargs={"enable_thinking": False}), "test"
    )
    assert tokenizer.decode(prompt.token_ids).endswith("assistant\n<think></think>")
    with pytest.raises(DataError, match="tokenize"):
        render_prompts([example(0, "q")], tokenizer, config(chat_template_kwargs={"tokenize": True}), "test")


def test_overlong_prompts_are_dropped_and_counted_or_refused(tokenizer):
    examples = [example(row, "x" * (10 * row)) for row in range(5)]
    fits = len(render_prompts([examples[2]], tokenizer, config(), "t")[0][0].token_ids)
    prompts, dropped = render_prompts(examples, tokenizer, config(max_prompt_length=fits), "train")
    assert [one.uid for one in prompts] == ["train:0", "train:1", "train:2"] and dropped == 2
    with pytest.raises(DataError, match=rf"2 of 5 prompts .* {fits} tokens \({fits + 10} to {fits + 20}; first: f:3"):
        render_prompts(examples, tokenizer, config(max_prompt_length=fits, overlong_prompts="error"), "train")
    with pytest.raises(DataError, match="5 of 5 prompts"):
        render_prompts(examples, tokenizer, config(max_prompt_length=3), "train")


@pytest.fixture
def counted(monkeypatch):
    """How many prompts are rendered; two are enough for a cache."""
    monkeypatch.setattr(prompt_cache, "FEWEST", 2)
    rendered, render = [], rendering.render_chat
    monkeypatch.setattr(rendering, "render_chat", lambda *given: rendered.append(given) or render(*given))
    return rendered


def test_kept_token_ids_give_the_same_prompts_and_nothing_is_rendered_again(tokenizer, counted, tmp_path):
    examples = [example(row, f"hé {row}" * row) for row in range(4)]
    made = render_prompts(examples, tokenizer, config(), "train", tmp_path / "p")
    assert len(counted) == 4
    assert render_prompts(examples, tokenizer, config(), "train", tmp_path / "p") == made
    shorter = config(max_prompt_length=len(made[0][2].token_ids))
    assert len(render_prompts(examples, tokenizer, shorter, "train", tmp_path / "p")[0]) == 3
    assert len(counted) == 4
    render_prompts(examples, tokenizer, config(), "test", tmp_path / "p")
    assert len(counted) == 8


@pytest.mark.parametrize("change", ["row", "order", "option", "template", "day"])
def test_kept_token_ids_are_of_these_messages_template_and_options(counted, tmp_path, change):
    def prompts_of(changed):
        examples = [example(row, f"q{row}" + "!" * (changed == "row" and row == 1)) for row in range(3)]
        options = {"enable_thinking": changed == "option"}
        day = date(2026, 1, 1 + (changed == "day"))
        template = "{{ messages[0].content }}" + "?" * (changed == "template") + "{{ strftime_now('%d') }}"
        settings = config(chat_template_kwargs=options)
        settings = settings.model_copy(update={"chat_template_kwargs": {**options, "strftime_now": day.strftime}})
        return render_prompts(
            examples[:: -1 if changed == "order" else 1], chat_tokenizer(template), settings, "train", tmp_path / "p"
        )[0]

    before, after = prompts_of(""), prompts_of(change)
    assert len(counted) == 6
    assert [one.token_ids for one in before] != [one.token_ids for one in after] or change == "option"
    prompts_of(change)
    assert len(counted) == 6


def with_another_end(tokenizer):
    tokenizer.eos_token = "<|im_start|>"
    return tokenizer


def with_another_vocabulary(tokenizer):
    tokenizer.add_tokens(["q1"])
    return tokenizer


@pytest.mark.parametrize("change", [with_another_end, with_another_vocabulary, "library"])
def test_kept_token_ids_are_of_this_tokenizer_and_of_these_libraries(counted, tmp_path, monkeypatch, change):
    examples = [example(row, f"q{row}") for row in range(2)]  # as few as are kept
    for times in (2, 2):
        render_prompts(examples, chat_tokenizer(), config(), "train", tmp_path / "p")
        assert len(counted) == times
    changed = chat_tokenizer()
    if change == "library":
        monkeypatch.setattr(prompt_cache, "version", lambda name: "0.0")
    else:
        change(changed)
    render_prompts(examples, changed, config(), "train", tmp_path / "p")
    assert len(counted) == 4


@pytest.mark.parametrize("before", ["false", "true", None])
def test_a_tokenizer_has_its_threads_for_a_batch_alone_whatever_happens(monkeypatch, before):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    if before:
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", before)
    with pytest.raises(DataError), rendering.on_all_cores():
        assert os.environ["TOKENIZERS_PARALLELISM"] == "true"
        raise DataError("a text that cannot be encoded")
    assert os.environ["TOKENIZERS_PARALLELISM"] == (before or "false")


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:-4], lambda data: data + b"1234",
                                    *(lambda data, at=at: data[:at] + bytes([data[at] ^ 32]) + data[at + 1 :]
                                      for at in (0, 70, -2))])  # fmt: skip
def test_damaged_files_and_places_that_take_none_cost_time_alone(tokenizer, counted, tmp_path, damage):
    examples = [example(row, f"q{row}") for row in range(3)]
    made = render_prompts(examples, tokenizer, config(), "train", tmp_path / "p")
    file = tmp_path / "p" / "train.ids"
    file.write_bytes(damage(file.read_bytes()))
    assert render_prompts(examples, tokenizer, config(), "train", tmp_path / "p") == made
    (tmp_path / "file").write_text("")
    assert render_prompts(examples, tokenizer, config(), "train", tmp_path / "file" / "p") == made
    assert len(counted) == 9


def test_a_template_that_refuses_the_messages_is_named_with_the_row():
    strict = chat_tokenizer("{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}")
    with pytest.raises(DataError, match=r"f:3: .*no system role"):
        render_prompts([example(3, "q", "system")], strict, config(), "train")


def test_a_tokenizer_comes_from_a_local_folder(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded("a<|im_end|>")["input_ids"] == tokenizer("a<|im_end|>")["input_ids"]


def test_a_folder_without_a_usable_tokenizer_is_refused_with_the_cure(tmp_path):
    for name, fit, cure in [
        ("absent", lambda folder: None, "Nothing is downloaded"),
        ("empty", lambda folder: folder.mkdir(), "no tokenizer"),
        ("plain", lambda folder: chat_tokenizer(None).save_pretrained(folder), "no chat template"),
        (
            "rest",
            lambda folder: (folder.mkdir(), (folder / "tokenizer_config.json").write_text("{}")),
            "tokenizer.json;",
        ),
        ("broken", lambda folder: (folder.mkdir(), (folder / "tokenizer.json").write_text("{")), "cannot be loaded"),
    ]:
        fit(tmp_path / name)
        with pytest.raises(DataError, match=cure):
            load_tokenizer(str(tmp_path / name))


SENTENCEPIECE = {
    "like Llama": {"model_type": "bpe", "byte_fallback": True, "remove_extra_whitespaces": False},
    "bpe": {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "nmt_nfkc"},
    "unigram": {"model_type": "unigram", "normalization_rule_name": "nmt_nfkc"},
    "no space before": {"model_type": "unigram", "add_dummy_prefix": False, "remove_extra_whitespaces": False},
}


@pytest.mark.parametrize("kind", SENTENCEPIECE)
def test_a_folder_with_a_sentencepiece_model_alone_gives_sentencepieces_tokens(tmp_path, kind):
    import sentencepiece

    lines = [f"the number {i} times {i % 7} is {i * (i % 7)}; naïve ﬁ 你好" for i in range(300)]
    options = {"normalization_rule_name": "identity", "vocab_size": 380, "hard_vocab_limit": False, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(tmp_path / "tokenizer"), control_symbols=["<|end|>"],
        **options | SENTENCEPIECE[kind],
    )  # fmt: skip
    (tmp_path / "tokenizer.vocab").unlink()
    with pytest.raises(DataError, match=r"no chat template: .* put its chat_template\.jinja into the folder"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}<|end|>")
    tokenizer = load_tokenizer(str(tmp_path))
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert len(tokenizer) == reference.vocab_size() and tokenizer.eos_token_id == reference.eos_id()
    for text in (*lines[::60], "  17 times  3\nis 51 ", "unseen: Ωß🙂", " a"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == reference.encode(text)
        if kind in ("bpe", "like Llama"):  # bytes stand for what is unknown
            assert tokenizer.decode(ids).strip() == reference.decode(ids).strip()
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "the number"}], return_dict=False)
    assert chat == [*reference.encode("the number"), reference.piece_to_id("<|end|>")]


def test_a_file_that_is_no_sentencepiece_model_is_refused(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"version https://git-lfs")
    with pytest.raises(DataError, match="no SentencePiece model"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_without_an_end_token_is_refused(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    settings_file = tmp_path / "tokenizer_config.json"
    kept = {key: value for key, value in json.loads(settings_file.read_text()).items() if key != "eos_token"}
    settings_file.write_text(json.dumps(kept))
    (tmp_path / "special_tokens_map.json").unlink(missing_ok=True)
    with pytest.raises(DataError, match="end-of-sequence"):
        load_tokenizer(str(tmp_path))


def prompts(count, answer="a"):
    return [Prompt(f"train:{i}", ({"role": "user", "content": str(i)},), [i], answer, "exact") for i in range(count)]


def uids(batch):
    return [prompt.uid for prompt in batch]


def stream(loader, batches):
    return [uid for _ in range(batches) for uid in uids(loader.next_batch())]


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 12), batch=st.integers(1, 20), seed=st.integers(0, 5), shuffle=st.booleans())
def test_every_epoch_shows_every_prompt_once_whatever_the_batch_size(count, batch, seed, shuffle):
    loader = PromptLoader(prompts(count), batch, seed=seed, shuffle=shuffle)
    shown = stream(loader, 3 * count)
    for epoch in range(len(shown) // count):
        assert Counter(shown[epoch * count : (epoch + 1) * count]) == Counter(uids(prompts(count)))
    assert loader.epoch == len(shown) // count


def test_the_order_is_the_seeds_and_the_epochs():
    first = stream(PromptLoader(prompts(20), 20, seed=3), 2)
    assert first == stream(PromptLoader(prompts(20), 7, seed=3), 6)[:40]  # not the batch size's
    assert first != stream(PromptLoader(prompts(20), 20, seed=4), 2)
    assert first[:20] != first[20:]
    assert stream(PromptLoader(prompts(20), 20, seed=3, shuffle=False), 1) == uids(prompts(20))


@pytest.mark.parametrize("taken", [0, 1, 2, 3, 5, 9])
def test_a_resumed_loader_goes_on_where_it_stopped(taken):
    whole, stopped = (PromptLoader(prompts(7), 3, seed=1) for _ in range(2))
    expected = stream(whole, taken + 6)[3 * taken :]
    stream(stopped, taken)
    state = json.loads(json.dumps(stopped.state_dict()))
    resumed = PromptLoader(prompts(7), 3, seed=1)
    resumed.load_state_dict(state)
    assert stream(resumed, 6) == expected and resumed.epoch == whole.epoch


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (PromptLoader(prompts(8), 3, seed=1), "number of prompts"),
        (PromptLoader(prompts(7, answer="b"), 3, seed=1), "data set"),
        (PromptLoader(list(reversed(prompts(7))), 3, seed=1), "data set"),
        (PromptLoader([replace(one, token_ids=[9]) for one in prompts(7)], 3, seed=1), "data set"),
        (PromptLoader([replace(one, kind="math") for one in prompts(7)], 3, seed=1), "data set"),
        (PromptLoader(prompts(7), 3, seed=2), "run.seed"),
        (PromptLoader(prompts(7), 3, seed=1, shuffle=False), "data.shuffle"),
    ],
)
def test_the_state_of_another_data_set_or_order_is_refused(other, named):
    state = PromptLoader(prompts(7), 3, seed=1).state_dict()
    with pytest.raises(DataError, match=named):
        other.load_state_dict(state)


def test_a_damaged_state_and_an_empty_data_set_are_refused():
    loader = PromptLoader(prompts(7), 3)
    for damage in ({"position": 7}, {"position": -1}, {"position": None}, {"epoch": "1"}):
        with pytest.raises(DataError, match="damaged"):
            loader.load_state_dict({**loader.state_dict(), **damage})
    with pytest.raises(DataError, match=r"rollout_batch_size: expected at least 1, got 0"):
        PromptLoader(prompts(7), 0)
    with pytest.raises(DataError, match="empty"):
        PromptLoader([], 3)
