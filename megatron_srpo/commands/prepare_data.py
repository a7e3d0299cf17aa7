"""Turns data sets as users download them into the trainer's rows: train.jsonl and test.jsonl.

    python -m megatron_srpo prepare-data sdpo SDPO/datasets --out data/sdpo
    python -m megatron_srpo prepare-data sciknoweval SciKnowEval/data --domain chemistry --out data/chemistry
    python -m megatron_srpo prepare-data toolalpaca ToolAlpaca/data/train_data.json \
        --test-source ToolAlpaca/data/eval_simulated.json --out data/tooluse
    python -m megatron_srpo prepare-data convert x.parquet --kind math --out data/x \
        --map prompt=question,answer=solution.final
    python -m megatron_srpo prepare-data convert gsm8k_of_verl.parquet --kind math --out data/gsm8k \
        --system "Put the final answer in \\boxed{}, not behind ####."

`convert` reads jsonl, json, parquet, csv and saved data sets. Dots lead into nested columns. Without --map it finds the
answer of verl's rows (reward_model.ground_truth) and of slime's (label), and keeps verl's data_source and extra_info
and slime's metadata. Existing files are replaced with --replace only.

A row has idx, kind, dataset, system, prompt, answer. Rows with the same prompt and system message are kept once. Rows
with the same prompt are in the same split, so that no test question is trained on. The split is drawn from the seed and
the prompt's text alone, so that it does not change with the order of the rows. The files are read back by the trainer's
own loader before they take their names.

`sdpo` is different: it keeps the splits, the prompts and the order of SDPO's repository, which the SRPO paper uses. Use
it to compare results with the papers. The hub's SciKnowEval has other splits and our own prompts.
"""

from __future__ import annotations

import csv
import datetime
import decimal
import hashlib
import json
import math
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_srpo.config import DataConfig
from megatron_srpo.core.atomic import atomic_file
from megatron_srpo.core.errors import UserError
from megatron_srpo.data import drop_null_fields, load_rows, look_up, read_records
from megatron_srpo.rewards.registry import RewardError, unknown
from megatron_srpo.rewards.tooluse import expected_calls

MCQ_SYSTEM = (
    "You will get a multiple-choice question. Think it through, choose one option, and reply in this form:\n"
    "<reasoning>\n(your reasoning)\n</reasoning>\n<answer>\n(the letter of your option)\n</answer>\n\n"
    "Between <answer> and </answer> write the letter alone, without the text of the option. "
    "To choose option A, for example:\n<answer>\nA\n</answer>"
)
MCQ_REQUEST = "Please reason step by step."
TOOLUSE_HEAD = "Answer the user's question with the tools that are listed here.\nThe tools:"
TOOLUSE_FORMAT = (
    "Write every call in this format:\n"
    "Thought: what you want to do, and why\n"
    "Action: the name of one of the tools\n"
    "Action Input: its input as a JSON object. Take every value from the user's question, and make none up.\n\n"
    "Begin!"
)
DOMAINS = ("biology", "chemistry", "material", "physics")
LEVELS = ("L1", "L2", "L3", "L4", "L5", "all")
RESULTS = ("train.jsonl", "test.jsonl")
READABLE = (".jsonl", ".ndjson", ".parquet", ".json", ".csv")
ANSWERS = ("answer", "reward_model.ground_truth", "label", "ground_truth")  # where other projects have the answer
KEPT = ("data_source", "extra_info", "metadata")  # what their reward functions read
LONGEST_FIELD = 2**31 - 1  # characters of a value in a csv file; Python's own limit is 131,072
LONGEST_CALL_SEQUENCE = 5  # ToolAlpaca's own limit for training instances

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__.split("\n\n")[0], rich_markup_mode=None)


class Skip(Exception):
    """A source row that is not converted: the reason, which is counted, and what is told of the first such row."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.detail = detail


@dataclass
class Converted:
    """Rows without idx, what was skipped and why."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    skipped: Counter = field(default_factory=Counter)
    places: dict[str, str] = field(default_factory=dict)  # reason → the first row that was skipped for it

    def add(self, records: Iterable[tuple[str, Any]], convert: Callable[[Any], Iterator[dict[str, Any]]]) -> None:
        for place, record in records:
            for skip in self._convert(record, convert):
                self.skipped[str(skip)] += 1
                self.places.setdefault(str(skip), place + skip.detail)

    def _convert(self, record: Any, convert: Callable[[Any], Iterator[dict[str, Any]]]) -> Iterator[Skip]:
        """Keep the record's rows; yields those that are skipped."""
        try:
            if isinstance(record, Exception):
                raise Skip(str(record))
            if not isinstance(record, dict):
                raise Skip("not an object")
            for row in convert(record):
                if isinstance(row, Skip):
                    yield row
                else:
                    self.rows.append({name: as_json(value, name) for name, value in row.items()})
        except Skip as skip:
            yield skip
        except KeyError as error:
            yield Skip(f"no field {error}")
        except (TypeError, AttributeError, IndexError, ValueError) as error:
            yield Skip(f"not of the expected form ({error})")

    def why(self, most: int) -> list[str]:
        """The commonest reasons: how often, and where first."""
        return [f"{count}: {reason} (first {self.places[reason]})" for reason, count in self.skipped.most_common(most)]


def as_json(value: object, name: str) -> Any:
    """A value of a table as JSON: dates and times in ISO form, decimal numbers and UUIDs as text. Raises Skip for what
    has no JSON form, such as bytes and NaN."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if (isinstance(value, decimal.Decimal) and value.is_finite()) or isinstance(value, uuid.UUID):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): as_json(one, f"{name}.{key}") for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(one, name) for one in value]
    what = "NaN or infinite" if isinstance(value, float | decimal.Decimal) else f"of the type {type(value).__name__}"
    raise Skip(f"{name!r} is {what}, which has no JSON form")


def read_source(path: Path, results: Collection[Path] = ()) -> Iterator[tuple[str, Any]]:
    """(place, record) of every row of a file, of all files in a folder but `results` (absolute paths, which this or an
    earlier conversion writes), or of a data set saved by `datasets`."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder (looked from {Path.cwd()})")
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        yield from _read_saved(path)
    elif path.is_dir():
        found = (file for file in path.rglob("*") if file.suffix.lower() in READABLE)
        files = sorted(file for file in found if file.resolve() not in results)
        if not files:
            raise UserError(f"no {', '.join(READABLE)} files in {path}")
        for file in files:
            yield from read_source(file)
    elif path.suffix.lower() == ".csv":
        yield from _read_csv(path)
    elif path.suffix.lower() in READABLE:
        yield from read_records(path)
    else:
        raise UserError(
            f"{path}: expected {', '.join(READABLE)}; of another kind of table, pandas writes them: "
            'pandas.read_excel("x.xlsx").to_parquet("x.parquet")'
        )


def _read_csv(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows of a table with a header. Every value is text; an empty one counts as missing."""
    csv.field_size_limit(LONGEST_FIELD)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, strict=True)
            twice = [name for name, count in Counter(rows.fieldnames or ()).items() if name and count > 1]
            if twice:
                raise UserError(f"{path}: has the column {twice[0]!r} more than once; rename one of them")
            for record in rows:
                if None in record or None in record.values():
                    yield f"{path}:{rows.line_num}", ValueError("more or fewer values than the header has")
                else:
                    yield f"{path}:{rows.line_num}", {name: value or None for name, value in record.items()}
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a csv file in UTF-8: {error}") from None


def _read_saved(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        import datasets
    except ImportError:
        raise UserError(f"{path} is a saved Hugging Face data set: pip install datasets") from None
    saved = datasets.load_from_disk(str(path))
    if isinstance(saved, datasets.DatasetDict):
        raise UserError(f"{path} holds several splits: name one, e.g. {path / sorted(saved)[-1]} (and --test-source)")
    for index, record in enumerate(saved, 1):
        yield f"{path}:row {index}", drop_null_fields(record)


def sciknoweval_rows(domains: set[str], level: str) -> Callable[[dict], Iterator[dict[str, Any]]]:
    """Rows of the hub's SciKnowEval: {"question", "choices": {"text", "label"}, "answerKey", "type", "domain",
    "details": {"level"}}."""

    def convert(record: dict) -> Iterator[dict[str, Any]]:
        if not str(record["type"]).startswith("mcq"):
            raise Skip("not multiple choice")
        if level != "all" and record["details"]["level"] != level:
            raise Skip(f"not of level {level}")
        if _domain(record["domain"]) not in domains:
            raise Skip("of another domain")
        texts, labels = record["choices"]["text"], record["choices"]["label"]
        letters = all(isinstance(one, str) and len(one) == 1 and "A" <= one <= "Z" for one in labels)
        if not letters or len(set(labels)) != len(labels) or len(texts) != len(labels):
            raise Skip("options without a letter each")
        if record["answerKey"] not in labels:
            raise Skip("no right option")
        options = "\n".join(f"{label}: {text.strip()}" for label, text in zip(labels, texts, strict=True))
        prompt = f"{record['question'].strip()}\n\n{options}\n{MCQ_REQUEST}"
        yield _row("mcq", "sciknoweval", MCQ_SYSTEM, prompt, record["answerKey"])

    return convert


def _domain(name: str) -> str:
    name = name.strip().lower()
    return "material" if name.startswith("material") else name


def toolalpaca_rows(record: dict) -> Iterator[dict[str, Any] | Skip]:
    """Rows of one API of ToolAlpaca: its "Instructions" with "Golden_Answers" (the evaluation files), or what its
    "Instances" did (the training file)."""
    functions = {
        name: text for name, text in (record.get("Function_Description") or {}).items() if name != "components"
    }
    documentation = record.get("NLDocumentation") or "\n".join(f"{name}: {text}" for name, text in functions.items())
    if not documentation:
        raise Skip("an API without documentation")
    head = f"{TOOLUSE_HEAD}\nName: {record['Name']}\nDescription: {record['Description']}\nDocumentation:\n"
    head += f"{documentation.rstrip()}\n\n{TOOLUSE_FORMAT}\nQuestion: "
    for question, calls in _questions(record):
        try:
            answer = _checked_calls(calls, set(functions))
        except Skip as reason:
            yield reason
        else:
            yield _row("tooluse", "tooluse", None, head + question.strip(), answer)


def _questions(record: dict) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """(question, calls) of an API."""
    if "Golden_Answers" in record:
        yield from zip(record["Instructions"], record["Golden_Answers"], strict=True)
        return
    for instance in record.get("Instances", []):
        steps = instance.get("intermediate_steps") or []
        calls = [{"Action": step[0][0], "Action_Input": step[0][1]} for step in steps]
        yield instance.get("input", "").rpartition("\nHint: ")[0] or instance.get("input", ""), calls


def _checked_calls(calls: list[dict[str, str]], functions: set[str]) -> str:
    """The calls as the answer of a row; Skip where the reward could not judge by them."""
    names = {call["Action"] for call in calls}
    if not calls or len(calls) > LONGEST_CALL_SEQUENCE:
        raise Skip(f"not 1 to {LONGEST_CALL_SEQUENCE} calls")
    if names == {"getDetails"}:  # ToolAlpaca's way to ask back: no call of the API
        raise Skip("only asks back")
    if functions and names - functions - {"getDetails"}:
        raise Skip("a call of an unknown function")
    try:
        expected_calls(calls)
    except RewardError:
        raise Skip("a call whose input is no JSON object") from None
    return json.dumps(calls, ensure_ascii=False)


def mapped_rows(
    fields: dict[str, str], *, kind: str, dataset: str, system: str, keep: list[str]
) -> Callable[[dict], Iterator[dict[str, Any]]]:
    """Rows of any data set: `fields` maps our fields to its own, dots lead into objects. An answer that `fields` does
    not map is looked for under the names of ANSWERS."""

    def convert(record: dict) -> Iterator[dict[str, Any]]:
        found = (name for name in ANSWERS if look_up(record, name) is not None)
        names = {"answer": next(found, "answer"), **fields}
        values = {ours: look_up(record, theirs) for ours, theirs in names.items()}
        for name in ("prompt", "answer"):
            if values[name] is None or values[name] == "":
                has = ", ".join(sorted(map(str, record)))
                raise Skip(f"no {names[name]!r}; --map {name}=FIELD names it", f", which has {has[:200]}")
        row_kind = values.get("kind") or kind
        if not row_kind:
            raise Skip("no kind; give --kind NAME, or --map kind=FIELD")
        row = _row(row_kind, dataset, values.get("system") or system or None, values["prompt"], values["answer"])
        also = [name for name in KEPT if name in record and name not in keep]
        yield {**row, **{name: look_up(record, name) for name in [*keep, *also]}}

    return convert


def _row(kind: str, dataset: str, system: str | None, prompt: object, answer: object) -> dict[str, Any]:
    return {"kind": kind, "dataset": dataset, "system": system, "prompt": prompt, "answer": answer}


def prompt_key(row: dict[str, Any]) -> str:
    """What makes two prompts equal: their words. Case counts: it tells one molecule from another."""
    prompt = row["prompt"] if isinstance(row["prompt"], str) else json.dumps(row["prompt"], sort_keys=True)
    return " ".join(prompt.split())


def unique(rows: list[dict[str, Any]], taken: Iterable[str] = ()) -> tuple[list[dict[str, Any]], int]:
    """(the first row of each prompt and system message, number of rows left out). Rows whose prompt is `taken` are left
    out whatever their system message is."""
    seen, others, kept = set(), set(taken), []
    for row in rows:
        key = prompt_key(row), " ".join(str(row["system"] or "").split())
        if key[0] not in others and key not in seen:
            seen.add(key)
            kept.append(row)
    return kept, len(rows) - len(kept)


def split(rows: list[dict[str, Any]], test_size: int, seed: int) -> tuple[list[dict], list[dict]]:
    """(train, test) in the given order. A row's lot is a hash of the seed and its prompt; rows with one prompt stay
    together, so that the test split may have a few rows more."""
    lots = [hashlib.sha256(f"{seed}:{prompt_key(row)}".encode()).digest() for row in rows]
    drawn = set(sorted(lots)[:test_size])
    pairs = list(zip(rows, lots, strict=True))
    return [row for row, lot in pairs if lot not in drawn], [row for row, lot in pairs if lot in drawn]


def write_splits(folder: Path, splits: dict[str, list[dict[str, Any]]]) -> None:
    """`folder`/<name>.jsonl for each split, complete or not at all; read back before they take their names. A split
    without rows has no file."""
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as all_or_none:  # a file takes its name only when every split has been read back
        for name, rows in splits.items():
            if not rows:
                continue
            part = all_or_none.enter_context(atomic_file(folder / f"{name}.jsonl", durable=True))
            with part.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            load_rows(str(part), DataConfig(train=str(part)))
    for name, rows in splits.items():
        if not rows:
            (folder / f"{name}.jsonl").unlink(missing_ok=True)


@dataclass
class Wanted:
    """Where the result goes and how it is split."""

    out: Path
    test_fraction: float | None
    test_size: int | None
    seed: int
    replace: bool = False

    def __post_init__(self) -> None:
        present = [name for name in RESULTS if (self.out / name).exists()]
        if present and not self.replace:
            raise UserError(
                f"--out {self.out}: has {' and '.join(present)} already; name another folder, or replace it: --replace"
            )
        if self.out.exists() and not self.out.is_dir():
            raise UserError(f"--out {self.out}: is a file; name a folder, which may not exist yet")
        if self.test_fraction is not None and self.test_size is not None:
            raise UserError("--test-fraction and --test-size exclude each other: give one")
        if self.test_fraction is not None and not 0 <= self.test_fraction < 1:
            raise UserError(f"--test-fraction: expected a number from 0 to below 1, got {self.test_fraction}")
        if self.test_size is not None and self.test_size < 0:
            raise UserError(f"--test-size: expected a number of rows, 0 or more, got {self.test_size}")

    def test_rows(self, count: int) -> int:
        if self.test_size is None:
            return round(count * (0.1 if self.test_fraction is None else self.test_fraction))
        if self.test_size >= count:
            raise UserError(self.leaves_nothing(count))
        return self.test_size

    def leaves_nothing(self, count: int) -> str:
        """The complaint about a test split that takes all rows; those with the same prompt are not divided."""
        given = f"--test-fraction {self.test_fraction}" if self.test_size is None else f"--test-size {self.test_size}"
        there = "there is 1 row" if count == 1 else f"there are {count} rows, and those with one prompt stay together"
        return f"{given} leaves nothing to train on: {there}; give a smaller one, or --test-source"


def prepare(
    sources: list[Path], test_sources: list[Path], convert: Callable[[Any], Iterator[Any]], wanted: Wanted
) -> None:
    """Convert, drop duplicates, split, number, write, and say what was done."""
    main, held_out = Converted(), Converted()
    for converted, source in [*((main, one) for one in sources), *((held_out, one) for one in test_sources)]:
        converted.add(read_source(source, [wanted.out.resolve() / name for name in RESULTS]), convert)
    test, repeated_test = unique(held_out.rows)
    train, repeated = unique(main.rows, map(prompt_key, test))
    for given, part in ((sources, main), (test_sources, held_out)):
        if given and not part.rows:
            why = "; ".join(part.why(5)) or "there are no rows"
            raise UserError(f"nothing to convert in {', '.join(map(str, given))}: {why}")
    if not train:
        raise UserError(f"all {repeated} rows are in the test split as well: nothing is left to train on")
    if not test_sources:
        count = len(train)
        train, test = split(train, wanted.test_rows(count), wanted.seed)
        if not train:
            raise UserError(wanted.leaves_nothing(count))
    for row_number, row in enumerate([*train, *test]):
        row["idx"] = row_number
    splits = {name: [{"idx": row["idx"], **row} for row in rows] for name, rows in (("train", train), ("test", test))}
    write_splits(wanted.out, splits)
    typer.echo(f"{wanted.out}: {len(train)} train rows, {len(test)} test rows; {repeated + repeated_test} duplicates")
    if not test:
        typer.echo("  no test split: set eval.every = 0, or give --test-size or --test-source")
    for reason in [*main.why(10), *held_out.why(10)]:
        typer.echo(f"  skipped {reason}")


# Our name of a benchmark → its folder in the data sets of SDPO's repository.
SDPO_FOLDERS = {
    "biology": "sciknoweval/biology",
    "chemistry": "sciknoweval/chemistry",
    "materials": "sciknoweval/material",
    "physics": "sciknoweval/physics",
    "tooluse": "tooluse",
}


def sdpo_rows(record: dict) -> Iterator[dict[str, Any]]:
    """A row of SDPO's files as it is, without the fields that only its own code reads."""
    yield {name: record[name] for name in ("idx", "kind", "dataset", "system", "prompt", "answer")}


def prepare_sdpo(folder: Path, out: Path, *, replace: bool) -> None:
    """Write every benchmark of SDPO's data sets into a folder of its own; say what was dropped and what is missing."""
    found = {name: folder / where for name, where in SDPO_FOLDERS.items() if (folder / where).is_dir()}
    if not found:
        raise UserError(
            f"{folder}: expected the folder `datasets` of SDPO's repository (github.com/lasgroup/SDPO), with some of "
            f"{', '.join(SDPO_FOLDERS.values())} in it"
        )
    for name in found:
        Wanted(out / name, None, None, 0, replace)  # refuses to overwrite
    for name, source in found.items():
        read = {split: Converted() for split in ("train", "test")}
        for split, part in read.items():
            file = source / f"{split}.json"
            if file.is_file():
                part.add(read_source(file), sdpo_rows)
                if part.skipped or not part.rows:
                    why = "; ".join(part.why(5)) or "there are no rows"
                    raise UserError(f"{file}: expected rows as in SDPO's repository: {why}")
        train, test = (part.rows for part in read.values())
        held_out = {prompt_key(row) for row in test}
        kept = [row for row in train if prompt_key(row) not in held_out]
        write_splits(out / name, {"train": kept, "test": test})
        typer.echo(f"{out / name}: {len(kept)} train rows, {len(test)} test rows")
        if len(kept) < len(train):
            typer.echo(
                f"  {len(train) - len(kept)} of {len(train)} train rows dropped: their prompt is in the test split"
            )
        for split, part in read.items():
            if not part.rows:
                typer.echo(f"  no {split} split: {source / f'{split}.json'} does not exist")
    missing = [where for name, where in SDPO_FOLDERS.items() if name not in found]
    if missing:
        typer.echo(f"not in {folder}: {', '.join(missing)}")


Sources = Annotated[list[Path], typer.Argument(help="files, or folders that are searched for them")]
Out = Annotated[Path, typer.Option(help="folder for train.jsonl and test.jsonl")]
TestSource = Annotated[list[Path], typer.Option(help="the test split, instead of drawing one")]
TestFraction = Annotated[float | None, typer.Option(help="share of the rows for the test split (default 0.1)")]
TestSize = Annotated[int | None, typer.Option(help="rows of the test split")]
Seed = Annotated[int, typer.Option(help="of the split")]
Replace = Annotated[bool, typer.Option("--replace", help="replace the files of an earlier conversion")]


@app.command()
def sdpo(
    folder: Annotated[Path, typer.Argument(help="the folder `datasets` of SDPO's repository")],
    out: Annotated[Path, typer.Option(help="folder for a folder of each benchmark")],
    replace: Replace = False,
) -> None:
    """The five benchmarks of the SDPO and SRPO papers, with their splits and prompts."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; name a folder, which may not exist yet")
    prepare_sdpo(folder, out, replace=replace)


@app.command()
def sciknoweval(
    sources: Sources, out: Out,
    domain: Annotated[list[str], typer.Option(help=f"one or more of {', '.join(DOMAINS)}; default: all")] = [],  # noqa: B006
    level: Annotated[str, typer.Option(help="L1 to L5, or all; L3 is reasoning")] = "L3",
    test_source: TestSource = [], test_fraction: TestFraction = None, test_size: TestSize = None, seed: Seed = 0,  # noqa: B006
    replace: Replace = False,
) -> None:  # fmt: skip
    """SciKnowEval's multiple-choice questions as the hub has them (jsonl or parquet). Splits and prompts are ours, not
    those of the SDPO and SRPO papers."""
    domains = {_domain(one) for one in domain} or set(DOMAINS)
    if domains - set(DOMAINS):
        raise UserError(f"--domain: expected some of {', '.join(DOMAINS)}, got {', '.join(domain)}")
    if level not in LEVELS:
        raise UserError(f"--level: expected one of {', '.join(LEVELS)}, got {level}")
    prepare(
        sources, test_source, sciknoweval_rows(domains, level), Wanted(out, test_fraction, test_size, seed, replace)
    )


@app.command()
def toolalpaca(
    sources: Sources, out: Out,
    test_source: TestSource = [], test_fraction: TestFraction = None, test_size: TestSize = None, seed: Seed = 0,  # noqa: B006
    replace: Replace = False,
) -> None:  # fmt: skip
    """ToolAlpaca's json files: train_data.json, eval_simulated.json, eval_real.json."""
    prepare(sources, test_source, toolalpaca_rows, Wanted(out, test_fraction, test_size, seed, replace))


@app.command()
def convert(
    sources: Sources, out: Out,
    map: Annotated[str, typer.Option(help="OURS=THEIRS,… of prompt, answer, system, kind")] = "",
    kind: Annotated[str, typer.Option(help="the reward of rows that have no kind of their own")] = "",
    dataset: Annotated[str, typer.Option(help="the data set's name (default: that of the first source)")] = "",
    system: Annotated[str, typer.Option(help="system message of rows that have none of their own")] = "",
    keep: Annotated[str, typer.Option(help="other fields to keep, comma-separated")] = "",
    test_source: TestSource = [], test_fraction: TestFraction = None, test_size: TestSize = None, seed: Seed = 0,  # noqa: B006
    replace: Replace = False,
) -> None:  # fmt: skip
    """Any jsonl, json, parquet, csv, or data set saved by Hugging Face datasets; verl's and slime's too.

    Dots lead into nested columns: --map answer=reward_model.ground_truth.
    """
    fields = {"prompt": "prompt", "system": "system", "kind": "kind"}
    for pair in filter(None, map.split(",")):
        ours, _, theirs = (part.strip() for part in pair.partition("="))
        if ours not in (*fields, "answer") or not theirs:
            raise UserError(f"--map: expected OURS=THEIRS with OURS one of prompt, answer, system, kind, got {pair!r}")
        fields[ours] = theirs
    kept = [name.strip() for name in keep.split(",") if name.strip()]
    if reserved := [name for name in kept if name in ("idx", *_row("", "", None, "", ""))]:
        raise UserError(
            f"--keep: {', '.join(reserved)} would overwrite our own field; rename it in the source, or --map it"
        )
    rows = mapped_rows(
        fields, kind=kind, dataset=dataset or sources[0].stem, system=system, keep=kept,
    )  # fmt: skip
    prepare(sources, test_source, rows, Wanted(out, test_fraction, test_size, seed, replace))
    if kind and (problem := unknown(kind, {})):
        typer.echo(f"  note: {problem}")


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code. A user's mistake is one line."""
    try:
        return app(arguments, standalone_mode=False, prog_name="prepare-data") or 0
    except UserError as error:
        typer.echo(f"prepare-data: {error}", err=True)
    except OSError as error:
        typer.echo(f"prepare-data: {error.filename or 'file'}: {error.strerror}", err=True)
    except Exception as error:
        if not hasattr(error, "format_message"):  # typer's own complaints about the command line
            raise
        typer.echo(f"prepare-data: {error.format_message()}", err=True)
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
