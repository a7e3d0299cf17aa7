"""Data sets as users download them become rows that the trainer reads; no question is in both splits."""

import datetime
import decimal
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from megatron_srpo.commands.prepare_data import MCQ_SYSTEM, main
from megatron_srpo.config import DataConfig
from megatron_srpo.data import load_rows
from megatron_srpo.rewards import resolve

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
FIELDS = ["idx", "kind", "dataset", "system", "prompt", "answer"]


def science(number, **changes):
    return {
        "prompt": {"default": "Please directly give the answer."},
        "question": f"Which of the options follows from {number}? ",
        "answer": "",
        "type": "mcq-4-choices",
        "domain": ["Biology", "Chemistry", "Material", "Physics"][number % 4],
        "details": {"level": "L3", "task": "t", "subtask": "s", "source": "x"},
        "answerKey": "ABCD"[number % 4],
        "choices": {"text": [f"one {number}", "two\n", "three", "four"], "label": ["A", "B", "C", "D"]},
        **changes,
    }


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").open(encoding="utf-8")]


def prepare(out, *arguments):
    assert main([str(one) for one in arguments] + ["--out", str(out)]) == 0
    return read(out, "train"), read(out, "test") if (out / "test.jsonl").exists() else []


def refusal(capsys, *arguments):
    assert main([str(one) for one in arguments]) != 0
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.err.startswith("prepare-data: ") and not captured.out
    return captured.err


def test_science_rows_have_the_trainers_form(tmp_path):
    source = write(tmp_path / "s.jsonl", [science(number) for number in range(40)])
    train, test = prepare(tmp_path / "out", "sciknoweval", source, "--domain", "chemistry", "--test-fraction", 0.2)
    assert (len(train), len(test)) == (8, 2)
    (first,) = (row for row in train + test if "from 1?" in row["prompt"])
    assert list(first) == FIELDS and first["system"] == MCQ_SYSTEM
    assert (first["kind"], first["dataset"], first["answer"]) == ("mcq", "sciknoweval", "B")
    assert first["prompt"] == (
        "Which of the options follows from 1?\n\nA: one 1\nB: two\nC: three\nD: four\nPlease reason step by step."
    )
    assert sorted(row["idx"] for row in train + test) == list(range(10))
    assert resolve("mcq")(f"<answer>\n{first['answer']}\n</answer>", first["answer"], {}).score == 1


def test_only_multiple_choice_of_the_level_and_domain_is_taken_and_the_rest_counted(tmp_path, capsys):
    rows = [
        science(1), science(5),
        science(9, type="filling"), science(13, type="open-ended-qa"), science(17, details={"level": "L1"}), science(2),
        science(21, answerKey="E"), science(25, choices={"text": ["a", "b"], "label": ["A", "A"]}),
        science(29, choices={"text": ["a"], "label": ["A", "B"]}), {"question": "?"}, science(33, choices=None),
    ]  # fmt: skip
    train, _ = prepare(tmp_path / "out", "sciknoweval", write(tmp_path / "s.jsonl", rows), "--domain", "Chemistry")
    assert len(train) == 2
    said = capsys.readouterr().out
    for line in ("skipped 2: not multiple choice", "1: not of level L3", "1: of another domain", "1: no right option",
                 "2: options without a letter each", "1: no field 'type'", "1: not of the expected form"):  # fmt: skip
        assert line in said
    train, _ = prepare(
        tmp_path / "out",
        "sciknoweval",
        tmp_path / "s.jsonl",
        "--domain",
        "chemistry",
        "--domain",
        "materials",
        "--level",
        "all",
        "--replace",
    )
    assert len(train) == 4


def test_a_folder_is_searched_and_parquet_is_the_same_as_jsonl(tmp_path):
    rows = [science(number) for number in range(20)]
    folder = tmp_path / "hub" / "data"
    folder.mkdir(parents=True)
    parquet.write_table(pa.Table.from_pylist(rows[:10]), folder / "a.parquet")
    write(folder / "b.jsonl", rows[10:])
    (folder / "README.md").write_text("x")
    mixed = prepare(tmp_path / "out", "sciknoweval", tmp_path / "hub")
    plain = prepare(tmp_path / "out2", "sciknoweval", write(tmp_path / "all.jsonl", rows))
    assert mixed == plain


@pytest.mark.parametrize("out", ["made", "."])
def test_what_an_earlier_conversion_wrote_into_the_folder_is_no_source(tmp_path, out):
    write(tmp_path / "raw.jsonl", [{"prompt": f"q{number}", "answer": "1"} for number in range(10)])
    given = ("convert", tmp_path, "--kind", "exact", "--replace", "--test-size", 0)
    for system in ("first", "second"):
        train, _ = prepare(tmp_path / out, *given, "--system", system)
        assert [row["system"] for row in train] == [system] * 10


def test_the_split_depends_on_the_seed_and_not_on_the_order_of_the_rows(tmp_path):
    rows = [science(number) for number in range(60)]
    forward = write(tmp_path / "f.jsonl", rows)
    backward = write(tmp_path / "b.jsonl", rows[::-1])
    prompts = [
        {
            row["prompt"]
            for row in prepare(tmp_path / f"o{i}", "sciknoweval", source, "--test-size", 7, "--seed", seed)[1]
        }
        for i, (source, seed) in enumerate([(forward, 0), (backward, 0), (forward, 1)])
    ]
    assert prompts[0] == prompts[1] != prompts[2] and len(prompts[0]) == 7


def test_equal_prompts_are_kept_once_but_case_counts(tmp_path, capsys):
    rows = [
        {"prompt": "c1ccccc1  is?", "answer": "a"},
        {"prompt": " c1ccccc1 is?\n", "answer": "b"},
        {"prompt": "C1CCCCC1 is?", "answer": "c"},
    ]
    source = write(tmp_path / "r.jsonl", rows)
    train, test = prepare(tmp_path / "out", "convert", source, "--kind", "exact", "--test-fraction", 0)
    assert [row["answer"] for row in train] == ["a", "c"] and test == []
    assert "2 train rows, 0 test rows; 1 duplicates" in capsys.readouterr().out


def test_a_question_of_the_given_test_set_is_never_trained_on(tmp_path):
    train_source = write(tmp_path / "train.jsonl", [{"prompt": f"q{i}", "answer": i} for i in range(10)])
    test_source = write(tmp_path / "test.jsonl", [{"prompt": f"q{i}", "answer": i} for i in range(8, 12)])
    train, test = prepare(tmp_path / "out", "convert", train_source, "--kind", "exact", "--test-source", test_source)
    assert [row["prompt"] for row in train] == [f"q{i}" for i in range(8)]
    assert [(row["prompt"], row["idx"]) for row in test] == [(f"q{i}", i) for i in range(8, 12)]


def api(**changes):
    return {
        "Name": "Birds",
        "Description": "Pictures of birds",
        "NLDocumentation": "findBird: Find.\nParameters: {}\nlistBirds: List.\nParameters: {}\n",
        "Function_Description": {"findBird": "Find.", "listBirds": "List.", "components": ""},
        **changes,
    }


def steps(*calls):
    return [[[action, given, f"\nAction: {action}"], "Status Code: 200."] for action, given in calls]


def test_toolalpacas_golden_answers_and_training_instances_become_rows(tmp_path, capsys):
    evaluation = api(
        Instructions=["Find a wren.", "Any bird?"],
        Golden_Answers=[
            [{"Action": "findBird", "Action_Input": '{"name": "wren", "where": {"country": "IE"}}'}],
            [{"Action": "findBird", "Action_Input": "{broken"}],
        ],
    )
    training = api(
        Instances=[
            {"input": "List them.\nHint: use listBirds", "intermediate_steps": steps(("listBirds", "{}"))},
            {"input": "Both.", "intermediate_steps": steps(("listBirds", "{}"), ("findBird", '{"name": "é"}'))},
            {"input": "Ask.", "intermediate_steps": steps(("getDetails", '{"Question": "?"}'))},
            {"input": "Wrong.", "intermediate_steps": steps(("fly", "{}"))},
            {"input": "Nothing.", "intermediate_steps": []},
            {"input": "No steps."},
        ]
    )
    for name, content in (
        ("eval.json", [evaluation]),
        ("train.json", [training, api(NLDocumentation="", Function_Description=None)]),
    ):
        (tmp_path / name).write_text(json.dumps(content))
    train, test = prepare(
        tmp_path / "out", "toolalpaca", tmp_path / "train.json", "--test-source", tmp_path / "eval.json"
    )
    assert [row["prompt"].rpartition("Question: ")[2] for row in train + test] == [
        "List them.",
        "Both.",
        "Find a wren.",
    ]
    assert list(test[0]) == FIELDS and test[0]["system"] is None and test[0]["kind"] == "tooluse"
    assert "Name: Birds\nDescription: Pictures of birds\nDocumentation:\nfindBird: Find." in test[0]["prompt"]
    response = 'Thought: …\nAction: listBirds\nAction Input: {}\nAction: findBird\nAction Input: {"name": "é"}'
    assert resolve("tooluse")(response, train[1]["answer"], {}).score == 1
    said = capsys.readouterr().out
    for reason in ("2: not 1 to 5 calls", "1: only asks back", "1: a call of an unknown function",
                   "1: a call whose input is no JSON object", "1: an API without documentation"):  # fmt: skip
        assert f"skipped {reason}" in said


def test_any_table_is_converted_by_a_field_mapping(tmp_path):
    rows = [
        {"data": {"q": f"q{i}"}, "gold.x": i, "role": "Be exact.", "level": i % 2, "task": "math" if i else None}
        for i in range(5)
    ]
    source = tmp_path / "t.parquet"
    parquet.write_table(pa.Table.from_pylist(rows), source)
    train, _ = prepare(
        tmp_path / "out", "convert", source, "--map", "prompt=data.q, answer=gold.x,system=role,kind=task",
        "--kind", "exact", "--keep", "level", "--test-fraction", 0,
    )  # fmt: skip
    assert train[0] == {
        "idx": 0, "kind": "exact", "dataset": "t", "system": "Be exact.", "prompt": "q0", "answer": 0, "level": 0
    }  # fmt: skip
    assert train[4]["kind"] == "math"


def test_chat_messages_and_saved_hugging_face_data_sets_are_read(tmp_path, capsys):
    messages = [[{"role": "user", "content": f"q{i}"}] for i in range(4)]
    saved = datasets.Dataset.from_dict({"prompt": messages, "answer": list("abcd")})
    saved.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": saved}).save_to_disk(str(tmp_path / "splits"))
    train, test = prepare(
        tmp_path / "out", "convert", tmp_path / "saved", "--kind", "exact", "--system", "s", "--test-size", 1
    )
    assert len(train) == 3 and len(test) == 1 and test[0]["prompt"] in messages
    examples, _ = load_rows(str(tmp_path / "out" / "train.jsonl"), DataConfig(train="unused"))
    assert examples[0].messages[0] == {"role": "system", "content": "s"}
    capsys.readouterr()
    assert "name one, e.g. " in refusal(capsys, "convert", tmp_path / "splits", "--kind", "x", "--out", tmp_path / "o")
    assert len(prepare(tmp_path / "out3", "convert", tmp_path / "splits" / "train", "--kind", "exact")[0]) == 4


@pytest.mark.parametrize("source", ["rows.parquet", "saved"])
def test_fields_that_arrow_adds_to_objects_of_other_rows_are_dropped(tmp_path, source):
    calls = [[{"Action": "f", "Action_Input": {"a": 1}}], [{"Action": "g", "Action_Input": {"b": "z"}}]]
    table = pa.Table.from_pylist([{"prompt": f"q{i}", "answer": one} for i, one in enumerate(calls)])
    parquet.write_table(table, tmp_path / "rows.parquet")
    datasets.Dataset(table).save_to_disk(str(tmp_path / "saved"))
    train, _ = prepare(tmp_path / "out", "convert", tmp_path / source, "--kind", "tooluse", "--test-size", 0)
    assert [row["answer"] for row in train] == calls


def test_a_users_mistakes_are_one_line_and_nothing_is_written(tmp_path, capsys):
    source = write(tmp_path / "s.jsonl", [{"q": "x", "a": "y"}, {"q": "z"}])
    (tmp_path / "s.xlsx").write_text("")
    empty = write(tmp_path / "e.jsonl", [{"q": "z"}])
    nothing = write(tmp_path / "n.jsonl", [])
    twins = write(
        tmp_path / "t.jsonl", [{"prompt": "x", "answer": "y", "kind": "exact", "system": one} for one in ("a", "b")]
    )
    (tmp_path / "twice.csv").write_text("prompt,answer,answer\nx,right,wrong\n")
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "object.json").write_text('{\n"a": 1}')
    out = ["--out", tmp_path / "out"]
    for arguments, complaint in [
        (["sciknoweval", tmp_path / "absent.jsonl", *out], "no such file or folder"),
        (["sciknoweval", tmp_path / "absent", *out], "no such file or folder"),
        (["sciknoweval", source, "--domain", "law", *out], "expected some of biology"),
        (["sciknoweval", source, "--level", "L9", *out], "expected one of L1"),
        (["sciknoweval", source, "--out", source], "is a file; name a folder"),
        (["convert", nothing, *out], "there are no rows"),
        (
            ["convert", source, "--map", "prompt=q,answer=a", "--kind", "k", "--test-source", source, *out],
            "all 1 rows are in the test split as well",
        ),
        (["sciknoweval", source, *out], "nothing to convert"),
        (["toolalpaca", tmp_path / "bad.json", *out], "is not JSON"),
        (["toolalpaca", tmp_path / "object.json", *out], "expected JSON Lines or one list of rows, got an object"),
        (["convert", source, *out], f"2: no 'prompt'; --map prompt=FIELD names it (first {source}:1, which has a, q)"),
        (["convert", source, "--map", "prompt=q,answer=a", *out], "no kind"),
        (["convert", source, "--map", "prompt", *out], "expected OURS=THEIRS"),
        (["convert", source, "--map", "promt=q", *out], "expected OURS=THEIRS"),
        (["convert", source, "--map", "prompt=q,answer=a", "--kind", "k", "--test-size", 5, *out], "leaves nothing"),
        (["convert", source, "--test-size", 1, "--test-fraction", 0.5, *out], "give one"),
        (["convert", source, "--test-fraction", 1.5, *out], "--test-fraction"),
        (
            ["convert", source, "--map", "prompt=q,answer=a", "--kind", "k", "--test-fraction", 0.9, *out],
            "--test-fraction 0.9 leaves nothing to train on: there is 1 row",
        ),
        (["convert", twins, "--test-size", 1, *out], "--test-size 1 leaves nothing to train on: there are 2 rows"),
        (["convert", tmp_path / "twice.csv", *out], "has the column 'answer' more than once"),
        (["convert", tmp_path / "s.xlsx", *out], "pandas writes them"),
        (["convert", source, "--map", "prompt=q,answer=a", "--kind", "k", "--test-size", -1, *out], "0 or more"),
        (["convert", source, "--keep", "level,dataset", *out], "--keep: dataset would overwrite"),
        (
            ["convert", source, "--map", "prompt=q,answer=a", "--kind", "k", "--test-source", empty, *out],
            "nothing to convert in " + str(empty),
        ),
        (["convert", source], "--out"),
        (["convert", source, "--tset-size", 1, *out], "--tset-size"),
    ]:
        assert complaint in refusal(capsys, *arguments)
    assert not (tmp_path / "out").exists()


def test_files_are_replaced_whole_or_left_alone(tmp_path, capsys):
    good = write(tmp_path / "g.jsonl", [{"prompt": f"q{i}", "answer": i} for i in range(10)])
    prepare(tmp_path / "out", "convert", good, "--kind", "exact")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert set(before) == {"train.jsonl", "test.jsonl"}
    capsys.readouterr()
    unreadable = write(tmp_path / "u.jsonl", [{"prompt": "a\u0000b", "answer": 1}])
    again = ["--kind", "exact", "--out", tmp_path / "out"]
    assert "has train.jsonl and test.jsonl already" in refusal(capsys, "convert", good, *again)
    assert "NUL" in refusal(capsys, "convert", unreadable, *again, "--replace")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    prepare(tmp_path / "out", "convert", good, "--kind", "exact", "--test-fraction", 0, "--replace")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["train.jsonl"]  # no stale test split


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data sets are not here")
def test_the_layout_is_that_of_the_published_split():
    real = json.loads((SHARED / "sciknoweval" / "chemistry_test.jsonl").open().readline())
    assert list(real) == FIELDS
    question, _, options = real["prompt"].partition("\n\n")
    from megatron_srpo.commands.prepare_data import sciknoweval_rows

    texts = [line[3:] for line in options.splitlines()[:4]]
    (row,) = sciknoweval_rows({"chemistry"}, "L3")(
        science(1, question=question, choices={"text": texts, "label": list("ABCD")}, answerKey=real["answer"])
    )
    assert (row["prompt"], row["answer"], row["kind"]) == (real["prompt"], real["answer"], real["kind"])


def test_rows_that_differ_in_the_system_message_are_no_duplicates_and_stay_in_one_split(tmp_path):
    rows = [{"prompt": f"q{n}", "answer": "1", "system": system} for n in range(20) for system in ("a", "b", "a")]
    source = write(tmp_path / "s.jsonl", rows)
    train, test = prepare(tmp_path / "out", "convert", source, "--kind", "exact", "--test-size", 5)
    assert len(train + test) == 40 and len(test) == 6  # 20 prompts under two system messages each
    assert {row["prompt"] for row in train}.isdisjoint(row["prompt"] for row in test)
    held_out = write(tmp_path / "t.jsonl", [{"prompt": "q3", "answer": "1", "system": "c"}])
    train, _ = prepare(tmp_path / "o2", "convert", source, "--kind", "exact", "--test-source", held_out)
    assert len(train) == 38 and "q3" not in {row["prompt"] for row in train}


def test_parquet_types_without_a_json_form_become_text_or_are_skipped_and_counted(tmp_path, capsys):
    day = datetime.datetime(2026, 11, 29, 7, 30)
    table = {
        "prompt": ["a", "b", "c"],
        "answer": [1.5, float("nan"), 2.0],
        "day": [day, day, day],
        "price": [decimal.Decimal("1.50")] * 3,
        "raw": [{"at": day.date(), "more": [b"x"]}, None, None],
    }
    parquet.write_table(pa.table(table), tmp_path / "s.parquet")
    options = ("--kind", "exact", "--test-size", 0)
    train, _ = prepare(tmp_path / "out", "convert", tmp_path / "s.parquet", *options, "--keep", "day,price")
    assert [(row["prompt"], row["answer"], row["day"], row["price"]) for row in train] == [
        ("a", 1.5, "2026-11-29T07:30:00", "1.50"), ("c", 2.0, "2026-11-29T07:30:00", "1.50")
    ]  # fmt: skip
    assert "skipped 1: 'answer' is NaN or infinite, which has no JSON form (first" in capsys.readouterr().out
    prepare(tmp_path / "o2", "convert", tmp_path / "s.parquet", *options, "--keep", "raw")
    assert "'raw.more' is of the type bytes" in capsys.readouterr().out


# ---- SDPO's repository -----------------------------------------------------------------------------------------------


def sdpo_row(index, prompt, kind="mcq", **changes):
    system = None if kind == "tooluse" else "\nGiven a question and four options …\n"
    row = {"idx": index, "kind": kind, "dataset": "d", "answer": "A", "elo": 1500, "prompt": prompt}
    return {**row, "description": prompt, "tests": "-", "embedding": [], "system": system, **changes}


def sdpo_folder(root, **benchmarks):
    """A folder like that of SDPO's repository: JSON Lines that are named .json."""
    for name, splits in benchmarks.items():
        folder = root / (name if name == "tooluse" else f"sciknoweval/{name}")
        folder.mkdir(parents=True)
        for split, rows in splits.items():
            write(folder / f"{split}.json", rows)
    return root


def test_sdpos_data_sets_keep_their_splits_their_order_and_every_character_of_their_prompts(tmp_path, capsys):
    prompts = ["  two  spaces\n", "Ünï \u2028 cödé", "same", "same"]
    source = sdpo_folder(
        tmp_path / "datasets",
        material={
            "train": [sdpo_row(i, text) for i, text in enumerate([*prompts, "in both"])],
            "test": [sdpo_row(9, "in both"), sdpo_row(7, "other")],
        },
        tooluse={"test": [sdpo_row(0, "Use a tool", "tooluse", answer='[{"Action": "a", "Action_Input": "{}"}]')]},
    )
    assert main(["sdpo", str(source), "--out", str(tmp_path / "out")]) == 0
    train, test = read(tmp_path / "out/materials", "train"), read(tmp_path / "out/materials", "test")
    assert [row["prompt"] for row in train] == prompts and [row["idx"] for row in test] == [9, 7]
    assert all(list(row) == FIELDS and row["system"].startswith("\nGiven") for row in train + test)
    (tool,) = read(tmp_path / "out/tooluse", "test")
    assert tool["system"] is None and not (tmp_path / "out/tooluse/train.jsonl").exists()
    said = capsys.readouterr().out
    assert "materials: 4 train rows, 2 test rows" in said
    assert "1 of 5 train rows dropped: their prompt is in the test split" in said
    assert "has train.jsonl and test.jsonl already" in refusal(capsys, "sdpo", source, "--out", tmp_path / "out")
    assert "no train split: " in said and "not in " in said and "sciknoweval/physics" in said


def test_what_is_not_sdpos_data_is_refused_with_what_is_expected(tmp_path, capsys):
    told = refusal(capsys, "sdpo", tmp_path, "--out", tmp_path / "out")
    assert "expected the folder `datasets` of SDPO's repository" in told
    source = sdpo_folder(tmp_path / "datasets", physics={"train": [sdpo_row(0, "q"), {"idx": 1, "prompt": "p"}]})
    told = refusal(capsys, "sdpo", source, "--out", tmp_path / "out")
    assert "train.json: expected rows as in SDPO's repository: 1: no field 'kind' (first " in told
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data sets are not here")
def test_the_real_splits_have_the_papers_sizes_but_for_the_prompt_that_is_in_both(tmp_path, capsys):
    source = tmp_path / "datasets"
    for name in ("chemistry", "material"):
        (source / "sciknoweval" / name).mkdir(parents=True)
        for split in ("train", "test"):
            (source / f"sciknoweval/{name}/{split}.json").symlink_to(SHARED / f"sciknoweval/{name}_{split}.jsonl")
    assert main(["sdpo", str(source), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "chemistry: 1890 train rows, 210 test rows" in said and "materials: 840 train rows, 94 test rows" in said
    assert "1 of 841 train rows dropped" in said
    given = [json.loads(line) for line in (SHARED / "sciknoweval/chemistry_train.jsonl").open(encoding="utf-8")]
    assert read(tmp_path / "out/chemistry", "train") == [{name: row[name] for name in FIELDS} for row in given]


def test_a_json_file_that_is_json_lines_is_converted_like_a_jsonl_file(tmp_path):
    rows = [science(number) for number in range(20)]
    lines = write(tmp_path / "lines.json", rows)
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1))
    given = [prepare(tmp_path / f"o{i}", "sciknoweval", path) for i, path in enumerate([lines, tmp_path / "list.json"])]
    assert given[0] == given[1] and len(given[0][0]) == 18


def test_rows_of_verl_and_slime_are_read_with_what_their_reward_functions_need(tmp_path):
    verl = [
        {
            "data_source": "gsm8k", "prompt": [{"role": "user", "content": f"{n} + 1?"}], "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(n + 1)}, "extra_info": {"index": n, "split": "train"},
        }
        for n in range(3)
    ]  # fmt: skip
    parquet.write_table(pa.Table.from_pylist(verl), tmp_path / "verl.parquet")
    train, _ = prepare(tmp_path / "v", "convert", tmp_path / "verl.parquet", "--kind", "math", "--test-size", 0)
    assert [row["answer"] for row in train] == ["1", "2", "3"] and train[0]["prompt"] == verl[0]["prompt"]
    assert (train[1]["data_source"], train[1]["extra_info"]) == ("gsm8k", {"index": 1, "split": "train"})
    slime = write(tmp_path / "slime.jsonl", [{"prompt": "2 + 2?", "label": "4", "metadata": {"level": 1}}])
    train, _ = prepare(tmp_path / "s", "convert", slime, "--kind", "math", "--test-size", 0)
    assert (train[0]["answer"], train[0]["metadata"]) == ("4", {"level": 1})


def test_a_long_value_in_a_csv_file_is_read(tmp_path):
    (tmp_path / "t.csv").write_text(f"prompt,answer\n{'x' * 300_000},4\n")
    train, _ = prepare(tmp_path / "out", "convert", tmp_path / "t.csv", "--kind", "exact", "--test-size", 0)
    assert len(train[0]["prompt"]) == 300_000


def test_csv_rows_are_text_and_a_row_of_another_length_is_counted(tmp_path, capsys):
    (tmp_path / "t.csv").write_text('\ufeffquestion,answer,level\n"2 + 2,\nwhich is?",4,\nx,5\n', encoding="utf-8")
    train, _ = prepare(
        tmp_path / "out", "convert", tmp_path / "t.csv", "--map", "prompt=question", "--keep", "level",
        "--kind", "exact", "--test-size", 0,
    )  # fmt: skip
    assert [(row["prompt"], row["answer"], row["level"]) for row in train] == [("2 + 2,\nwhich is?", "4", None)]
    assert "skipped 1: more or fewer values than the header has (first" in capsys.readouterr().out
