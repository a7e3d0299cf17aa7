"""Loads a publish of LoRA adapters into a running vLLM worker. The base weights of the engine stay as they are.

The engine serves one adapter, `ADAPTER`, whose factors come from memory and not from a folder: vLLM is handed them as
if it had read them (LoRAModel.from_lora_tensors), so an engine after a publish equals one that has loaded the exported
folder of peft, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, cast

import torch

from megatron_srpo.bridge.errors import BridgeError
from megatron_srpo.bridge.verify import Report, digest, total
from megatron_srpo.config import LoraConfig
from megatron_srpo.core.errors import nearest
from megatron_srpo.rollout.vllm.weight_loader import CURE, folder_shapes

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.request import LoRARequest

ADAPTER, ADAPTER_ID = "adapter", 1  # vLLM's name and number of the adapter that a run serves
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vLLM's MaxLoRARanks: the sizes of its buffers
PEFT_PREFIX = "base_model.model."


def adapter_arguments(lora: LoraConfig) -> dict[str, bool | int | list[str]]:
    """The arguments of an engine that serves one adapter of these settings."""
    return {
        "enable_lora": True,
        "max_loras": 1,
        "max_cpu_loras": 1,
        "max_lora_rank": next(size for size in RANKS if size >= lora.rank),
        "lora_target_modules": list(lora.projections),  # other layers stay without the cost of adapters
    }


def adapter_request() -> LoRARequest:
    """What a request names to be answered with the published adapter. vLLM wants a path and never reads it, because the
    adapter is there."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(ADAPTER, ADAPTER_ID, "published")


def adapter_shapes(folder: str, lora: LoraConfig) -> dict[str, tuple[int, ...]]:
    """Name → shape of every factor of the adapters on the model in a Hugging Face folder."""
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in folder_shapes(folder).items():
        module = name.removesuffix(".weight")
        if module == name or ".experts." in name or module.rpartition(".")[2] not in lora.projections:
            continue
        outputs, inputs = shape
        found |= {f"{module}.lora_A.weight": (lora.rank, inputs), f"{module}.lora_B.weight": (outputs, lora.rank)}
    return found


class AdapterLoader:
    """Loads new adapters into one worker: call `begin`, `load` one or more times, then `finish`, as with WeightLoader.

    A publish must bring every factor exactly once, under peft's names without their prefix. Raises BridgeError for a
    name or shape that does not fit, and for missing factors; the engine then keeps the adapters that it had.
    """

    def __init__(self, model: torch.nn.Module, vllm_config: VllmConfig, lora: LoraConfig) -> None:
        self._manager = cast("Any", model.lora_manager)  # vLLM's LoRAModelManager
        self._lora, self._dtype = lora, vllm_config.model_config.dtype
        self._device: torch.device = self._manager.device
        self._shapes = adapter_shapes(vllm_config.model_config.model, lora)
        self._adapter: LoRAModel | None = None  # the last one that was published

    def begin(self, *, verify: bool = False) -> None:
        self._verify = verify
        self._tensors: dict[str, torch.Tensor] = {}
        self._received: dict[str, int] = {}

    @torch.no_grad()
    def load(self, items: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Keep a copy of (name, full factor) pairs."""
        for name, tensor in items:
            self._check(name, tuple(tensor.shape))
            if self._verify:
                self._received[name] = digest(tensor)
            self._tensors[name] = tensor.to(self._device, self._dtype, copy=True)

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        expected = self._shapes.get(name)
        if expected is None or name in self._tensors:
            why = "came before" if expected else "is no factor of the run's adapters"
            raise BridgeError(f"the engine was published {name!r}, which {why}.{nearest(name, self._shapes)} {CURE}")
        if shape != expected:
            raise BridgeError(f"{name!r} was published with shape {list(shape)}: expected {list(expected)}. {CURE}")

    @torch.no_grad()
    def finish(self) -> None:
        """Put the adapters in the place of those that the engine has. Raises BridgeError when a factor is missing."""
        from vllm.lora.lora_model import LoRAModel
        from vllm.lora.peft_helper import PEFTHelper

        missing = sorted(self._shapes.keys() - self._tensors.keys())
        if missing:
            raise BridgeError(f"the publish lacks {len(missing)} factor(s), the first is {missing[0]!r}. {CURE}")
        self._totals = {name: total(self._scaled(name, tensor)) for name, tensor in self._tensors.items()} if (
            self._verify
        ) else {}  # fmt: skip
        lora = self._lora
        settings = PEFTHelper(
            r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.projections), use_rslora=lora.rslora
        )
        named = {PEFT_PREFIX + name: tensor for name, tensor in self._tensors.items()}
        self._adapter = LoRAModel.from_lora_tensors(
            ADAPTER_ID, named, settings, device=str(self._device), dtype=self._dtype
        )
        self._manager.remove_adapter(ADAPTER_ID)
        self._activate()
        self._tensors = {}

    def _activate(self) -> None:
        self._manager.add_adapter(self._adapter)
        self._manager.activate_adapter(ADAPTER_ID)

    def outlive_reset(self) -> None:
        """Keep the adapter when vLLM forgets all: at the end of a server's weight update it takes the base weights for
        changed (LoRAModelRunnerMixin.reset_lora_state)."""
        forget = self._manager.remove_all_adapters

        def forget_and_restore() -> None:
            forget()
            if self._adapter is not None:
                self._activate()

        self._manager.remove_all_adapters = forget_and_restore

    def _scaled(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """As the engine holds it: vLLM multiplies B by the scale."""
        return tensor * self._lora.scale if name.endswith("lora_B.weight") else tensor

    def report(self) -> Report | None:
        """The checksums of a finished publish, for Verifier.compare; None if it was not verified."""
        if not self._verify:
            return None
        held, sources = {}, {}
        for buffer, name, tensor in self._buffers():
            if name in self._totals:
                held[buffer], sources[buffer] = total(tensor), [name]
        return {"received": self._received, "totals": self._totals, "held": held, "sources": sources}

    def _buffers(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        """(name of the engine's buffer, published name, what it holds), for every factor of every projection. Buffers
        are padded with zeros to vLLM's rank."""
        manager = self._manager
        slot = manager.lora_index_to_id.index(ADAPTER_ID)
        for module_name, layer in manager.modules.items():
            parent, _, leaf = module_name.rpartition(".")
            for number, part in enumerate(manager.packed_modules_mapping.get(leaf) or [leaf]):
                for factor, buffers in (("lora_A", layer.lora_a_stacked), ("lora_B", layer.lora_b_stacked)):
                    yield f"{module_name}.{factor}.{number}", f"{parent}.{part}.{factor}.weight", buffers[number][slot]
