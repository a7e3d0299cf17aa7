"""TensorBoard and Weights & Biases. A tracker that fails is switched off with one message; training goes on."""

from __future__ import annotations

import json
import logging
import math
import threading
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from megatron_srpo.config import Config
from megatron_srpo.observe.metrics import METRICS_FILE, read_records
from megatron_srpo.observe.wandb_file import offline_steps

WANDB_ID_FILE = "wandb_run_id"
WANDB_TIMEOUT_SECONDS = 60  # for the service's start, and for a question about the login
WANDB_UPLOAD_SECONDS = 300  # that the end of a run waits for an upload


class Tracker(Protocol):
    """Takes the finite numbers of one step."""

    name: str

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in output_dir/tensorboard; a continued run hides the steps that it repeats."""

    name = "TensorBoard"

    def __init__(self, config: Config, start_step: int, say: Callable[[str], None]) -> None:
        from tensorboard.summary.writer import event_file_writer
        from torch.utils.tensorboard import SummaryWriter

        _hide_failures_of(event_file_writer._AsyncWriterThread)  # it keeps them and raises them at the next call
        folder = Path(config.run.output_dir) / "tensorboard"
        purge = start_step + 1 if start_step else 0
        self._writer = SummaryWriter(str(folder), purge_step=purge, flush_secs=10)
        settings = json.dumps(config.model_dump(mode="json"), indent=2, ensure_ascii=False)
        # Four spaces make it a code block in TensorBoard's Markdown.
        self._writer.add_text("config", "\n".join("    " + line for line in settings.splitlines()), start_step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # a killed run's last steps are shown too

    def close(self) -> None:
        self._writer.close()


def _hide_failures_of(kind: type[threading.Thread]) -> None:
    """Threads of `kind` end without the traceback that Python prints for a thread."""
    before = threading.excepthook

    def hook(failure: threading.ExceptHookArgs) -> None:
        if not isinstance(failure.thread, kind):
            before(failure)

    threading.excepthook = hook


class WeightsAndBiases:
    """A W&B run, online or offline. Its id is kept in output_dir, so that a continued run stays one run: steps that an
    earlier process has recorded are not recorded again, and those that it lost are taken from metrics.jsonl."""

    name = "Weights & Biases"

    def __init__(self, config: Config, start_step: int, say: Callable[[str], None]) -> None:
        import wandb

        logging.raiseExceptions = False  # on a full disk W&B's own debug.log would be a traceback for every line of it
        folder = Path(config.run.output_dir)
        folder.mkdir(parents=True, exist_ok=True)  # wandb would go to a temporary folder
        settings = wandb.Settings(
            silent=True, console="off", init_timeout=WANDB_TIMEOUT_SECONDS, login_timeout=WANDB_TIMEOUT_SECONDS,
            finish_timeout=WANDB_UPLOAD_SECONDS,
        )  # fmt: skip
        wandb.setup(settings)  # the settings of init do not silence what init says after it (of libraries it detects)
        online = config.observe.wandb_mode == "online"
        run_id = self._run_id(folder, start_step)
        self._recorded = set(offline_steps(folder, run_id)) if start_step else set()
        self._run = wandb.init(
            project=config.observe.wandb_project, name=config.run.name, dir=str(folder),
            mode=config.observe.wandb_mode, id=run_id, resume="allow" if online else None,
            config=config.model_dump(mode="json"), settings=settings,
        )  # fmt: skip
        if online and start_step:  # a continued run repeats the steps after its checkpoint
            self._recorded = set(range(int(self._run.summary.get("step", 0)) + 1))
        self._teardown = wandb.teardown
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        if online:
            say(f"Weights & Biases: {self._run.url}")
        if start_step and (folder / METRICS_FILE).exists():  # what a killed process had not yet handed over
            for record in read_records(folder / METRICS_FILE):
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
        if step not in self._recorded:
            self._run.log({"step": step, **metrics})

    def close(self) -> None:
        self._run.finish()
        self._teardown()  # its service process has then written everything, and is gone


class Trackers:
    """The trackers that the configuration asks for."""

    def __init__(self, config: Config, *, start_step: int, say: Callable[[str], None]) -> None:
        self._say = say
        self._active: list[Tracker] = []
        wanted: list[type] = []
        if config.observe.tensorboard:
            wanted.append(TensorBoard)
        if config.observe.wandb:
            wanted.append(WeightsAndBiases)
        for kind in wanted:
            try:
                self._active.append(kind(config, start_step, say))
            except Exception as error:  # whatever it is: a log is not worth a training run
                self._gone(kind, error)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Pass on the finite numbers of a step."""
        numbers = _finite_numbers(metrics)
        for tracker in list(self._active):
            try:
                tracker.log(step, numbers)
            except Exception as error:
                self._active.remove(tracker)
                self._gone(tracker, error)

    def close(self) -> None:
        """Flush and end all trackers."""
        for tracker in self._active:
            try:
                tracker.close()
            except Exception as error:
                self._gone(tracker, error)
        self._active = []

    def _gone(self, tracker: Tracker | type, error: Exception) -> None:
        if isinstance(error, ImportError):
            cure = f"install {error.name}" if error.name else "install it"
        else:
            cure = "metrics.jsonl has everything"
        detail = str(error).strip().splitlines() or [""]
        self._say(f"{tracker.name} is off ({type(error).__name__}: {detail[0]}); training goes on: {cure}")


def _finite_numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if name != "step" and _is_finite_number(value)}


def _is_finite_number(value: Any) -> bool:
    try:
        return not isinstance(value, str) and math.isfinite(float(value))
    except (TypeError, ValueError):
        return False
