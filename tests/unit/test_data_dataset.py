"""Rows are read as they are, and every mistake names its place, what was expected and the cure."""

import json
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from megatron_srpo.config import DataConfig
from megatron_srpo.data import DataError, load_rows
from megatron_srpo.rewards import resolve

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
ROWS = {
    "sciknoweval/chemistry_train": 1890,
    "sciknoweval/chemistry_test": 210,
    "sciknoweval/material_train": 841,
    "sciknoweval/material_test": 94,
    "tooluse/test": 34,
}


def config(**changes):
    return DataConfig(train="unused", **changes)


def write(tmp_path, *lines, name="rows.jsonl"):
    path = tmp_path / name
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return str(path)


def row(**changes):
    return {"prompt": "1+1", "answer": "2", "kind": "exact", **changes}


def refusal(path, **changes):
    with pytest.raises(DataError) as error:
        load_rows(path, config(**changes))
    return str(error.value)


def test_a_row_becomes_an_example_and_its_other_fields_metadata(tmp_path):
    path = write(tmp_path, row(system="Be brief.", idx=7, source={"book": "x"}), b"", row(prompt="2+2", system=None))
    examples, report = load_rows(path, config())
    assert examples[0].messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1"},
    )
    assert (examples[0].answer, examples[0].kind) == ("2", "exact")
    assert examples[0].metadata == {"idx": 7, "source": {"book": "x"}}
    assert [one.row for one in examples] == [0, 1] and examples[1].source == f"{path}:3"
    assert str(report) == "2 rows from 1 file"


@pytest.mark.parametrize("answer", ["x", 3, 0, 2.5, False, [], [1, {"a": None}], {"a": [1]}, ""])
def test_any_json_value_but_null_is_an_answer(tmp_path, answer):
    assert load_rows(write(tmp_path, row(answer=answer)), config())[0][0].answer == answer


def test_chat_messages_are_kept_as_they_are(tmp_path):
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "q2"},
    ]
    assert load_rows(write(tmp_path, row(prompt=messages)), config())[0][0].messages == tuple(messages)


def test_a_prompt_that_is_the_json_of_chat_messages_is_read_as_messages(tmp_path):
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "1+1"}]
    lists = ["[1, 2]", "[x] or [y]?", "[]", '["a"]', '[{"role": "user"}]']  # text that only looks like it
    examples, _ = load_rows(
        write(tmp_path, row(prompt=json.dumps(chat)), *(row(prompt=one) for one in lists)), config()
    )
    assert list(examples[0].messages) == chat
    assert [example.messages[0]["content"] for example in examples[1:]] == lists


def test_an_answer_that_is_no_number_is_a_bad_row(tmp_path):
    table = pa.table({"prompt": ["a"], "answer": [float("nan")], "kind": ["exact"]})
    parquet.write_table(table, tmp_path / "rows.parquet")
    assert "'answer' is nan" in refusal(str(tmp_path / "rows.parquet"))


def test_the_fields_names_and_the_kind_can_be_set(tmp_path):
    path = write(tmp_path, {"question": "q", "gold": 1, "task": "math"}, {"question": "q2", "gold": 2})
    keys = {"prompt_key": "question", "answer_key": "gold", "kind_key": "task"}
    examples, _ = load_rows(path, config(kind="mcq", **keys))
    assert [(one.messages[0]["content"], one.answer, one.kind) for one in examples] == [
        ("q", 1, "math"),
        ("q2", 2, "mcq"),
    ]


def test_an_empty_kind_and_an_empty_system_message_are_none(tmp_path):
    ((one,), _) = load_rows(write(tmp_path, row(kind="", system="")), config(kind="mcq"))
    assert one.kind == "mcq" and [message["role"] for message in one.messages] == ["user"]


def test_dots_lead_into_objects_unless_a_field_has_that_name(tmp_path):
    nested = {"prompt": "q", "reward": {"gold": 1}, "kind": "math"}
    keys = {"answer_key": "reward.gold"}
    examples, _ = load_rows(write(tmp_path, nested, {**nested, "reward.gold": 2}), config(**keys))
    assert [one.answer for one in examples] == [1, 2]
    assert "no field 'reward.gold'" in refusal(write(tmp_path, {**nested, "reward": "gold"}), **keys)


def test_a_worked_solution_is_text_and_no_metadata(tmp_path):
    path = write(tmp_path, row(how="1 and 1 are 2", n=1), row(n=2), row(how=None, n=3))
    examples, _ = load_rows(path, config(solution_key="how"))
    assert [(one.solution, one.metadata) for one in examples] == [
        ("1 and 1 are 2", {"n": 1}), ("", {"n": 2}), ("", {"n": 3}),
    ]  # fmt: skip
    assert "'how': expected text, got a number" in refusal(write(tmp_path, row(how=2)), solution_key="how")


def test_several_files_are_one_data_set_with_rows_counted_through(tmp_path):
    paths = [write(tmp_path, row(), row(), name="a.jsonl"), write(tmp_path, row(), name="b.jsonl")]
    examples, report = load_rows(paths, config())
    assert [one.row for one in examples] == [0, 1, 2] and report.files == 2


def test_a_byte_order_mark_and_windows_line_ends_are_read_over(tmp_path):
    path = write(tmp_path, b"\xef\xbb\xbf" + json.dumps(row()).encode() + b"\r", json.dumps(row()).encode() + b"\r")
    assert len(load_rows(path, config())[0]) == 2


BAD_ROWS = {
    "not JSON": (b"{'prompt': 1}", "not JSON"),
    "cut off": (b'{"prompt": "x", "answ', "not JSON"),
    "NaN": (b'{"prompt": "x", "answer": NaN, "kind": "exact"}', "NaN"),
    "an array": ([1], "expected an object"),
    "a number": (3, "expected an object"),
    "no prompt": ({"answer": 1, "kind": "exact"}, "no field 'prompt'"),
    "no answer": ({"prompt": "x", "kind": "exact"}, "no field 'answer'"),
    "null answer": (row(answer=None), "'answer' is null"),
    "no kind": ({"prompt": "x", "answer": 1}, "data.kind"),
    "kind is a number": (row(kind=3), "expected the name of a reward"),
    "prompt is a number": (row(prompt=3), "expected text or a list of chat messages"),
    "prompt is an object": (row(prompt={"role": "user"}), "expected text or a list of chat messages"),
    "empty prompt": (row(prompt=" \n"), "'prompt' is empty"),
    "no messages": (row(prompt=[]), "expected text or a list"),
    "a message is text": (row(prompt=["x"]), "expected a message"),
    "unknown role": (row(prompt=[{"role": "human", "content": "x"}]), "expected 'role'"),
    "content in parts": (row(prompt=[{"role": "user", "content": [{"text": "x"}]}]), "expected text, got a list"),
    "the assistant speaks last": (
        row(prompt=[{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]),
        "last message",
    ),
    "nobody asks": (row(prompt=[{"role": "tool", "content": "x"}]), "last message"),
    "two system messages": (
        row(system="a", prompt=[{"role": "system", "content": "b"}, {"role": "user", "content": "x"}]),
        "keep one",
    ),
    "system is a number": (row(system=3), "expected text, got a number"),
    "not UTF-8": (b'{"prompt": "\xff"}', "not UTF-8: byte 0xff at column 13"),
    "NUL": (row(prompt="a\x00b"), "NUL character at character 2"),
    "lone surrogate": (row(prompt="ab\ud800"), "surrogate pair at character 3"),
    "lone surrogate in the answer": (row(answer="\udc00"), "surrogate"),
    "cut off before a value": (b'{"prompt": "x", "answer": ', "not JSON: Expecting value at column 27"),
    "too deep": (b"[" * 100_000, "nested too deeply"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_refused_with_its_line(tmp_path, name):
    bad, reason = BAD_ROWS[name]
    path = write(tmp_path, row(), bad, row())
    message = refusal(path)
    assert message.startswith(f"{path}:2: ") and reason in message and 'data.on_bad_row = "skip"' in message


def test_bad_rows_are_skipped_by_choice_and_the_first_three_are_told(tmp_path):
    path = write(tmp_path, row(), *(bad for bad, _ in BAD_ROWS.values()), row(prompt="last"))
    examples, report = load_rows(path, config(on_bad_row="skip"))
    assert [one.row for one in examples] == [0, len(BAD_ROWS) + 1]  # rows keep their number
    assert report.skipped == len(BAD_ROWS) and len(report.problems) == 3
    assert f"{len(BAD_ROWS)} bad rows skipped: {path}:2: not JSON" in str(report)


def test_a_mistyped_field_is_suggested(tmp_path):
    message = refusal(write(tmp_path, {"promt": "x", "answer": 1}))
    assert "has: answer, promt" in message and "Did you mean 'promt'?" in message and "data.prompt_key" in message


def test_unusable_files_are_refused_also_when_rows_may_be_skipped(tmp_path):
    existing = write(tmp_path, row(), name="train.jsonl")
    (tmp_path / "rows.csv").write_text("a,b")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not")
    skip = {"on_bad_row": "skip"}
    assert existing in refusal(str(tmp_path / "trian.jsonl"), **skip)
    assert "expected a .jsonl, .json or .parquet" in refusal(str(tmp_path / "rows.csv"), **skip)
    assert "is a folder" in refusal(str(tmp_path), **skip)
    assert "not a readable parquet" in refusal(str(tmp_path / "broken.parquet"), **skip)
    assert "no data file given" in refusal([], **skip)


def test_a_data_set_without_a_usable_row_is_refused(tmp_path):
    assert "is empty" in refusal(write(tmp_path, b"", b"  "))
    assert "no usable row among 2" in refusal(write(tmp_path, b"x", b"y"), on_bad_row="skip")


def test_parquet_rows_are_the_same_examples(tmp_path):
    rows = [
        {"prompt": [{"role": "user", "content": "q"}], "answer": "a", "kind": "exact", "extra": {"index": 1}},
        {"prompt": [{"role": "user", "content": "r"}], "answer": "b", "kind": None, "extra": {"index": 2}},
    ]
    path = str(tmp_path / "rows.parquet")
    parquet.write_table(pa.Table.from_pylist(rows), path)
    examples, _ = load_rows(path, config(kind="mcq"))
    expected, _ = load_rows(write(tmp_path, *rows), config(kind="mcq"))
    assert [(e.messages, e.answer, e.kind, e.metadata) for e in examples] == [
        (e.messages, e.answer, e.kind, e.metadata) for e in expected
    ]
    assert examples[1].source == f"{path}:row 2"


def test_fields_that_parquet_adds_to_objects_of_other_rows_are_dropped(tmp_path):
    calls = [[{"Action": "f", "Action_Input": {"a": 1}}], [{"Action": "g", "Action_Input": {"b": {"c": ["z", None]}}}]]
    calls.append([{"Action": "h"}])
    rows = [row(answer=one, kind="tooluse", entry={"n": n} if n else None, system=None) for n, one in enumerate(calls)]
    path = str(tmp_path / "rows.parquet")
    parquet.write_table(pa.Table.from_pylist(rows), path)
    examples, _ = load_rows(path, config())
    assert [one.answer for one in examples] == calls
    assert [one.metadata for one in examples] == [{"entry": None}, {"entry": {"n": 1}}, {"entry": {"n": 2}}]
    response = 'Action: g\nAction Input: {"b": {"c": ["z", null]}}'
    assert resolve("tooluse", {})(response, examples[1].answer, {}).score == 1.0


def test_a_parquet_text_that_is_not_utf8_is_a_bad_row(tmp_path):
    texts = pa.array([b"good", b"\xff\xfe", b"fine"]).view(pa.utf8())
    table = pa.table({"prompt": texts, "answer": ["1", "2", "3"]})
    path = str(tmp_path / "rows.parquet")
    parquet.write_table(table, path)
    assert f"{path}:row 2: a text is not UTF-8" in refusal(path, kind="exact")
    assert [one.answer for one in load_rows(path, config(kind="exact", on_bad_row="skip"))[0]] == ["1", "3"]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data sets are not here")
@pytest.mark.parametrize("name", ROWS)
def test_the_real_data_sets_load_completely(name):
    path = SHARED / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip(f"{path.name} is not here")
    examples, report = load_rows(str(path), config())
    assert len(examples) == ROWS[name] and report.skipped == 0
    assert {one.kind for one in examples} == {name.split("/")[0].replace("sciknoweval", "mcq")}
    assert all(one.messages[-1]["role"] == "user" for one in examples)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_json_file_is_json_lines_or_one_list(tmp_path, mark):
    rows = [row(prompt=f"q{number}") for number in range(3)]
    lines = write(tmp_path, mark, *rows, name="lines.json")  # SDPO's repository names its JSON Lines so
    (tmp_path / "list.json").write_bytes(mark + json.dumps(rows, indent=1).encode())
    for name, place in ((lines, "lines.json:4"), (str(tmp_path / "list.json"), "list.json:item 3")):
        examples, _ = load_rows(name, config())
        assert [one.messages[0]["content"] for one in examples] == ["q0", "q1", "q2"]
        assert examples[2].source.endswith(place)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{\n "prompt": "1+1"\n}', "expected JSON Lines or one list of rows, got an object"),
        ('[{"prompt": NaN}]', "NaN is no JSON value"),
        ("[" * 100_000, "is not JSON: expected JSON Lines or one list of rows"),
        ('{"prompt": "1+1", "answer": "2", "kind": "exact"}\n{broken', "rows.json:2: not JSON"),
        ("", "the data set is empty"),
    ],
    ids=["object", "constant", "deep", "line", "empty"],
)
def test_a_json_file_that_is_neither_is_refused(tmp_path, text, told):
    (tmp_path / "rows.json").write_text(text)
    assert told in refusal(str(tmp_path / "rows.json"))
