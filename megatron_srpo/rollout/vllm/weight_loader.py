"""Loads a publish into the model of a running vLLM worker.

Each layer takes its weights in the way that suits it (layer_loading.py). An updated engine then equals an engine that
was started on the new weights, bit for bit.

vLLM itself does not check enough: it cuts larger tensors to size, ignores a tensor that comes twice, and leaves memory
uninitialised where a part of a fused layer does not come. So names and shapes are checked here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import torch

from megatron_srpo.bridge.errors import BridgeError
from megatron_srpo.bridge.load import IGNORED_SUFFIXES, WeightFolder
from megatron_srpo.bridge.rules import shape_of
from megatron_srpo.bridge.verify import Report, digest, sources_of, total
from megatron_srpo.core.errors import nearest
from megatron_srpo.rollout.vllm.layer_loading import PackedLayers, RepackedLayers, forget_packed_embeddings

if TYPE_CHECKING:
    from vllm.config import VllmConfig

CURE = "Trainer and engine hold different models: start both from the same folder."


def folder_shapes(folder: str) -> dict[str, tuple[int, ...]]:
    """Name → shape of the weights in a Hugging Face folder, read from the headers of its files."""
    with WeightFolder(folder) as weights:
        names = [name for name in sorted(weights.names) if not name.endswith(IGNORED_SUFFIXES)]
        return {name: shape_of(weights.source(name)) for name in names}


class _ProcessWeights(Protocol):
    """vLLM's `process_weights_after_loading` of a layer's method."""

    def __call__(self, layer: torch.nn.Module) -> None: ...


def _forget_packed_experts(model: torch.nn.Module) -> None:
    """Make vLLM pack experts again. On a CPU it packs them only when it makes their kernel, at the first load, and
    would copy later weights unpacked into the place of the packed ones. Without a kernel it makes one, and packs,
    again."""
    from vllm.platforms import current_platform

    for layer in model.modules() if current_platform.is_cpu() else ():
        method = getattr(layer, "quant_method", None)
        if method is not None and getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


class WeightLoader:
    """Loads new weights into one worker's model: call `begin`, `load` one or more times, then `finish`.

    The engine must not generate in between. The loader may hold a tensor until its layer is complete (for example
    experts), so the tensors of a layer should follow each other, and must not be overwritten in the meantime.

    A publish must bring every tensor of the folder that the engine was started from exactly once; a tied head comes
    under the embedding's name only. Raises BridgeError for a name or shape that does not fit, and for missing tensors.
    After any failure some layers are new and some are old: publish again before generating.
    """

    def __init__(self, model: torch.nn.Module, vllm_config: VllmConfig) -> None:
        self._model, self._vllm_config = model, vllm_config
        self._shapes = folder_shapes(vllm_config.model_config.model)
        forget_packed_embeddings(model)
        self._repacked, self._packed = RepackedLayers(model), PackedLayers(model, self._shapes)
        # The engine's own names, of fused layers. A tied head is the embedding under a second name.
        first: dict[int, str] = {}
        self._names: list[str] = []
        self._aliases: dict[str, str] = {}
        self._checksums: LoadChecksums | None = None  # of a publish that is verified
        for name, parameter in model.named_parameters(remove_duplicate=False):
            found = first.setdefault(id(parameter), name)
            if found == name:
                self._names.append(name)
            else:
                self._aliases[found] = name

    def begin(self, *, verify: bool = False) -> None:
        """Bring the layers back into the form in which they load weights. With `verify`, keep checksums for
        `report`."""
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        self._expected = {name: s for name, s in self._shapes.items() if name not in self._aliases.values()}
        self._awaited = set(self._names)
        _forget_packed_experts(self._model)
        with set_current_vllm_config(self._vllm_config):
            initialize_layerwise_reload(self._repacked)
        self._packed.begin()
        self._checksums = (
            LoadChecksums(self._model, self._vllm_config.model_config.dtype, self._aliases) if verify else None
        )

    @torch.no_grad()
    def load(self, items: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load (Hugging Face name, full tensor) pairs. Each rank of a tensor-parallel engine takes its part."""
        from vllm.config import set_current_vllm_config

        with self._abandoned_on_failure(), set_current_vllm_config(self._vllm_config):
            self._awaited -= self._model.load_weights(self._checked(items))  # type: ignore[operator]  # vLLM's method

    def _checked(self, items: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in items:
            self._check(name, tuple(tensor.shape))
            if self._checksums is not None:
                self._checksums.receive(name, tensor)
            yield name, tensor

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        expected = self._expected.pop(name, None)
        if expected is None:
            why = "came before, or is tied to another" if name in self._shapes else "is not in its folder"
            raise BridgeError(f"the engine was published {name!r}, which {why}.{nearest(name, self._expected)} {CURE}")
        if shape != expected:
            raise BridgeError(f"{name!r} was published with shape {list(shape)}: expected {list(expected)}. {CURE}")

    def finish(self) -> None:
        """Repack the remaining layers. Raises BridgeError when a tensor is missing."""
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        with self._abandoned_on_failure(), set_current_vllm_config(self._vllm_config):
            missing = sorted(self._expected) or sorted(self._awaited)
            if missing:
                raise BridgeError(
                    f"the publish left {len(missing)} tensor(s) of the engine on old weights, the first is "
                    f"{missing[0]!r}. {CURE}"
                )
            self._packed.finish()
            finalize_layerwise_reload(self._repacked, self._vllm_config.model_config)

    def report(self) -> Report | None:
        """The checksums of a finished publish, for Verifier.compare; None if it was not verified."""
        return None if self._checksums is None else self._checksums.report()

    @contextmanager
    def _abandoned_on_failure(self) -> Iterator[None]:
        """On a failure, give layers that are not complete their old tensors back. So the next publish finds an engine
        in order, and no layer is left with uninitialised memory."""
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader import reload
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

        try:
            yield
        except BaseException:
            if self._checksums is not None:
                self._checksums.close()
            self._packed.abandon()
            for layer in self._repacked.modules():
                info = get_layerwise_info(layer)
                if info.can_load():
                    info.load_numel = 0
                    info.loaded_weights.clear()
            with set_current_vllm_config(self._vllm_config):
                reload.finalize_layerwise_reload(self._repacked, self._vllm_config.model_config)
            raise


class LoadChecksums:
    """Checksums of the tensors that arrive at one worker, and of its parameters.

    A parameter is summed after vLLM has loaded it and before vLLM repacks it: a kernel's own format may hide the values
    later."""

    def __init__(self, model: torch.nn.Module, dtype: torch.dtype, aliases: dict[str, str]) -> None:
        self._model, self._dtype = model, dtype
        self._aliases = {alias: name for name, alias in aliases.items()}
        self._received: dict[str, int] = {}
        self._totals: dict[str, int] = {}
        self._held: dict[str, int] = {}
        self._methods: list[object] = []  # vLLM's, of the layers whose process_weights_after_loading we wrap
        prefixes: dict[int, list[str]] = {}  # by module, which may have several names
        for name, module in model.named_modules(remove_duplicate=False):
            prefixes.setdefault(id(module), []).append(name)
        for module in model.modules():
            method = getattr(module, "quant_method", None)
            if method is not None and "process_weights_after_loading" not in vars(method):
                self._methods.append(method)
                method.process_weights_after_loading = self._summing(method.process_weights_after_loading, prefixes)

    def _summing(self, process: _ProcessWeights, prefixes: dict[int, list[str]]) -> _ProcessWeights:
        def sum_and_process(layer: torch.nn.Module) -> None:
            for name, parameter in layer.named_parameters(recurse=False):
                if name != "bias":  # a bias is never repacked, and may come after the weight was repacked
                    held = total(parameter)
                    self._held.update({f"{prefix}.{name}": held for prefix in prefixes[id(layer)]})
            process(layer)

        return sum_and_process

    def receive(self, name: str, tensor: torch.Tensor) -> None:
        self._received[name] = digest(tensor)
        self._totals[name] = total(tensor.to(self._dtype))

    def close(self) -> None:
        """Restore vLLM's methods."""
        for method in self._methods:
            del method.process_weights_after_loading  # type: ignore[attr-defined]
        self._methods = []

    def report(self) -> Report:
        self.close()
        packed = getattr(self._model, "packed_modules_mapping", {})
        sources = {}
        for name, parameter in self._model.named_parameters(remove_duplicate=False):
            found = sources_of(name, self._totals, packed, self._aliases)
            if found:
                sources[name] = found
                if name not in self._held:  # it is not repacked; some kernels hold a bias in fp32
                    self._held[name] = total(parameter.to(self._dtype))
        held = {name: self._held[name] for name in sources}
        return {"received": self._received, "totals": self._totals, "held": held, "sources": sources}
