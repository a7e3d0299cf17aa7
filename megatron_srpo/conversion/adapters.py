"""LoRA adapters of a checkpoint, merged into their base model as a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_srpo.bridge import BridgeError, weight_table, write_hf_folder
from megatron_srpo.bridge.base_checksum import Checksum
from megatron_srpo.bridge.load import WeightFolder, check_names
from megatron_srpo.config import LoraConfig, ParallelConfig
from megatron_srpo.core.json_types import read_json
from megatron_srpo.families import HfConfig

Named = tuple[str, torch.Tensor]


def stored_lora(checkpoint: Path) -> LoraConfig | None:
    """The [lora] section that a checkpoint was trained with; None if it holds all weights."""
    try:
        match read_json(checkpoint / "config.json"):
            case {"lora": {**section}} if section.get("rank"):
                return LoraConfig.model_validate(section)
    except FileNotFoundError:
        pass
    except ValueError as error:
        raise BridgeError(f"{checkpoint / 'config.json'} has no usable [lora] section: {error}") from error
    return None


@dataclass(frozen=True)
class Merge:
    """The adapters of a checkpoint, to be merged into their base model."""

    checkpoint: Path
    lora: LoraConfig
    adapters: dict[str, torch.Tensor]  # by peft's names without the prefix
    base: Path  # Hugging Face folder of the base model
    hf_config: HfConfig

    def write(self, out: Path, *, tokenizer: Path, dtype: torch.dtype | None, max_shard_bytes: int) -> None:
        """Write the merged model. Raises BridgeError, and leaves nothing, if the adapters belong to another base."""
        write_hf_folder(self._weights(), self.base, out, dtype, max_shard_bytes, tokenizer=tokenizer)

    def _weights(self) -> Iterator[Named]:
        """The merged weights, in the dtype in which the run had them."""
        from megatron_srpo.mcore.meta_model import rank_share
        from megatron_srpo.mcore.safe_files import read_tensors

        stored: Any = read_tensors(self.checkpoint / "common.pt")
        expected = stored["progress"]["base"]
        dtype = getattr(torch, expected.partition(":")[0])
        shards = rank_share(self.hf_config, ParallelConfig(), 0).shards
        table = weight_table(self.hf_config, shards.padded_vocab_size)
        found = Checksum()
        folder = WeightFolder(self.base)
        with folder:
            check_names(folder, table)
            for mapped in map(table.lookup, shards.parameters):
                for name in mapped.hf_names if mapped.exported else ():
                    weight = folder.source(name)[:].to(dtype)
                    found.add(mapped.hf_names, weight)
                    yield name, self._merged(name, weight)
        if str(found) != expected:
            raise BridgeError(
                f"{self.checkpoint} holds adapters of another base model: its weights have the checksum {expected}, "
                f"and those of {self.base} {found}. Name the model that the adapters were trained on with --hf DIR."
            )

    def _merged(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """As mcore.lora.AdaptedLinear.merged_weight: W + scale · B A in fp32, in the dtype of W."""
        module = name.removesuffix(".weight")
        a, b = (self.adapters.get(f"{module}.lora_{factor}.weight") for factor in "AB")
        if a is None or b is None:
            return weight
        return torch.add(weight.float(), b.float() @ a.float(), alpha=self.lora.scale).to(weight.dtype)
