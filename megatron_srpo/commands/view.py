"""Shows responses of a run, or of an evaluation, in the terminal.

    python -m megatron_srpo view RUN                            # a prompt of the newest iteration
    python -m megatron_srpo view RUN --iteration 12 --branch sdpo --teacher --prompts 4
    python -m megatron_srpo view RUN/eval/test.jsonl --wrong    # the file that `eval` writes

It reads rollouts.jsonl; docs/metrics.md explains its fields. Exit codes: 0 shown, 2 a mistake.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from pydantic import BaseModel, JsonValue, ValidationError
from rich.console import Console
from rich.text import Text

from megatron_srpo.core.errors import UserError
from megatron_srpo.core.text import visible
from megatron_srpo.observe.observer import ROLLOUTS_FILE
from megatron_srpo.observe.rollouts import BRANCHES
from megatron_srpo.run.cli import run_tool

T = TypeVar("T")
STEP = re.compile(r'\{"step": (\d+)')  # how a line of rollouts.jsonl begins
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


class Message(BaseModel):
    role: str = ""
    content: JsonValue = None
    tool_calls: JsonValue = None


class Episode(BaseModel):
    messages: list[Message] = []


class Record(BaseModel):
    """One prompt, as observe/rollouts.py writes it. A file of eval has no branches; `responses` is None if the texts
    were not kept."""

    step: int | None = None
    uid: str
    kind: str
    answer: JsonValue
    scores: list[float]
    correct: list[bool]
    lengths: list[int]
    finish_reasons: list[str]
    predictions: list[str | None]
    feedback: list[str | None]
    errors: list[str | None]
    advantages: list[float] | None = None
    branches: list[str] | None = None
    why: list[str] | None = None
    teachers: list[int | None] | None = None
    prompt: str = ""
    responses: list[str] | None = None
    teacher_prompts: list[str | None] | None = None
    episodes: list[Episode | None] | None = None


def at(values: list[T] | None, number: int) -> T | None:
    return values[number] if values else None


@app.command()
def view(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's output folder, or a file that eval has written.")],
    iteration: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Which iteration of a run. Default: the newest.")
    ] = None,
    uid: Annotated[str | None, typer.Option(metavar="UID", help="Only this row, for example train:17.")] = None,
    kind: Annotated[str | None, typer.Option(metavar="KIND", help="Only rows of this kind.")] = None,
    branch: Annotated[
        str | None, typer.Option(metavar="NAME", help=f"Only responses of this branch: {', '.join(BRANCHES)}.")
    ] = None,
    correct: Annotated[bool, typer.Option("--correct", help="Only correct responses.")] = False,
    wrong: Annotated[bool, typer.Option("--wrong", help="Only wrong responses.")] = False,
    prompts: Annotated[
        int, typer.Option(metavar="N", min=1, help="How many prompts are shown, those with texts first.")
    ] = 1,
    characters: Annotated[
        int, typer.Option(metavar="N", min=0, help="Longest text that is shown whole. 0: every text.")
    ] = 2000,
    teacher: Annotated[bool, typer.Option("--teacher", help="Show the teacher's prompts too.")] = False,
) -> int:
    """Show prompts, responses, rewards, and which loss trained each response and why."""
    if correct and wrong:
        raise UserError("view: --correct and --wrong together leave no response: expected one of them; leave out both")
    if branch is not None and branch not in BRANCHES:
        raise UserError(f"view: --branch {branch}: expected one of {', '.join(BRANCHES)}")
    file, records = _read(run, iteration)
    if teacher and not any(any(record.teacher_prompts or ()) for record in records):
        print(f"view: {file} has no teacher's prompts, so --teacher shows nothing more", file=sys.stderr)
    outcome = True if correct else False if wrong else None
    wanted = [
        (record, chosen)
        for record in records
        if uid in (None, record.uid) and kind in (None, record.kind)
        for chosen in [_responses(record, branch, outcome)]
        if chosen
    ]
    wanted.sort(key=lambda pair: pair[0].responses is None)  # those with texts first
    if not wanted:
        raise UserError(f"view: none of the {len(records)} prompts of {file} has such a response. {_present(records)}")
    console = Console(highlight=False, soft_wrap=True)
    for record, chosen in wanted[:prompts]:
        for text in _shown(record, chosen, characters, teacher):
            console.print(text)
    if len(wanted) > prompts:
        console.print(f"{len(wanted) - prompts} more of such prompts: --prompts {len(wanted)} shows all", style="dim")
    if evaluated := _evaluated(run):
        console.print(f"Evaluations have files of their own: {evaluated}", style="dim")
    return 0


def _evaluated(run: Path) -> str:
    """The files that eval has written into a run's folder, in words; "" if there are none."""
    return ", ".join(map(str, sorted((run / "eval").glob("*.jsonl"))))


def _read(run: Path, iteration: int | None) -> tuple[str, list[Record]]:
    """The prompts of one iteration, or of an evaluation, and where they are from."""
    file = run / ROLLOUTS_FILE if run.is_dir() else run
    if not file.is_file():
        instead = f"; eval has written {files}" if (files := _evaluated(run)) else ""
        raise UserError(
            f"view: expected a run's folder with {ROLLOUTS_FILE}, or a file that eval has written: {run}{instead}"
        )
    found, steps = "", []
    evaluated: list[Record] = []
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                begin = STEP.match(line)
                if begin is None:
                    evaluated += _parsed(line, f"line {number} of {file}")
                elif line.endswith("\n"):  # else a run is writing it
                    steps.append(int(begin[1]))
                    found = line if iteration in (None, steps[-1]) else found
    except UnicodeDecodeError:
        raise UserError(
            f"view: {file} is no text: expected a run's {ROLLOUTS_FILE}, or a file that eval has written"
        ) from None
    if evaluated and not steps:
        if iteration is not None:
            raise UserError(f"view: {file} is of an evaluation, which has no iterations: leave out --iteration")
        return str(file), evaluated
    if not found and file.stat().st_size == 0 and file.name != ROLLOUTS_FILE:
        raise UserError(f"view: {file} is empty: expected a file that eval has written; run eval again")
    if not found:
        have = f"it has iterations {steps[0]} to {steps[-1]}" if steps else "no iteration is finished yet"
        raise UserError(f"view: {file} has nothing to show{f' of iteration {iteration}' if iteration else ''}: {have}")
    step = int(STEP.findall(found)[0])
    return f"iteration {step} in {file}", _parsed(found, f"iteration {step} in {file}")


def _parsed(line: str, where: str) -> list[Record]:
    try:
        record = json.loads(line)
        return [Record(step=record.get("step"), **group) for group in record.get("groups", [record])]
    except (ValueError, TypeError, AttributeError) as error:  # pydantic's errors are ValueErrors
        missing = f" ({error.errors()[0]['loc'][0]})" if isinstance(error, ValidationError) else ""
        raise UserError(f"view: {where} is neither of {ROLLOUTS_FILE} nor of a file of eval{missing}") from error


def _responses(record: Record, branch: str | None, correct: bool | None) -> list[int]:
    """The numbers of the responses that are shown."""
    return [
        number
        for number, right in enumerate(record.correct)
        if correct in (None, right) and branch in (None, at(record.branches, number))
    ]


def _present(records: Sequence[Record]) -> str:
    kinds = sorted({record.kind for record in records})
    branches = sorted({branch for record in records for branch in record.branches or []})
    return f"Kinds: {', '.join(kinds)}." + (f" Branches: {', '.join(branches)}." if branches else "")


def _shown(record: Record, chosen: Sequence[int], limit: int, teacher: bool) -> Iterator[Text]:
    """One prompt, piece by piece."""
    where = f"iteration {record.step} · " if record.step is not None else ""
    answer = _cut(json.dumps(record.answer, ensure_ascii=False), limit)
    outcome = f"{sum(record.correct)} of {len(record.correct)} correct"
    yield Text(visible(f"{where}{record.uid} · kind {record.kind} · {outcome} · answer {answer}"), style="bold reverse")
    if record.responses is None:
        yield Text("its texts were not kept (observe.rollout_texts)", style="dim")
    else:
        yield Text(_cut(record.prompt, limit), style="cyan")
    for number in chosen:
        yield from _response(record, number, limit, teacher)
    yield Text("")


def _response(record: Record, number: int, limit: int, teacher: bool) -> Iterator[Text]:
    about = [
        f"score {record.scores[number]:g}", f"{record.lengths[number]} tokens, {record.finish_reasons[number]}",
    ]  # fmt: skip
    if record.branches and record.why and record.advantages:
        about.append(f"{record.branches[number]}: {record.why[number]}, advantage {record.advantages[number]:+.3g}")
    shown_sibling = at(record.teachers, number)
    if shown_sibling is not None:
        about.append(f"the teacher sees response {shown_sibling}")
    style = "bold green" if record.correct[number] else "bold red"
    yield Text(visible(f"── response {number} · " + " · ".join(about)), style=style)
    episode, text = at(record.episodes, number), at(record.responses, number)
    if episode is not None:
        for message in episode.messages:
            yield Text(f"{message.role}: ", style="dim").append(_cut(_content(message), limit), style="default")
    elif text is not None:
        yield Text(_cut(text, limit))
    told = {"read as": record.predictions, "feedback": record.feedback, "the reward failed": record.errors}
    for label, values in told.items():
        value = values[number]
        if value is not None:
            yield Text(f"{label}: {_cut(value, limit)}", style="yellow")
    read = at(record.teacher_prompts, number)
    if teacher and read is not None:
        yield Text("the teacher reads:", style="dim")
        yield Text(_cut(read, limit), style="magenta")


def _content(message: Message) -> str:
    content = message.content if isinstance(message.content, str) else _json(message.content)
    return content + _json(message.tool_calls)


def _json(value: JsonValue) -> str:
    return json.dumps(value, ensure_ascii=False) if value else ""


def _cut(text: str, limit: int) -> str:
    """The text as a terminal may show it. A long one keeps its beginning and its end, where the answer usually is."""
    if limit and len(text) > limit:
        kept = limit // 2
        end = text[len(text) - kept :]
        text = f"{text[:kept]}\n[… {len(text) - 2 * kept} characters: --characters 0 shows them …]\n{end}"
    return visible(text)


def main(arguments: Sequence[str] | None = None) -> int:
    return run_tool(app, "view", arguments)
