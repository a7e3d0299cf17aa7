"""Hugging Face folder → Megatron's sharded checkpoint, in the chunks that a layout's ranks would write."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_srpo.bridge import ShardReader, read_config
from megatron_srpo.bridge.hf_folder import copy_files
from megatron_srpo.bridge.rules import shape_of
from megatron_srpo.config import ParallelConfig, layout_problems, listed
from megatron_srpo.conversion.memory import PeakMemory
from megatron_srpo.conversion.report import Report, Tell, refuse_existing, written_aside
from megatron_srpo.conversion.source import MODEL_FOLDER
from megatron_srpo.conversion.store_group import StoreGroup
from megatron_srpo.core.errors import ConfigError
from megatron_srpo.families import unsupported


def hf_to_megatron(
    hf_dir: Path, out_dir: Path, parallel: ParallelConfig, *, dry_run: bool = False, tell: Tell | None = None
) -> Report:
    """Convert; the checkpoint appears in `out_dir` when it is complete. Every process of torchrun calls it.

    Tensors keep the dtype of the file. Raises UserError for a model or layout that cannot be, and where `out_dir`
    exists.
    """
    config = read_config(hf_dir)
    _refuse(config, parallel, hf_dir)
    refuse_existing(out_dir, dry_run=dry_run)
    from megatron_srpo.mcore.meta_model import layout_size
    from megatron_srpo.mcore.sharded_files import finish

    processes = StoreGroup()
    report = _examine(hf_dir, config)
    ranks = range(layout_size(parallel))
    if dry_run:
        report.lines = list(_listed(hf_dir, config, parallel, ranks))
        return report
    mine = processes.share_of(ranks)
    expected = report.nbytes * len(mine) // len(ranks)
    with written_aside(out_dir, processes) as aside:
        with PeakMemory() as memory:
            written = _write_ranks(hf_dir, aside, config, parallel, mine, expected, tell)
        everything = [record for part in processes.gather(written) for record in part]
        report.peak = max(processes.gather(memory.peak))
        if processes.is_leader:
            finish(aside, everything, {"hf_config": config, "layout": parallel.model_dump()})
            _copy_model(hf_dir, aside / MODEL_FOLDER)
    return report


def _refuse(config: dict[str, Any], parallel: ParallelConfig, hf_dir: Path) -> None:
    problems = [text.removeprefix("model.path: ") for text in unsupported(config)]
    problems = problems or list(layout_problems(parallel, config))
    if problems:
        raise ConfigError(listed(f"{hf_dir} at this layout", problems))


def _examine(hf_dir: Path, config: dict[str, Any]) -> Report:
    """The model in numbers, in the dtype of the files; refuses what cannot be converted, before anything is written."""
    from megatron_srpo.mcore.meta_model import rank_share

    share, report = rank_share(config, ParallelConfig(), 0), Report()
    with ShardReader(share.shards, hf_dir) as reader:
        for name in share.places:
            width = int(reader.sources(name)[0].get_dtype().strip("BF")) // 8
            report.add(name, share.shards.parameters[name].numel() * width)
    return report


def _write_ranks(
    hf_dir: Path, folder: Path, config: dict, parallel: ParallelConfig, ranks: Iterable[int], expected: int,
    tell: Tell | None,
) -> list[Any]:  # fmt: skip
    """The files of these ranks of the layout; returns what `finish` needs to know of them."""
    from megatron_srpo.mcore.meta_model import rank_share
    from megatron_srpo.mcore.sharded_files import RankFile

    written, done = [], 0
    for rank in ranks:
        share = rank_share(config, parallel, rank)
        with ShardReader(share.shards, hf_dir) as reader, RankFile(folder, rank) as file:
            for name in share.places:
                shard = reader.read(name)
                for piece in share.pieces(name, shard):
                    file.add(piece)
                done += shard.nbytes
                del shard, piece  # before the next one is read
                if tell:
                    tell(done, max(expected, done))
            written += file.written
    return written


def _listed(hf_dir: Path, config: dict, parallel: ParallelConfig, ranks: range) -> Iterable[str]:
    """Every parameter of every rank as a line; reads the files' headers alone."""
    from megatron_srpo.mcore.meta_model import rank_share

    for rank in ranks:
        share = rank_share(config, parallel, rank)
        with ShardReader(share.shards, hf_dir) as reader:
            for name in share.places:
                names, sources = reader.mapped[name].hf_names, reader.sources(name)
                theirs = ", ".join(f"{hf} {list(shape_of(s))}" for hf, s in zip(names, sources, strict=True))
                rule = type(reader.mapped[name].rule).__name__
                yield f"{theirs}  → {rule} →  rank {rank}: {name} {list(share.shards.parameters[name].shape)}"


def _copy_model(hf_dir: Path, target: Path) -> None:
    """The model's configuration and tokenizer into the checkpoint, so that it can be converted back by itself."""
    target.mkdir()
    shutil.copyfile(hf_dir / "config.json", target / "config.json")
    copy_files(hf_dir, target, hf_dir)
