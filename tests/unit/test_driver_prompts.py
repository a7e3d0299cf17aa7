"""What the driver says of the data before anything is built."""

import datetime
import json

import pytest

from megatron_srpo.config import Config
from megatron_srpo.core.errors import ConfigError
from megatron_srpo.core.restarts import note_begin
from megatron_srpo.data import DataError, prompt_cache
from megatron_srpo.rewards import RewardError
from megatron_srpo.run import first_start
from megatron_srpo.run.prompting import Prompting
from tests.tiny_models import make_tiny_model

BLIND = "{% for message in messages if message.role == 'user' %}{{ message.content }}{% endfor %}"


@pytest.fixture
def prompting(tmp_path):
    """Makes the driver's prompting from rows, with the tiny model's tokenizer or one with another template."""

    def make(rows, template=None, trains=True, **sections):
        model = make_tiny_model(tmp_path / "model")
        if template:
            (model / "chat_template.jinja").write_text(template)
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps({"answer": "1", "kind": "exact", **row}) + "\n" for row in rows))
        data = {"train": str(file), **sections.pop("data", {})}
        return Prompting(Config(model={"path": str(model)}, data=data, **sections), trains=trains)

    return make


def test_an_unknown_kind_is_refused_with_its_first_row_and_the_nearest_name(prompting):
    rows = [{"prompt": "a"}, {"prompt": "b", "kind": "exakt"}, {"prompt": "c", "kind": "exakt"}]
    with pytest.raises(RewardError, match=r"rows\.jsonl:2: unknown reward kind 'exakt'. Did you mean 'exact'"):
        prompting(rows).prompts("train", print)
    assert prompting(rows, reward={"functions": {"exakt": "m:f"}}).prompts("train", print)


def test_token_ids_are_kept_in_the_folder_of_a_run_that_has_one(prompting, tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_cache, "FEWEST", 2)
    rows, out = [{"prompt": "a"}, {"prompt": "b"}], tmp_path / "out"
    made = prompting(rows, run={"output_dir": str(out)}).prompts("train", print)
    assert not out.exists()  # as for `check` before the first start
    out.mkdir()
    for _ in range(2):
        assert prompting(rows, run={"output_dir": str(out)}).prompts("train", print) == made
        assert [path.name for path in (out / "prompts").iterdir()] == ["train.ids"]


def test_a_reference_answer_that_the_reward_cannot_read_is_refused_with_its_row_or_skipped(prompting):
    rows = [{"prompt": "a", "kind": "mcq", "answer": "b"}, {"prompt": "b", "kind": "mcq", "answer": "a cell"}]
    with pytest.raises(DataError, match=r"rows\.jsonl:2: kind 'mcq' expects the letter .* got 'a cell'"):
        prompting(rows).prompts("train", print)
    for kind, answer in (("math", "x is 3\nso it is 4"), ("exact", ["1"]), ("tooluse", "search")):
        with pytest.raises(DataError, match=rf"rows\.jsonl:1: kind '{kind}' expects"):
            prompting([{"prompt": "a", "kind": kind, "answer": answer}]).prompts("train", print)
    own = prompting(rows, reward={"functions": {"mcq": "m:f"}})
    assert len(own.prompts("train", print)) == 2  # the user's own function may read anything


def test_a_solution_key_that_no_row_has_is_refused_with_the_fields_that_rows_have(prompting):
    rows = [{"prompt": "a", "how": "like this"}, {"prompt": "b"}]
    teaching = {"algorithm": {"teachers": ["solution"]}}
    with pytest.raises(ConfigError, match=r'"hwo": no train row has a solution .* Other fields of the rows: how'):
        prompting(rows, data={"solution_key": "hwo"}, **teaching).prompts("train", print)
    found = prompting(rows, data={"solution_key": "how"}, **teaching).prompts("train", print)
    assert [prompt.solution for prompt in found] == ["like this", ""]


def test_a_batch_that_repeats_prompts_and_a_system_message_that_is_dropped_are_told(prompting):
    rows = [{"prompt": "a", "system": "be brief"}, {"prompt": "b"}]
    said = []
    prompting(rows, BLIND, rollout={"rollout_batch_size": 3}).prompts("train", said.append)
    assert "rollout.rollout_batch_size = 3 is more than the 2 train prompts" in said[1]
    assert "leaves out the system message, which 1 train prompts have" in said[2] and "rows.jsonl:1" in said[2]
    said.clear()
    prompting(rows, rollout={"rollout_batch_size": 2}).prompts("train", said.append)
    assert len(said) == 1


def test_characters_that_the_tokenizer_does_not_know_are_told(prompting):
    said = []
    prompting([{"prompt": "a"}, {"prompt": "b\u2603\u2603"}], rollout={"rollout_batch_size": 2}).prompts(
        "train", said.append
    )
    assert "1 train prompts have characters that the tokenizer does not know" in said[1] and "rows.jsonl:2" in said[1]


SHORT = {"data": {"max_prompt_length": 32}, "rollout": {"max_response_length": 8, "rollout_batch_size": 1}}


def test_the_words_of_the_templates_are_part_of_the_room_of_a_teacher_prompt(prompting):
    made = prompting([{"prompt": "a"}], **SHORT)
    (prompt,) = made.prompts("train", print)
    words = made.teacher_prompt.words("solution", "feedback")
    assert words > 32 + 8 and made.teacher_prompt.limit == 32 + 8 + words
    shown = made.teacher_prompt(prompt, "3141592", None)
    assert not shown.truncated and "3141592" in made.tokenizer.decode(shown.ids)


def test_a_teacher_prompt_in_which_no_demonstration_fits_is_refused_at_the_start(prompting):
    rows = [{"prompt": "a"}, {"prompt": "abc"}]
    with pytest.raises(ConfigError, match=r"may have 40 tokens \(teacher.max_prompt_length\).*no demonstration fits"):
        prompting(rows, teacher={"max_prompt_length": 40}, **SHORT).prompts("train", print)
    with pytest.raises(ConfigError, match=r"Raise train.max_tokens_per_gpu"):
        prompting(rows, train={"max_tokens_per_gpu": 60}, **SHORT).prompts("train", print)
    plain = prompting(rows, teacher={"max_prompt_length": 40}, algorithm={"name": "grpo"}, **SHORT)
    assert plain.prompts("train", print)  # nothing is distilled


def test_questions_that_leave_no_room_for_a_demonstration_are_told(prompting):
    rows = [{"prompt": "a"}, {"prompt": "abc"}]
    words = prompting(rows, **SHORT).teacher_prompt.words("solution")
    said = []
    prompting(rows, teacher={"max_prompt_length": words + 20}, **SHORT).prompts("train", said.append)
    assert "1 of 2 train prompts cannot be distilled" in said[1] and "rows.jsonl:2" in said[1]


DATED = "Today is {{ strftime_now('%d %b %Y') }}. {% for message in messages %}{{ message.content }}{% endfor %}"


def test_a_template_that_writes_todays_date_keeps_that_of_the_first_start(prompting, tmp_path, monkeypatch):
    class Clock(datetime.datetime):
        today = datetime.datetime(2026, 3, 1, 12)

        @classmethod
        def now(cls, tz=None):
            return cls.today

    monkeypatch.setattr(first_start, "datetime", Clock)
    (tmp_path / "out").mkdir()

    def rendered(*, trains=True, **sections):
        made = prompting([{"prompt": "a"}], DATED, trains=trains, run={"output_dir": str(tmp_path / "out")}, **sections)
        (prompt,) = made.prompts("train", print)
        shown = made.tokenizer.decode(made.teacher_prompt(prompt, "s", None).ids)
        text = made.tokenizer.decode(prompt.token_ids)
        assert shown.startswith(text.removesuffix("a"))
        return text

    assert rendered() == "Today is 01 Mar 2026. a"
    Clock.today = datetime.datetime(2026, 3, 2, 12)
    assert rendered() == "Today is 01 Mar 2026. a"
    anew = {"checkpoint": {"resume": False}}
    assert rendered(trains=False, **anew) == "Today is 01 Mar 2026. a"  # `check` and `eval` beside the run
    note_begin(tmp_path / "out")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # after a fault the run goes on from its own checkpoint
    assert rendered(**anew) == "Today is 01 Mar 2026. a"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert rendered(**anew) == "Today is 02 Mar 2026. a"


def test_only_a_training_run_keeps_the_date_of_its_first_start(prompting, tmp_path):
    (tmp_path / "out").mkdir()
    for trains in (False, True):
        prompting([{"prompt": "a"}], DATED, trains=trains, run={"output_dir": str(tmp_path / "out")})
        assert (tmp_path / "out" / first_start.FILE).exists() == trains


def test_an_answer_tag_that_is_a_special_token_is_told_because_no_reward_would_see_it(prompting):
    made = prompting([{"prompt": "a", "kind": "mcq", "answer": "B"}], rollout={"rollout_batch_size": 1})
    made.tokenizer.add_special_tokens({"additional_special_tokens": ["<answer>", "</answer>"]})
    said = []
    made.prompts("train", said.append)
    assert "has </answer>, <answer> as special tokens" in said[1] and 'kind "mcq" will never see them' in said[1]


def test_a_prompt_of_no_tokens_is_refused_with_its_row(prompting):
    template = "{% if messages[0].content != 'a' %}{{ messages[0].content }}{% endif %}"
    with pytest.raises(DataError, match=r"rows\.jsonl:1: the chat template makes no token"):
        prompting([{"prompt": "a"}], template).prompts("train", print)
