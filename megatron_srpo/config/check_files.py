"""Whether the files and folders that a configuration names are there. The model's folder: model_folder.py."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from megatron_srpo.config.schema import Config
from megatron_srpo.core.errors import nearest

ENVIRONMENTS = ("tools", "python", "textarena", "openenv", "verifiers")  # those that are built in
DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")


def file_problems(config: Config, splits: Iterable[str]) -> Iterator[str]:
    """A line for every file or folder that is named and cannot be used; `splits`: whose data must be there."""
    for split in splits:
        given = getattr(config.data, split)
        files = [given] if isinstance(given, str) else given
        if not [name for name in files if name]:
            yield f"data.{split}: is empty; name the {split} split's .jsonl, .json or .parquet file"
        for name in files:
            problem = _data_file(Path(name).expanduser()) if name else None
            if problem:
                yield f'data.{split} = "{name}": {problem}'
    if splits:
        yield from _reward_files(config)
        yield from _environment_files(config)
    if "train" in splits:
        yield from _output_folder(config.run.output_dir)
        yield from _export_folder(config)


def _reward_files(config: Config) -> Iterator[str]:
    for kind, reference in config.reward.functions.items():
        file = Path(reference.rpartition(":")[0]).expanduser()
        if file.suffix == ".py" and not os.path.isfile(file):
            yield f'reward.functions.{kind} = "{reference}": no such file (looked from {Path.cwd()})'


def _environment_files(config: Config) -> Iterator[str]:
    interpreter = config.environment.interpreter
    if interpreter and not os.access(interpreter, os.X_OK):
        make = Path(interpreter).parent.parent if Path(interpreter).parent.name == "bin" else Path("envs/mine")
        yield (
            f'environment.interpreter = "{interpreter}": is no program (looked from {Path.cwd()}); expected the Python '
            f"of a virtual environment. Make it: python -m venv {make}, and install what the environments need "
            f"({make}/bin/pip install -r requirements/verifiers.txt for verifiers)"
        )
    for kind, reference in config.environment.classes.items():
        where, _, name = reference.rpartition(":")
        if reference in ENVIRONMENTS:
            continue
        if not where or not name:
            known = ", ".join(ENVIRONMENTS)
            yield (
                f'environment.classes.{kind} = "{reference}": expected one of {known}, "module:Class" or '
                f'"path/file.py:Class".{nearest(reference, ENVIRONMENTS)}'
            )
        elif where.endswith(".py") and not os.path.isfile(Path(where).expanduser()):
            yield f'environment.classes.{kind} = "{reference}": no such file (looked from {Path.cwd()})'


def _data_file(file: Path) -> str | None:
    if os.path.isdir(file):  # Path.is_dir raises where a name is too long
        return "is a folder; name its .jsonl, .json or .parquet files"
    if file.suffix.lower() not in DATA_SUFFIXES:
        return "expected a .jsonl, .json or .parquet file; python -m megatron_srpo prepare-data makes them"
    if not os.path.exists(file):
        beside = [one.name for one in file.parent.glob("*") if one.suffix.lower() in DATA_SUFFIXES]
        nearest = difflib.get_close_matches(file.name, beside, n=1)
        hint = f"did you mean {file.parent / nearest[0]}?" if nearest else "see python -m megatron_srpo prepare-data"
        return f"no such file (looked from {Path.cwd()}); {hint}"
    if file.stat().st_size == 0:
        return "is empty; expected one row per line"
    return None


def _export_folder(config: Config) -> Iterator[str]:
    """The trained model replaces output_dir/hf at the end: not the model that it started from."""
    for key in ("path", "tokenizer"):
        given = getattr(config.model, key)
        target = Path(config.run.output_dir).expanduser() / "hf"
        if given and os.path.realpath(Path(given).expanduser()) == os.path.realpath(target):
            yield (
                f'model.{key} = "{given}": is the folder into which this run writes its trained model; name another '
                "run.output_dir"
            )


def _output_folder(given: str) -> Iterator[str]:
    if not given.strip():
        yield f'run.output_dir = "{given}": is empty; name a folder (it need not exist yet)'
        return
    folder = Path(given).absolute()
    found = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    if not found.is_dir():
        what = "is a file" if found == folder else f"{found} is a file"
        yield f'run.output_dir = "{given}": {what}; name a folder (it need not exist yet)'
    elif not os.access(found, os.W_OK | os.X_OK):
        yield f'run.output_dir = "{given}": this user may not write in {found}; name another folder'
