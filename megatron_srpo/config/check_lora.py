"""What [lora] cannot be: contradictions with other sections and with the model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_srpo.config.schema import PROJECTIONS, Config, LoraConfig
from megatron_srpo.families import ModelShape


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
    if lora.dropout and lora.experts:
        yield (
            f"lora.dropout = {lora.dropout}: the ranks that split an expert would drop different inputs of it; set it "
            'to 0, or remove "experts" from lora.targets'
        )
    if lora.path and not (Path(lora.path) / "adapter_config.json").is_file():
        yield f'lora.path = "{lora.path}": has no adapter_config.json; name the folder of a peft adapter'


def lora_target_problems(lora: LoraConfig, shape: ModelShape) -> Iterator[str]:
    """A line for every target that the model does not have."""
    if not lora.rank:
        return
    if lora.experts and not shape.experts:
        yield 'lora.targets: "experts" is named, and the model has no experts; remove it'
    dense = [name for name in ("mlp", *PROJECTIONS["mlp"]) if name in lora.targets]
    if dense and shape.experts and all(shape.expert_layers):
        yield (
            f'lora.targets: "{dense[0]}" means the MLPs of layers without experts, and every layer of the model has '
            'experts; write "experts" to adapt these too (an adapter for each), or ["attention"] alone'
        )
