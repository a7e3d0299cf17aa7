"""A checkpoint in Megatron's sharded format, of training or converted, as a Hugging Face folder.

    python -m megatron_srpo convert-megatron-to-hf --megatron runs/srpo --out DIR
    python -m megatron_srpo convert-megatron-to-hf --megatron DIR --out DIR --verify-against HFDIR

Needs no GPU and none of the run's ranks. See docs/conversion.md.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from megatron_srpo.core.quiet import quiet_libraries
from megatron_srpo.run.cli import run_tool

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


class DType(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@app.command()
def convert(
    megatron: Annotated[
        Path, typer.Option(metavar="DIR", help="A checkpoint, or a run or folder of checkpoints: the newest.")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The Hugging Face folder to write; must not exist.")],
    hf: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="config.json and tokenizer, where the checkpoint does not know them."),
    ] = None,
    verify_against: Annotated[
        Path | None, typer.Option(metavar="HFDIR", help="Refuse unless every tensor is this folder's, bit for bit.")
    ] = None,
    dtype: Annotated[DType | None, typer.Option(help="Convert; default: as stored.")] = None,
    max_shard_gb: Annotated[float, typer.Option(min=1e-6, help="Largest weight file, in GB.")] = 5.0,
    merge: Annotated[
        bool, typer.Option("--merge", help="Of LoRA adapters: merge them into the base model (--hf, or model.path).")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List every tensor with shape and rule only.")] = False,
) -> int:
    """Megatron's sharded checkpoint → Hugging Face folder, for transformers and vLLM. LoRA adapters → peft's folder."""
    from megatron_srpo.conversion import console

    quiet_libraries()
    import torch

    from megatron_srpo.conversion.to_hf import megatron_to_hf

    return console.converted(
        out,
        lambda tell: megatron_to_hf(
            megatron, out, hf_dir=hf, verify_against=verify_against,
            dtype=None if dtype is None else getattr(torch, dtype.value),
            max_shard_bytes=int(max_shard_gb * 1e9), dry_run=dry_run, merge=merge, tell=tell,
        ),
        dry_run=dry_run,
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    return run_tool(app, "convert-megatron-to-hf", arguments)


if __name__ == "__main__":
    raise SystemExit(main())
