"""Checkpoints of model, optimizer and shadows in Megatron's sharded format, which any other layout can read.

With LoRA a checkpoint holds the adapters alone, and the checksum of the base weights that they belong to.

Saving has three steps, and training continues during the second: `snapshot` (collective) plans which rank writes what
and copies that to host memory, `Snapshot.write` writes this rank's files from any thread, and `Snapshot.write_index`
runs on rank 0.
"""

from __future__ import annotations

import inspect
import os
import queue
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from megatron_srpo.core.errors import UserError
from megatron_srpo.mcore import generators
from megatron_srpo.mcore.checkpoint_copies import filled, holders, placeholder, planned_kind
from megatron_srpo.mcore.checkpoint_state import (
    MOMENTS,
    PREFIX,
    Entries,
    Slice,
    entries_of,
    kind_state,
    kinds,
    model_state,
    optimizer_of,
    slices,
)
from megatron_srpo.mcore.lora import MARK, has_adapters
from megatron_srpo.mcore.model import unwrap
from megatron_srpo.mcore.policy import Policy
from megatron_srpo.mcore.safe_files import read_index, read_tensors, refuse_objects

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync, WriteBucket
    from torch.distributed.checkpoint.filesystem import _StorageWriterTransforms
    from torch.distributed.checkpoint.metadata import Metadata
    from torch.distributed.checkpoint.storage import WriteResult

BACKEND = ("torch_dist", 1)
COMMON = "common.pt"
# Megatron Core 0.19 plans for the writer of another package (nvidia-resiliency-ext), unless told to use its own.
_SAVE = inspect.signature(TorchDistSaveShardedStrategy.async_save).parameters
_OWN_WRITER = {"async_strategy": "mcore"} if "async_strategy" in _SAVE else {}


def needed(policy: Policy) -> set[str]:
    """The kinds of state that training with this policy needs: "main", the moments, and the teacher's shadow if any.

    The reference is not needed: without it the reference is the initial model, as loaded.
    """
    return kinds(policy) - {"reference"}


def stored(directory: Path) -> set[str]:
    """The kinds of state that a checkpoint holds."""
    keys = read_index(directory).state_dict_metadata
    return {key.removeprefix(PREFIX).partition(".")[0] for key in keys if key.startswith(PREFIX)}


def layout(policy: Policy) -> dict[str, int]:
    """The sizes of all kinds of parallelism."""
    topology = policy.topology
    return {name: getattr(topology, f"{name}_size") for name in ("world", "tp", "pp", "cp", "dp", "ep", "etp")}


def load_generators(directory: Path) -> bool:
    """Restore this rank's random generators. Returns False if the checkpoint does not have them."""
    file = directory / _generators_file()
    if not file.exists():
        return False
    generators.restore(read_tensors(file))
    return True


def _generators_file() -> str:
    return f"rng_{dist.get_rank():05d}.pt"


# ---- saving ----------------------------------------------------------------------------------------------------------


class _Planner(TorchDistSaveShardedStrategy):
    """Megatron's strategy without its last step, which would start processes that write. We write in a thread."""

    def _get_save_and_finalize_callbacks(
        self, writer: FileSystemWriterAsync, planned: tuple[object, Metadata, object], *unused: object
    ) -> tuple[FileSystemWriterAsync, Metadata]:
        _, index, _ = planned
        return writer, index


class Snapshot:
    """What this rank writes of the state of one moment, in host memory."""

    def __init__(
        self, directory: Path, writer: FileSystemWriterAsync, index: Metadata, common: dict[str, Any] | None
    ) -> None:
        self._directory, self._plan, self._index, self._common = directory, writer, index, common
        self._generators = generators.states()
        self.results: list[WriteResult] = []  # what `write` wrote and where, for the index
        self.files: list[str] = []

    def write(self) -> None:
        """Write this rank's files. They are on the disk when this returns. Raises OSError if the disk is full or
        fails."""
        transforms = [self._plan.transforms] if hasattr(self._plan, "transforms") else []
        for bucket in self._plan.write_buckets or []:
            self.results += _written(transforms, bucket)
            self.files.append(bucket[1])
        self._plan.write_buckets = None  # frees the memory
        self._save(self._generators, _generators_file())
        if self._common is not None:
            self._save(self._common, COMMON)
            save_config(CheckpointingConfig(*BACKEND), str(self._directory))

    def write_index(self, results: list[list[WriteResult]]) -> None:
        """Write the index. `results` are those of all ranks, in rank order. Only rank 0 calls it."""
        self._plan.finish(self._index, results)

    def _save(self, values: dict[str, Any], name: str) -> None:
        with (self._directory / name).open("wb") as file:
            torch.save(values, file)
            file.flush()
            os.fsync(file.fileno())
        self.files.append(name)


def _written(transforms: list[_StorageWriterTransforms], bucket: WriteBucket) -> list[WriteResult]:
    """Write one of Megatron's buckets, which is one file, in this thread."""
    results: queue.Queue[tuple[int, list[WriteResult] | Exception]] = queue.Queue()
    open_buckets: queue.Queue[int] = queue.Queue()
    open_buckets.put(0)
    filesystem_async.FileSystemWriterAsync.write_preloaded_data(
        transforms, 0, bucket, results, open_buckets, use_fsync=True
    )
    _, found = results.get()
    if isinstance(found, Exception):
        raise found
    return found


def snapshot(policy: Policy, directory: Path) -> Snapshot:
    """Copy the current state of model, optimizer, shadows and generators, to be written into `directory`, which exists
    and is empty. All ranks call it."""
    optimizer = optimizer_of(policy)
    if not any("exp_avg" in shard.state for shard in optimizer.shards()):
        optimizer.restore_adam(0)  # torch's Adam has no state before the first step
    model = model_state(policy.model, policy.topology)
    entries = entries_of(model)
    held_by = holders(policy)
    state: dict[str, Any] = {"model": model}
    state |= {kind: planned_kind(kind, policy, held_by, entries) for kind in slices(policy)}
    for entry in entries.values():
        entry.data = placeholder(entry.data)
    state["progress"] = {"steps": policy.steps, "adam_steps": optimizer.adam_steps(), "base": policy.base}
    filesystem_async._results_queue = queue.Queue()  # or Megatron would start a process for a queue that we do not need
    sharded, common = save_preprocess(state)
    planner = FullyParallelSaveStrategyWrapper(_Planner(*BACKEND, thread_count=1), policy.topology.dp_cp_group)
    writer, index = planner.async_save(sharded, str(directory), **_OWN_WRITER)
    writer.write_buckets = filled(policy, writer.write_buckets or [], entries, held_by)
    return Snapshot(directory, writer, index, common if policy.topology.is_driver else None)


# ---- loading ---------------------------------------------------------------------------------------------------------


def load(policy: Policy, directory: Path) -> None:
    """Restore what `snapshot` copied, at this layout. All ranks call it.

    Kinds of state that the checkpoint does not have get their initial values: the main parameters those of the weights,
    Adam's moments zero, and the teacher those of the student. The reference stays as it is. UserError for adapters of
    another base model, for adapters where the run trains all weights, and the other way round.
    """
    refuse_objects(directory)
    common = read_tensors(directory / COMMON)  # refuses a pickle that runs code, before the loader below could run it
    _refuse_other_weights(policy, directory, common)
    optimizer = policy.optimizer
    state = model_state(policy.model, policy.topology)
    entries = entries_of(state)
    loaded = dist_checkpointing.load({"model": state}, str(directory))
    for piece, weights in zip(policy.model, loaded["model"], strict=True):
        missing, unexpected = unwrap(piece).load_state_dict(weights, strict=False)
        adapted = has_adapters([piece])
        missing = [name for name in missing if MARK in name or not adapted]  # the base is as it was loaded
        wrong = [name for name in [*missing, *unexpected] if not name.endswith("_extra_state")]
        assert not wrong, f"the checkpoint's weights do not fit the model: {wrong}"
    if not optimizer:
        return
    found, progress = kinds(policy) & stored(directory), loaded["progress"]
    policy.steps = progress["steps"]
    optimizer.restore_adam(progress["adam_steps"] if set(MOMENTS) <= found else 0)
    optimizer.reload_main_from_model()
    for kind, held in slices(policy).items():
        if kind in found:
            _load_kind(policy, directory, kind, held, entries)
    if "teacher" in policy.shadows and "teacher" not in found:
        policy.shadows["teacher"].update(1.0)
    optimizer.publish_main_to_model()


def _refuse_other_weights(policy: Policy, directory: Path, common: dict[str, Any]) -> None:
    adapted = has_adapters(policy.model)
    if adapted != any(MARK in key for key in read_index(directory).state_dict_metadata):
        holds, trains = ("all weights", "adapters") if adapted else ("adapters", "all weights (lora.rank = 0)")
        raise UserError(
            f"{directory} holds {holds}, and this run trains {trains}. Use the [lora] section that the checkpoint was "
            "trained with, or start from the beginning in another run.output_dir"
        )
    base = common.get("progress", {}).get("base", "")
    if adapted and base != policy.base:
        raise UserError(
            f"{directory} holds adapters of another base model: its weights have the checksum {base or 'unknown'}, and "
            f"those of model.path {policy.base}. Set model.path and model.dtype to what the adapters were trained on"
        )


def _load_kind(policy: Policy, directory: Path, kind: str, held: list[Slice], entries: Entries) -> None:
    """Read one kind of state into host memory, and copy this rank's slices out of it. Only parameters of which this
    rank has a slice are read, whole.

    A device that holds the weights, the gradients and the optimizer often has no room for them, and the host is spared
    by taking one kind at a time.
    """
    order = [shard.parameter for shard, _ in held]
    whole = [(parameter, torch.zeros(parameter.shape, dtype=torch.float32, device="cpu")) for parameter in order]
    wanted = {kind: kind_state(kind, whole, entries)}
    # Together the ranks do not ask for every copy of every chunk, which Megatron would take for a fault.
    loaded = dist_checkpointing.load(wanted, str(directory), validate_access_integrity=False).get(kind, {})
    for index, (shard, target) in enumerate(held):
        with optimizer_of(policy).present(target):
            target.detach().copy_(loaded[str(index)].reshape(-1)[shard.start : shard.stop])
