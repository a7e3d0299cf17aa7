"""TensorBoard and Weights & Biases. A tracker that fails is switched off with one message, and training continues."""

from __future__ import annotations

import json
import logging
import math
import shutil
import threading
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from glob import escape
from pathlib import Path
from typing import Protocol, SupportsFloat

from megatron_srpo.config import Config
from megatron_srpo.observe.metrics import METRICS_FILE, read_records

WANDB_ID_FILE = "wandb_run_id"
WANDB_TIMEOUT_SECONDS = 60  # limit for W&B's service to start, and for its question about the login
WANDB_UPLOAD_SECONDS = 300  # how long the end of a run waits for the upload


class Tracker(Protocol):
    """Records the finite numbers of one step."""

    name: str

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in output_dir/tensorboard. A resumed run hides the steps that it repeats."""

    name = "TensorBoard"

    def __init__(self, config: Config, start_step: int, say: Callable[[str], None]) -> None:
        from tensorboard.summary.writer import event_file_writer
        from torch.utils.tensorboard import SummaryWriter

        _hide_failures_of(event_file_writer._AsyncWriterThread)  # the next call raises the error again
        folder = Path(config.run.output_dir) / "tensorboard"
        purge = start_step + 1 if start_step else 0
        self._writer = SummaryWriter(str(folder), purge_step=purge, flush_secs=10)
        settings = json.dumps(config.model_dump(mode="json"), indent=2, ensure_ascii=False)
        # Four spaces make a code block in TensorBoard's Markdown.
        self._writer.add_text("config", "\n".join("    " + line for line in settings.splitlines()), start_step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        # One event for all, where add_scalar writes one for each. It is on the disk within flush_secs, also if the run
        # is killed later.
        values = [Summary.Value(tag=name, simple_value=float(value)) for name, value in metrics.items()]
        self._writer._get_file_writer().add_summary(Summary(value=values), step)

    def close(self) -> None:
        self._writer.close()


def _hide_failures_of(kind: type[threading.Thread]) -> None:
    """Let threads of `kind` end without the traceback that Python prints for a failed thread."""
    before = threading.excepthook

    def hook(failure: threading.ExceptHookArgs) -> None:
        if not isinstance(failure.thread, kind):
            before(failure)

    threading.excepthook = hook


class WeightsAndBiases:
    """A W&B run, online or offline. Its id is kept in output_dir, so that a resumed run stays the same W&B run.

    A killed process may not have handed its last steps to W&B, and a resumed one repeats the steps after its
    checkpoint. Therefore a resumed run takes its history from metrics.jsonl: offline the whole history is recorded
    again and replaces the earlier record; online the steps that the server does not have are sent.
    """

    name = "Weights & Biases"

    def __init__(self, config: Config, start_step: int, say: Callable[[str], None]) -> None:
        import wandb

        logging.raiseExceptions = False  # on a full disk every line of W&B's debug.log would print a traceback
        folder = Path(config.run.output_dir)
        folder.mkdir(parents=True, exist_ok=True)  # otherwise wandb uses a temporary folder
        settings = wandb.Settings(
            silent=True, console="off", init_timeout=WANDB_TIMEOUT_SECONDS, login_timeout=WANDB_TIMEOUT_SECONDS,
            finish_timeout=WANDB_UPLOAD_SECONDS,
        )  # fmt: skip
        wandb.setup(settings)  # init's own settings do not silence its hints about libraries that it detects
        online = config.observe.wandb_mode == "online"
        run_id = self._run_id(folder, start_step)
        history = list(read_records(folder / METRICS_FILE)) if start_step and (folder / METRICS_FILE).exists() else []
        if history and not online:
            for earlier in folder.glob(f"wandb/offline-run-*-{escape(run_id)}"):
                shutil.rmtree(earlier)
        self._run = wandb.init(
            project=config.observe.wandb_project, name=config.run.name, dir=str(folder),
            mode=config.observe.wandb_mode, id=run_id, resume="allow" if online else None,
            config=config.model_dump(mode="json"), settings=settings,
        )  # fmt: skip
        self._recorded = int(self._run.summary.get("step", 0)) if online and start_step else -1
        self._teardown = wandb.teardown
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        if online:
            say(f"Weights & Biases: {self._run.url}")
        for record in history:
            self.log(record["step"], _finite_numbers(record))

    @staticmethod
    def _run_id(folder: Path, start_step: int) -> str:
        file = folder / WANDB_ID_FILE
        if start_step and file.exists():
            known = file.read_text().strip()
            if known:
                return known
        new = uuid.uuid4().hex[:12]
        file.write_text(new + "\n")
        return new

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if step > self._recorded:
            self._run.log({"step": step, **metrics})

    def close(self) -> None:
        self._run.finish()
        self._teardown()  # waits until its service process has written everything and ended


class Trackers:
    """The trackers that the configuration switches on. `say` prints a message for the user."""

    def __init__(self, config: Config, *, start_step: int, say: Callable[[str], None]) -> None:
        self._say = say
        self._active: list[Tracker] = []
        wanted: list[type[TensorBoard] | type[WeightsAndBiases]] = []
        if config.observe.tensorboard:
            wanted.append(TensorBoard)
        if config.observe.wandb:
            wanted.append(WeightsAndBiases)
        for kind in wanted:
            try:
                self._active.append(kind(config, start_step, say))
            except Exception as error:  # whatever it is, it must not end a training run
                self._report(kind.name, error)

    def log(self, step: int, metrics: Mapping[str, object]) -> None:
        """Pass on the finite numbers of a step."""
        numbers = _finite_numbers(metrics)
        for tracker in list(self._active):
            try:
                tracker.log(step, numbers)
            except Exception as error:
                self._active.remove(tracker)
                self._report(tracker.name, error)

    def close(self) -> None:
        """Flush and end all trackers."""
        for tracker in self._active:
            try:
                tracker.close()
            except Exception as error:
                self._report(tracker.name, error)
        self._active = []

    def _report(self, name: str, error: Exception) -> None:
        if isinstance(error, ImportError):
            cure = f"install {error.name}" if error.name else "install it"
        else:
            cure = "metrics.jsonl has everything"
        detail = str(error).strip().splitlines() or [""]
        self._say(f"{name} is off ({type(error).__name__}: {detail[0]}); training goes on: {cure}")


def _finite_numbers(metrics: Mapping[str, object]) -> dict[str, float]:
    """The metrics, without "step", that are finite numbers."""
    found = {}
    for name, value in metrics.items():
        with suppress(TypeError, ValueError):  # a tensor of several elements
            if name != "step" and isinstance(value, SupportsFloat) and math.isfinite(float(value)):
                found[name] = float(value)
    return found
