"""Compares one model in transformers, Megatron and vLLM: shows the largest difference and the first layer that differs.

    python -m megatron_srpo compare-logits --hf DIR --prompt "What is 2 + 2?"
    python -m megatron_srpo.torchrun --nproc-per-node 2 -m megatron_srpo compare-logits … --tensor-model-parallel-size 2
    python -m megatron_srpo compare-logits --hf DIR --megatron CHECKPOINT --no-vllm --token-ids 1,2,3

Exit codes: 0 all agree, 1 they do not, 2 a mistake. See docs/conversion.md.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_srpo.bridge import read_config
from megatron_srpo.bridge.load import WeightFolder
from megatron_srpo.config import Config, layout_problems, listed
from megatron_srpo.core.errors import ConfigError, UserError
from megatron_srpo.core.quiet import quiet_libraries
from megatron_srpo.families import expert_count, unsupported
from megatron_srpo.run.cli import run_tool

# Nats, and parts of the largest hidden value. In bfloat16 the error is the number format's: the tolerances are so many
# times transformers' own error on the same prompts, and not below these.
TOLERANCES = {"float32": (1e-3, 1e-4), "bfloat16": (0.1, 0.01)}
TIMES_ITS_OWN = 3

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


class DType(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"


@app.command()
def compare(
    hf: Annotated[Path, typer.Option(metavar="DIR", help="The model: a Hugging Face folder.")],
    megatron: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A Megatron checkpoint instead of the folder's weights.")
    ] = None,
    prompt: Annotated[list[str], typer.Option(help="A text; may be given again and again.")] = [],  # noqa: B006
    prompts: Annotated[Path | None, typer.Option(metavar="FILE", help="A text a line.")] = None,
    token_ids: Annotated[list[str], typer.Option(metavar="1,2,3", help="Tokens instead of a text.")] = [],  # noqa: B006
    tensor_model_parallel_size: Annotated[int, typer.Option(min=1, help="Of Megatron.")] = 1,
    pipeline_model_parallel_size: Annotated[int, typer.Option(min=1, help="Of Megatron.")] = 1,
    expert_model_parallel_size: Annotated[int, typer.Option(min=1, help="Of Megatron.")] = 1,
    sequence_parallel: Annotated[
        bool, typer.Option("--sequence-parallel", help="Of Megatron; always, where experts meet tensor parallelism.")
    ] = False,
    dtype: Annotated[DType, typer.Option(help="In which all compute.")] = DType.float32,
    tolerance: Annotated[float | None, typer.Option(min=0, help="Largest |Δ log-prob| that agrees, in nats.")] = None,
    layer_tolerance: Annotated[
        float | None, typer.Option(min=0, help="Largest |Δ hidden| ÷ largest |hidden| of a layer that agrees.")
    ] = None,
    vllm: Annotated[bool, typer.Option(help="With vLLM.")] = True,
) -> int:
    """transformers against Megatron, at any layout, against vLLM, on given prompts."""
    sizes = {
        "tensor_model_parallel_size": tensor_model_parallel_size,
        "pipeline_model_parallel_size": pipeline_model_parallel_size,
        "expert_model_parallel_size": expert_model_parallel_size,
    }
    parallel: dict[str, Any] = {name: size for name, size in sizes.items() if size > 1}
    experts = expert_count(read_config(hf)) > 0
    parallel["sequence_parallel"] = sequence_parallel or (experts and tensor_model_parallel_size > 1)
    config = Config.model_validate(
        {"model": {"path": str(hf), "dtype": dtype.value}, "data": {"train": "none"}, "parallel": parallel}
    )
    _refuse(hf, config)
    from megatron_srpo.conversion.console import leads

    quiet_libraries()
    tokens, tokenizer = _tokens(hf, prompt, prompts, token_ids)
    traces = _traces(hf, megatron, tokens, config, vllm=vllm)
    if not leads():
        return 0
    reference = traces.pop("transformers")
    usual, usual_layers = _tolerances(dtype.value, reference, traces.get("transformers in bfloat16", reference))
    tolerance = usual if tolerance is None else tolerance
    layer_tolerances = [usual if layer_tolerance is None else layer_tolerance for usual in usual_layers]
    agree = [
        _tell(name, tokens, reference, found, tolerance, layer_tolerances, tokenizer) for name, found in traces.items()
    ]
    return 0 if all(agree) else 1


def _tolerances(dtype: str, reference: list, rounded: list) -> tuple[float, list[float]]:
    """The usual ones, of log-probs and of every layer; `rounded`: transformers' own traces in `dtype`."""
    from megatron_srpo.comparison.trace import compare

    least, least_layer = TOLERANCES[dtype]
    unlimited = [math.inf] * len(reference[0].hidden)
    own = [compare(ours, theirs, unlimited) for ours, theirs in zip(reference, rounded, strict=True)]
    by_layer = zip(*(one.by_layer for one in own), strict=True)
    return (
        _tolerance(least, [one.worst for one in own]),
        [_tolerance(least_layer, errors) for errors in by_layer],
    )


def _tolerance(least: float, errors: Iterable[float]) -> float:
    """The tolerance that transformers' own errors give; NaN and infinity give none."""
    return max([least, *(TIMES_ITS_OWN * error for error in errors if math.isfinite(error))])


def _refuse(hf: Path, config: Config) -> None:
    found = read_config(hf)
    problems = unsupported(found) or list(layout_problems(config.parallel, found))
    parallel = config.parallel
    needed = parallel.pipeline_model_parallel_size * math.lcm(
        parallel.tensor_model_parallel_size, parallel.expert_model_parallel_size
    )
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if not problems and started % needed:
        problems = [
            f"the layout takes {needed} ranks and {started} started: "
            f"python -m megatron_srpo.torchrun --nproc-per-node {needed} …"
        ]
    if problems:
        raise ConfigError(listed("this comparison", problems))
    with WeightFolder(hf) as weights:  # files and headers: transformers would raise anything
        for name in weights.names:
            weights.source(name)


def _tokens(hf: Path, texts: list[str], file: Path | None, ids: list[str]) -> tuple[list[list[int]], Any]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines() if file else []
        texts = [*texts, *(line for line in lines if line.strip())]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {file}: expected a text file, a prompt a line ({error})") from None
    tokenizer, tokens = None, []
    if texts:
        from megatron_srpo.data import tokenizer_from

        tokenizer = tokenizer_from(hf)
        tokens = [tokenizer.encode(text) for text in texts]
    try:
        tokens += [[int(number) for number in given.split(",")] for given in ids]
    except ValueError:
        raise UserError(f"--token-ids: expected numbers like 1,2,3, got {ids}") from None
    if not tokens or not all(tokens):
        raise UserError("nothing to compare on: give --prompt TEXT, --prompts FILE or --token-ids 1,2,3 (not empty)")
    vocabulary = read_config(hf)["vocab_size"]
    wrong = next((number for sequence in tokens for number in sequence if not 0 <= number < vocabulary), None)
    if wrong is not None:
        raise UserError(f"token {wrong} is not of this model: expected 0 to {vocabulary - 1}")
    return tokens, tokenizer


def _traces(hf: Path, megatron: Path | None, tokens: list, config: Config, *, vllm: bool) -> dict[str, list]:
    """A trace of every prompt for each implementation. Ranks that print nothing take part in collectives only."""
    import torch

    from megatron_srpo.comparison.megatron import policy_traces
    from megatron_srpo.conversion.console import leads
    from megatron_srpo.conversion.source import checkpoint_folder
    from megatron_srpo.conversion.to_hf import check_stored

    traces: dict[str, list] = {}
    if leads():
        from megatron_srpo.comparison.engine import engine_traces
        from megatron_srpo.comparison.reference import reference_traces

        if megatron:  # first: its faults would look like those of a conversion rule
            check_stored(checkpoint_folder(megatron), hf)
        traces["transformers"] = reference_traces(hf, tokens, torch.float32)
        if config.model.dtype != "float32":
            name = f"transformers in {config.model.dtype}"
            traces[name] = reference_traces(hf, tokens, getattr(torch, config.model.dtype))
        if vllm:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            traces["vLLM"] = engine_traces(hf, tokens, config.model.dtype, device)
    found = policy_traces(hf, tokens, config, checkpoint_folder(megatron) if megatron else None)
    return {**traces, "Megatron": found or []}


def _tell(
    name: str, tokens: list, reference: list, traces: list, tolerance: float, layers: list[float], tokenizer: Any
) -> bool:
    """Print how far `traces` are from the reference; returns whether they agree. `layers`: the tolerance of each."""
    from megatron_srpo.comparison.trace import compare

    found = [compare(ours, theirs, layers) for ours, theirs in zip(reference, traces, strict=True)]
    number, worst = max(enumerate(found), key=lambda pair: pair[1].worst)
    context = tokens[number][: worst.position + 1]
    shown = repr(tokenizer.decode(context[-8:])) if tokenizer else str(context[-8:])
    token = f"{worst.token}" + (f" {tokenizer.decode([worst.token])!r}" if tokenizer else "")
    agree = worst.worst <= tolerance
    verdict = "agrees" if agree else "DIFFERS"
    print(
        f"{name}: {verdict}, worst |Δ log-prob| {worst.worst:.3g} (tolerance {tolerance:.3g})\n"
        f"  prompt {number}, position {worst.position}, after …{shown}: token {token} has {worst.ours:.5f} by "
        f"transformers, {worst.theirs:.5f} here"
    )
    if not agree:
        largest = [max(parts) for parts in zip(*(one.by_layer for one in found), strict=True)]
        at = worst.first if worst.first is not None else -1
        print(f"  first that differs: {worst.where} (tolerance {layers[at]:.2g} of the largest hidden value)")
        print("  by layer, the embedding first: " + " ".join(f"{error:.1e}" for error in largest))
    return agree


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    return run_tool(app, "compare-logits", arguments)


if __name__ == "__main__":
    raise SystemExit(main())
