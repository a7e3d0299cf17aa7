"""Converts Megatron's sharded checkpoint to a Hugging Face folder, without a GPU and without the run that wrote it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_srpo.bridge import BridgeError, read_config, weight_table, write_adapter_folder
from megatron_srpo.bridge.hf_folder import DEFAULT_SHARD_BYTES, copy_files, refuse_bad_target, write_config
from megatron_srpo.bridge.rules import Rule
from megatron_srpo.bridge.safetensors_file import TensorGroup, plan_files, write_file, write_index
from megatron_srpo.config import LoraConfig, ParallelConfig
from megatron_srpo.conversion.adapters import Merge, stored_lora
from megatron_srpo.conversion.memory import PeakMemory
from megatron_srpo.conversion.report import Report, Tell, refuse_existing, written_aside
from megatron_srpo.conversion.source import checkpoint_folder, model_folder, tokenizer_folder
from megatron_srpo.conversion.store_group import StoreGroup
from megatron_srpo.conversion.verify import require_equal
from megatron_srpo.core.errors import UserError, nearest
from megatron_srpo.families import unsupported

STATE = "optimizer."  # the prefix of the keys of optimizer state and shadows


def megatron_to_hf(
    checkpoint: Path, out_dir: Path, *, hf_dir: Path | None = None, verify_against: Path | None = None,
    dtype: torch.dtype | None = None, max_shard_bytes: int = DEFAULT_SHARD_BYTES, dry_run: bool = False,
    merge: bool = False, tell: Tell | None = None,
) -> Report:  # fmt: skip
    """Convert the model's weights of a checkpoint, which may be a training checkpoint or a converted one, of any
    layout. Of a checkpoint of LoRA adapters it writes peft's adapter folder, or with `merge` the base model with the
    adapters merged into it.

    `hf_dir` has the model's config.json and tokenizer where the checkpoint does not know them. `dtype` converts; None
    keeps what is stored. `verify_against` compares the written files bit for bit with another folder before they get
    their name. Every process of torchrun calls it. Raises UserError.
    """
    folder = checkpoint_folder(checkpoint)
    source = model_folder(folder, hf_dir)
    tokenizer = tokenizer_folder(folder, source, given=hf_dir)
    refuse_existing(out_dir, dry_run=dry_run)
    refuse_bad_target(source, out_dir)
    lora = stored_lora(folder)
    if lora is not None:
        found = _StoredModel(folder, read_config(source), None if merge else dtype, lora)
        return _convert_adapters(folder, found, lora, source, out_dir, tokenizer, merge, dtype, max_shard_bytes,
                                 dry_run=dry_run, verify_against=verify_against)  # fmt: skip
    if merge:
        raise UserError(f"--merge: {folder} holds all weights, and no adapters to merge; leave it out")
    model = _StoredModel(folder, read_config(source), dtype)
    files = plan_files(model.groups.values(), max_shard_bytes)
    report = model.report
    if dry_run:
        report.lines = [model.line(name) for name in model.groups]
        return report
    processes = StoreGroup()
    mine = processes.share_of(files)
    total, done = sum(file.nbytes for file in mine), 0

    def produce(group: TensorGroup) -> Iterable[torch.Tensor]:
        nonlocal done
        yield from model.tensors(group.key)
        done += group.nbytes
        if tell:
            tell(done, total)

    with written_aside(out_dir, processes) as aside:
        with PeakMemory() as memory:
            for file in mine:
                write_file(aside / file.name, file, produce)
        report.peak = max(processes.gather(memory.peak))
        if processes.is_leader:
            write_index(aside, files)
            write_config(source, aside, dtype or files[0].groups[0].dtype)
            copy_files(source, aside, tokenizer)
            if verify_against:
                require_equal(aside, verify_against)
                report.equal_to = str(verify_against)
    return report


def _convert_adapters(
    folder: Path, model: _StoredModel, lora: LoraConfig, source: Path, out_dir: Path, tokenizer: Path, merge: bool,
    dtype: torch.dtype | None, max_shard_bytes: int, *, dry_run: bool, verify_against: Path | None,
) -> Report:  # fmt: skip
    """Adapters are small: one process converts them, and holds them all in memory."""
    if verify_against and not merge:
        raise UserError(f"--verify-against: {folder} holds adapters, which are compared with --merge only")
    report = model.report
    report.what = "factors of adapters" + (" merged into their base model" if merge else "")
    if dry_run:
        report.lines = [model.line(name) for name in model.groups]
        return report
    processes = StoreGroup()
    with written_aside(out_dir, processes) as aside, PeakMemory() as memory:
        if processes.is_leader:
            tensors = [
                named
                for name, group in model.groups.items()
                for named in zip(group.names, model.tensors(name), strict=True)
            ]
            if merge:
                merged = Merge(folder, lora, dict(tensors), source, read_config(source))
                merged.write(aside, tokenizer=tokenizer, dtype=dtype, max_shard_bytes=max_shard_bytes)
                if verify_against:
                    require_equal(aside, verify_against)
                    report.equal_to = str(verify_against)
            else:
                write_adapter_folder(tensors, aside, lora, str(source))
    report.peak = memory.peak
    return report


def check_stored(folder: Path, hf_dir: Path) -> None:
    """Raise UserError unless the checkpoint has all weights of `hf_dir`'s model, in its shapes and undamaged."""
    if stored_lora(folder) is not None:
        raise UserError(
            f"{folder} holds LoRA adapters: expected all weights. Write the merged model with "
            "convert-megatron-to-hf --merge, and compare that folder without --megatron"
        )
    model = _StoredModel(folder, read_config(hf_dir), None)
    for name in model.groups:
        for _ in model.tensors(name):
            pass


@dataclass(frozen=True)
class StoredParameter:
    """Where a Megatron parameter is in the checkpoint: `regions` are (offset, shape there, shape without the axis of
    layers) of its pieces."""

    key: str
    rule: Rule
    regions: tuple[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]], ...]


class _StoredModel:
    """The checkpoint's model in Hugging Face terms: what Megatron itself would hold on one rank, found in the files."""

    def __init__(
        self, folder: Path, config: dict[str, Any], dtype: torch.dtype | None, lora: LoraConfig | None = None
    ) -> None:  # fmt: skip
        problems = unsupported(config)
        if problems:
            raise BridgeError(problems[0].removeprefix("model.path: "))
        from megatron_srpo.mcore.meta_model import rank_share
        from megatron_srpo.mcore.sharded_files import ShardedReader

        self._reader, self._dtype = ShardedReader(folder), dtype
        self._stored = self._reader.tensors()
        self._share = rank_share(config, ParallelConfig(), 0, adapters=lora)
        table = weight_table(config, self._share.shards.padded_vocab_size)
        self._places: dict[str, StoredParameter] = {}
        self.groups: dict[str, TensorGroup] = {}
        self.report = Report()
        for name in self._share.places:
            mapped, parameter = table.lookup(name), self._share.shards.parameters[name]
            self._places[name] = place = self._find(name, mapped.rule)
            stored = self._stored[place.key][1]
            shapes = tuple(map(tuple, mapped.rule.hf_shapes(tuple(parameter.shape), 1)))
            self.groups[name] = TensorGroup(name, mapped.hf_names, shapes, dtype or stored)
            self.report.add(name, parameter.numel() * stored.itemsize)
        self._refuse_unread()

    def _find(self, name: str, rule: Rule) -> StoredParameter:
        """Where the parameter is. Raises BridgeError when it is not there, or in another shape."""
        regions = []
        for piece in self._share.pieces(name, self._share.shards.parameters[name]):
            if piece.key not in self._stored:
                raise BridgeError(
                    f"{self._reader.folder} has no tensor {piece.key!r}, which config.json implies."
                    f"{nearest(piece.key, self._stored)} Is the config.json of this model?"
                )
            stored, wanted = self._stored[piece.key][0], tuple(piece.global_shape)
            padded = piece.allow_shape_mismatch and stored[0] >= wanted[0] and stored[1:] == wanted[1:]
            if stored != wanted and not padded:
                raise BridgeError(
                    f"{piece.key} in {self._reader.folder} has shape {list(stored)}, config.json implies "
                    f"{list(wanted)}: checkpoint and config.json are of different models."
                )
            shape = tuple(piece.local_shape)
            regions.append((tuple(piece.global_offset), (1,) * piece.prepend_axis_num + shape, shape))
        return StoredParameter(piece.key, rule, tuple(regions))

    def _refuse_unread(self) -> None:
        known = {place.key for place in self._places.values()}
        extra = sorted(key for key in self._stored if key not in known and not key.startswith(STATE))
        if extra:
            raise BridgeError(
                f"{self._reader.folder} has {len(extra)} tensor(s) that no rule reads, the first is {extra[0]!r}."
                f"{nearest(extra[0], known)} Leaving them out would make another model: is the config.json of this one?"
            )

    def tensors(self, name: str) -> Iterable[torch.Tensor]:
        """The Hugging Face tensors behind a parameter."""
        place = self._places[name]
        parts = [self._reader.read(place.key, offset, there).view(here) for offset, there, here in place.regions]
        whole = self._share.merge(name, parts)
        del parts
        for tensor in place.rule.from_shards([whole]):
            yield tensor.to(self._dtype or tensor.dtype)

    def line(self, name: str) -> str:
        """A parameter, for a dry run."""
        group, place = self.groups[name], self._places[name]
        theirs = ", ".join(f"{hf} {list(shape)}" for hf, shape in zip(group.names, group.shapes, strict=True))
        stored = f"{place.key} {list(self._stored[place.key][0])}"
        return f"{stored} at {list(place.regions[0][0])}  → {type(place.rule).__name__} →  {theirs}"
