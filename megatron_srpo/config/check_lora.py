"""[lora] with the rest of the configuration: what it cannot be, and what it means for publishes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from megatron_srpo.config.model_folder import read_model_folder
from megatron_srpo.config.schema import PROJECTIONS, Config, LoraConfig
from megatron_srpo.families import ModelShape, expert_count


def lora_problems(config: Config) -> Iterator[str]:
    """A line for every contradiction with other sections."""
    lora = config.lora
    if not lora.rank:
        if lora.path:
            yield (
                f'lora.path = "{lora.path}": lora.rank is 0, so that all weights would be trained without this '
                "adapter; set lora.rank to the adapter's rank, or remove lora.path"
            )
        return
    if not lora.targets:
        yield 'lora.targets = []: nothing would be trained; name projections, for example ["attention", "mlp"]'
    if config.model.fp8 != "off":
        yield (
            f'model.fp8 = "{config.model.fp8}": adapters on FP8 products have not been tested; set it to "off", or '
            "lora.rank = 0"
        )
    if config.train.moe_aux_loss_coef:
        yield (
            f"train.moe_aux_loss_coef = {config.train.moe_aux_loss_coef}: with adapters the routers are not trained, "
            "and this loss would bend the adapters to balance the experts; set it to 0, or lora.rank = 0"
        )
    if lora.dropout and lora.experts:
        yield (
            f"lora.dropout = {lora.dropout}: the ranks that split an expert would drop different inputs of it; set it "
            'to 0, or remove "experts" from lora.targets'
        )
    if lora.publish == "adapter" and not lora.servable:
        what = "adapters on experts (lora.targets)" if lora.experts else f"lora.rank = {lora.rank}, above 512"
        yield f'lora.publish = "adapter": the engines cannot serve {what}; set it to "auto" or "merged"'
    if lora.path and not (Path(lora.path) / "adapter_config.json").is_file():
        what = "has no adapter_config.json" if Path(lora.path).is_dir() else "no such folder"
        yield f'lora.path = "{lora.path}": {what}; name the folder of a peft adapter'


def lora_target_problems(lora: LoraConfig, shape: ModelShape, stages: int = 1) -> Iterator[str]:
    """A line for every target that the model does not have, or that a pipeline `stages` deep cannot have."""
    if not lora.rank:
        return
    if lora.experts and not shape.experts:
        yield 'lora.targets: "experts" is named, and the model has no experts; remove it'
    if lora.rank > shape.hidden:
        yield (
            f"lora.rank = {lora.rank}: is above the model's hidden size, {shape.hidden}, so that adapters would be "
            "larger than the weights; lower it"
        )
    dense = [name for name in ("mlp", *PROJECTIONS["mlp"]) if name in lora.targets]
    if dense and shape.experts and all(shape.expert_layers):
        yield (
            f'lora.targets: "{dense[0]}" means the MLPs of layers without experts, and every layer of the model has '
            'experts; write "experts" to adapt these too (an adapter for each), or ["attention"] alone'
        )

    attention = any(name in lora.targets for name in ("attention", *PROJECTIONS["attention"]))
    adapted = [lora.experts if expert else bool(dense) for expert in shape.expert_layers if shape.experts]
    if stages > 1 and not attention and not all(adapted):
        yield (
            f"lora.targets = {json.dumps(lora.targets)}: not every layer has such a projection, and a pipeline stage "
            'without any adapter is not supported; add "attention", or set pipeline_model_parallel_size = 1'
        )


def published_adapters(config: Config) -> LoraConfig | None:
    """The adapters that publishes bring to the engines, or None if they bring whole models."""
    lora = config.lora
    return lora.published(expert_count(read_model_folder(config.model.path))) if lora.rank else None


def starts_with_publish(config: Config) -> bool:
    """Whether engines need a publish before the first iteration: model.path does not have the run's adapters."""
    return bool(config.lora.path or published_adapters(config))
