"""A Hugging Face folder as a checkpoint in Megatron's own sharded format, in the chunks of the given layout.

    python -m megatron_srpo convert-hf-to-megatron --hf DIR --out DIR --tensor-model-parallel-size 4
    python -m megatron_srpo.torchrun --nproc-per-node 8 -m megatron_srpo convert-hf-to-megatron …    the same, quicker

One process converts for all ranks of the layout, a tensor at a time. See docs/conversion.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_srpo.config import ParallelConfig
from megatron_srpo.core.errors import ConfigError
from megatron_srpo.core.quiet import quiet_libraries
from megatron_srpo.run.cli import run_tool

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def convert(
    hf: Annotated[Path, typer.Option(metavar="DIR", help="The model: config.json, safetensors, tokenizer.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The checkpoint to write; must not exist.")],
    tensor_model_parallel_size: Annotated[int, typer.Option(min=1, help="Ranks that share every layer.")] = 1,
    pipeline_model_parallel_size: Annotated[int, typer.Option(min=1, help="Ranks that share the stack.")] = 1,
    expert_model_parallel_size: Annotated[int, typer.Option(min=1, help="Ranks that share the experts.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List every tensor with shape and rule only.")] = False,
) -> int:
    """Hugging Face folder → Megatron's sharded checkpoint, for any layout, readable at any other."""
    sizes = {
        "tensor_model_parallel_size": tensor_model_parallel_size,
        "pipeline_model_parallel_size": pipeline_model_parallel_size,
        "expert_model_parallel_size": expert_model_parallel_size,
    }
    try:
        parallel = ParallelConfig.model_validate({name: size for name, size in sizes.items() if size > 1})
    except ValueError as error:
        raise ConfigError(f"this layout is not supported: {error}") from None
    from megatron_srpo.conversion import console

    quiet_libraries()
    from megatron_srpo.conversion.to_megatron import hf_to_megatron

    return console.converted(
        out, lambda tell: hf_to_megatron(hf, out, parallel, dry_run=dry_run, tell=tell), dry_run=dry_run
    )


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    return run_tool(app, "convert-hf-to-megatron", arguments)


if __name__ == "__main__":
    raise SystemExit(main())
