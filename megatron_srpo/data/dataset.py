"""Reads the rows of jsonl, json and parquet files as examples. Every error names the file and the line (or row)."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_srpo.config import DataConfig
from megatron_srpo.core.errors import UserError
from megatron_srpo.core.text import clause

if TYPE_CHECKING:
    from pyarrow import RecordBatch

JSONL, JSON, PARQUET = (".jsonl", ".ndjson"), (".json",), (".parquet",)
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # which some editors write
ROLES = ("system", "user", "assistant", "tool")
_REPORTED = 3  # how many skipped rows are reported with their problem
_UNUSABLE = re.compile("[\x00\ud800-\udfff]")


class DataError(UserError):
    """A data set, a row or a tokenizer cannot be used. str() says where, what was expected, what came, and the cure."""


class _BadRow(ValueError):
    """One row cannot be used; str() says why."""


@dataclass(frozen=True)
class Example:
    """One row. `row` counts all rows of the data set from 0, skipped ones too, so that a row keeps its number.

    Example: Example(17, ({"role": "user", "content": "order 53142"},), "12345", "exact", {"level": 2}, "a.jsonl:18")
    """

    row: int
    messages: tuple[dict[str, str], ...]  # chat messages; the last one is the user's (or a tool's)
    answer: object
    kind: str
    metadata: dict[str, object]  # the row's other fields
    source: str  # "file:line"
    solution: str = ""  # the row's worked solution


@dataclass
class LoadReport:
    """The result of loading; str() is the line for the log."""

    rows: int = 0  # usable rows
    files: int = 0
    skipped: int = 0  # rows that cannot be used
    problems: list[str] = field(default_factory=list)  # of the first skipped rows

    def __str__(self) -> str:
        text = f"{self.rows} rows from {self.files} file{'s' * (self.files != 1)}"
        if not self.skipped:
            return text
        more = "; …" if self.skipped > len(self.problems) else ""
        bad = "1 bad row" if self.skipped == 1 else f"{self.skipped} bad rows"
        return f"{text}, {bad} skipped: {'; '.join(self.problems)}{more}"


def load_rows(
    paths: str | list[str], config: DataConfig, unreadable: Callable[[str, object], str | None] = lambda *row: None
) -> tuple[list[Example], LoadReport]:  # fmt: skip
    """The rows of the files, in order.

    `prompt` is text or a list of chat messages. `answer` is any JSON value but null. `kind` comes from the row, or from
    `config.kind` if the row has none. An optional `system` is put before the messages. Other fields become metadata.
    `unreadable` is (kind, answer) → why the reward cannot read the answer, or None.
    A bad row raises DataError, or is skipped and counted if `config.on_bad_row` is "skip". A missing or unreadable
    file, and a data set without a usable row, always raise DataError.
    """
    files = [Path(path).expanduser() for path in ([paths] if isinstance(paths, str) else paths)]
    if not files:
        raise DataError("no data file given: expected .jsonl, .json or .parquet files in data.train")
    examples: list[Example] = []
    report = LoadReport(files=len(files))
    row = 0
    for file in files:
        for place, record in read_records(file):
            try:
                example = _example(record, row, place, config)
                problem = unreadable(example.kind, example.answer)
                if problem:
                    raise _BadRow(problem)
                examples.append(example)
            except _BadRow as bad:
                _complain(f"{place}: {bad}", config, report)
            row += 1
    report.rows = len(examples)
    if not examples:
        raise DataError(_nothing_usable(files, row, report))
    return examples, report


def read_records(file: Path) -> Iterator[tuple[str, Any]]:
    """Yields ("file:line", row) for every row of a .jsonl, .json or .parquet file. In place of a row that cannot be
    read it yields an exception object. A .json file is JSON Lines or one list of rows. DataError if the file as a whole
    cannot be read."""
    if file.is_dir():
        raise DataError(f"{file} is a folder: name its .jsonl, .json or .parquet files")
    suffix = file.suffix.lower()
    if suffix not in JSONL + JSON + PARQUET:
        raise DataError(
            f"{file}: expected a .jsonl, .json or .parquet file (python -m megatron_srpo prepare-data makes them)"
        )
    if not file.is_file():
        raise DataError(_missing(file))
    try:
        if suffix in PARQUET:
            yield from _read_parquet(file)
        elif suffix in JSON and not _is_json_lines(file):
            yield from _read_list(file)
        else:
            yield from _read_jsonl(file)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}") from error


def _is_json_lines(file: Path) -> bool:
    """Whether the first line that is not blank is a JSON object by itself. Data sets are often JSON Lines that are
    named .json."""
    with file.open("rb") as lines:
        for line in lines:
            if line.removeprefix(BYTE_ORDER_MARK).strip():
                return isinstance(_parse(line.removeprefix(BYTE_ORDER_MARK)), dict)
    return True  # no row: the caller says so


def _read_list(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise DataError(f"{file} is not JSON: expected JSON Lines or one list of rows: {error}") from None
    if not isinstance(content, list):
        raise DataError(f"{file}: expected JSON Lines or one list of rows, got {_type(content)}")
    for number, record in enumerate(content, 1):
        yield f"{file}:item {number}", record


def _read_jsonl(file: Path) -> Iterator[tuple[str, Any]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if number == 1:
                line = line.removeprefix(BYTE_ORDER_MARK)
            if line.strip():
                yield f"{file}:{number}", _parse(line)


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8").rstrip("\r\n"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        return _BadRow(f"not UTF-8: byte 0x{line[error.start]:02x} at column {error.start + 1}")
    except json.JSONDecodeError as error:
        return _BadRow(f"not JSON: {error.msg.removesuffix(' at')} at column {error.colno}")
    except RecursionError:
        return _BadRow("nested too deeply")
    except ValueError as error:
        return _BadRow(f"not JSON: {error}")


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is no JSON value (write null)")


def _read_parquet(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(f"{file}: parquet files need pyarrow: pip install pyarrow") from error
    number = 0
    try:
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=1024):
            for record in _rows(batch):
                number += 1
                yield f"{file}:row {number}", record
    except pyarrow.ArrowException as error:
        raise DataError(f"{file} is not a readable parquet file: {str(error).splitlines()[0]}") from error


def _rows(batch: RecordBatch) -> list[Any]:
    try:
        return [drop_null_fields(row) for row in batch.to_pylist()]
    except UnicodeDecodeError:  # one row is broken: find out which
        return [_row(batch.slice(index, 1)) for index in range(batch.num_rows)]


def _row(batch: RecordBatch) -> Any:
    try:
        return drop_null_fields(batch.to_pylist()[0])
    except UnicodeDecodeError:
        return _BadRow("a text is not UTF-8")


def drop_null_fields(row: dict[str, Any]) -> dict[str, Any]:
    """A row of an Arrow table without the null fields of its objects: Arrow gives all objects of a column the same
    fields, and cannot tell a field that was absent from null. The row's own fields stay."""
    return {name: _without_nulls(value) for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(part) for name, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


def _example(record: object, row: int, place: str, config: DataConfig) -> Example:
    if isinstance(record, _BadRow):
        raise record
    if not isinstance(record, dict):
        raise _BadRow(f"expected an object with {config.prompt_key!r} and {config.answer_key!r}, got {_type(record)}")
    messages = _messages(_required(record, "prompt", config.prompt_key), look_up(record, config.system_key), config)
    answer = _required(record, "answer", config.answer_key)
    if isinstance(answer, str):
        _check_text(answer, config.answer_key)
    if isinstance(answer, float) and not math.isfinite(answer):
        raise _BadRow(f"{config.answer_key!r} is {answer}: expected text, a number or another JSON value")
    used = {config.prompt_key, config.answer_key, config.kind_key, config.system_key, config.solution_key}
    metadata = {name: value for name, value in record.items() if name not in used}
    solution = look_up(record, config.solution_key) if config.solution_key else None
    text = "" if solution is None else _text(solution, config.solution_key)
    return Example(row, messages, answer, _kind(record, config), metadata, place, text)


def look_up(record: object, key: str) -> Any:
    """The field `key` of a row, or None. If there is no such field, dots lead into objects:
    reward_model.ground_truth."""
    if not isinstance(record, dict):
        return None
    if key in record:
        return record[key]
    first, _, rest = key.partition(".")
    return look_up(record.get(first), rest) if rest else None


def _required(record: dict[str, object], name: str, key: str) -> object:
    value = look_up(record, key)
    if value is None:
        if key in record:
            raise _BadRow(f"{key!r} is null")
        present = sorted(map(str, record))
        nearest = difflib.get_close_matches(key, present, n=1)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        raise _BadRow(f"no field {key!r} (has: {', '.join(present)[:200]}).{hint} data.{name}_key sets its name")
    return value


def _kind(record: dict[str, object], config: DataConfig) -> str:
    kind = look_up(record, config.kind_key)
    kind = config.kind if kind is None or kind == "" else kind
    if not isinstance(kind, str):
        raise _BadRow(f"{config.kind_key!r}: expected the name of a reward, got {_type(kind)}")
    if not kind.strip():
        raise _BadRow(f"no field {config.kind_key!r}, and data.kind is empty: name the reward that scores these rows")
    return kind


def _messages(prompt: object, system: object, config: DataConfig) -> tuple[dict[str, str], ...]:
    key = config.prompt_key
    prompt = _written_messages(prompt)
    if isinstance(prompt, str):
        messages = [{"role": "user", "content": _text(prompt, key)}]
    elif isinstance(prompt, list) and prompt:
        messages = [_message(one, f"{key}[{index}]") for index, one in enumerate(prompt)]
    else:
        raise _BadRow(f"{key!r}: expected text or a list of chat messages, got {_type(prompt)}")
    if messages[-1]["role"] not in ("user", "tool") or all(message["role"] != "user" for message in messages):
        raise _BadRow(f"{key!r}: expected the last message to be the user's, got {messages[-1]['role']!r}")
    if system is not None and system != "":
        if messages[0]["role"] == "system":
            raise _BadRow(f"a system message in both {config.system_key!r} and {key!r}: keep one")
        messages.insert(0, {"role": "system", "content": _text(system, config.system_key)})
    return tuple(messages)


def _written_messages(prompt: object) -> object:
    """The chat messages of a text that is their JSON, as data sets in parquet have them; any other prompt as it is."""
    if not isinstance(prompt, str) or not prompt.lstrip().startswith("["):
        return prompt
    try:
        messages = json.loads(prompt)
    except (ValueError, RecursionError):
        return prompt
    are_messages = isinstance(messages, list) and all(
        isinstance(m, dict) and {"role", "content"} <= set(m) for m in messages
    )
    return messages if messages and are_messages else prompt


def _message(message: object, place: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise _BadRow(f"{place}: expected a message with 'role' and 'content', got {_type(message)}")
    role = message.get("role")
    if role not in ROLES:
        raise _BadRow(f"{place}: expected 'role' to be one of {', '.join(ROLES)}, got {role!r:.40}")
    return {"role": role, "content": _text(message.get("content"), f"{place}.content")}


def _text(value: object, place: str) -> str:
    if not isinstance(value, str):
        raise _BadRow(f"{place!r}: expected text, got {_type(value)}")
    if not value.strip():
        raise _BadRow(f"{place!r} is empty")
    _check_text(value, place)
    return value


def _check_text(value: str, place: str) -> None:
    unusable = _UNUSABLE.search(value)
    if unusable:
        what = "a NUL character" if unusable.group() == "\x00" else "half of a surrogate pair"
        raise _BadRow(f"{place!r} holds {what} at character {unusable.start() + 1}, which no tokenizer reads")


def _type(value: object) -> str:
    names: dict[type, str] = {dict: "an object", list: "a list", str: "text", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def _complain(problem: str, config: DataConfig, report: LoadReport) -> None:
    if config.on_bad_row == "error":
        raise DataError(f'{clause(problem)}. Correct the row, or skip bad rows: data.on_bad_row = "skip"')
    report.skipped += 1
    if len(report.problems) < _REPORTED:
        report.problems.append(problem)


def _nothing_usable(files: list[Path], rows: int, report: LoadReport) -> str:
    names = ", ".join(map(str, files))
    if not rows:
        return f"the data set is empty: no rows in {names}"
    return f"no usable row among {rows} in {names}: {'; '.join(report.problems)}"


def _missing(file: Path) -> str:
    beside = [one.name for one in file.parent.glob("*") if one.suffix.lower() in JSONL + JSON + PARQUET]
    nearest = difflib.get_close_matches(file.name, beside, n=1)
    return f"data file not found: {file}" + (f"; did you mean {file.parent / nearest[0]}?" if nearest else "")
