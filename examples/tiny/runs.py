"""The folder of a run: new, to be continued, or to be moved aside."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from examples.tiny.task import Task, write_splits
from examples.tiny.warm_start import WarmStart, warm_started_model
from megatron_srpo.core.atomic import set_aside
from megatron_srpo.core.errors import UserError

REQUEST, SUMMARY = "request.json", "summary.json"


def request_of(config: Path, **choices: object) -> dict[str, object]:
    """What makes two runs the same run: the configuration file's content and the user's choices."""
    return {**choices, "config": hashlib.sha256(config.read_bytes()).hexdigest()[:12]}


def open_run(folder: Path, request: dict[str, object]) -> str:
    """Makes `folder` ready for `request`; returns what became of an earlier run there, in words, or "".

    The same request, interrupted after a checkpoint: continued. Anything else of ours: moved to
    `FOLDER.previous.N`, or removed when it has no checkpoint. A folder that is not ours: ValueError.
    """
    said = ""
    if folder.exists() and any(folder.iterdir()):
        if not (folder / REQUEST).exists():
            raise ValueError(
                f"{folder} exists and was not made by this example: remove it, or choose another with --output"
            )
        started = any((folder / "checkpoints").glob("step_*"))
        if started and not is_finished(folder) and read_request(folder) == request:
            return "continuing the interrupted run"
        if started:
            said = f"the earlier run is now {set_aside(folder)}"
        else:
            shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / REQUEST).write_text(json.dumps(request, indent=2) + "\n")
    return said


def shown_path(path: Path, root: Path) -> Path:
    """`path` relative to the checkout when it is inside it: shorter to read, and still right for the trainer."""
    path = path.resolve()
    return path.relative_to(root) if path.is_relative_to(root) else path


def read_request(folder: Path) -> dict[str, object]:
    return json.loads((folder / REQUEST).read_text())


def is_finished(folder: Path) -> bool:
    return (folder / SUMMARY).exists()


PLACED = dict.fromkeys(("model.path", "data.train", "data.test"), "Train another model with the trainer itself.")
PLACED["run.output_dir"] = "Use --output DIR."


def refuse_placed(extra: Sequence[str], more: Mapping[str, str]) -> None:
    """UserError if an option for the trainer is one that the driver decides: `place_inputs` does, or one of `more`,
    which maps keys to the cure."""
    cures = {**PLACED, **more}
    for part in extra:
        key = part.removeprefix("--").partition("=")[0]
        if part.startswith("--") and key in cures:
            raise UserError(f"--{key} is set by this command. {cures[key]}")


def place_inputs(folder: Path, model: Path, task: Task, train: int, test: int) -> dict[str, str]:
    """Copies the warm-started model and writes the data into the run; returns the overrides that name them."""
    own, facts = folder / "warm_start", "warm_start.json"
    if not (own / facts).exists() or (own / facts).read_text() != (model / facts).read_text():
        shutil.rmtree(own, ignore_errors=True)
        shutil.copytree(model, own)
    train_file, test_file = write_splits(task, folder / "data", train, test)
    return {
        "model.path": str(own),
        "data.train": str(train_file),
        "data.test": str(test_file),
        "run.output_dir": str(folder),
    }


def cached_warm_start(task: Task, settings: WarmStart, cache: Path) -> Path:
    """The warm-started model with a line before and after; the work is done once per settings."""
    folder = warm_started_model(task, settings, cache, report=lambda line: print(f"  {line}", flush=True))
    facts = json.loads((folder / "warm_start.json").read_text())
    print(f"  {facts['parameters'] / 1e6:.2f} M parameters in {folder}", flush=True)
    return folder
