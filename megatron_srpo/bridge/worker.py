"""The engine's half of a publish: new weights into a running vLLM worker.

Each layer is loaded in the way that suits it (worker_layers.py). An updated engine then equals an engine that was
started on the new weights, bit for bit.

vLLM itself takes too much on trust: it cuts larger tensors to size, ignores what comes twice, and leaves memory
uninitialised where a part of a fused layer does not come. So names and shapes are checked here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megatron_srpo.bridge.errors import BridgeError, nearest
from megatron_srpo.bridge.load import IGNORED_SUFFIXES, WeightFolder
from megatron_srpo.bridge.rules import shape_of
from megatron_srpo.bridge.verify import Report, digest, sources_of, total
from megatron_srpo.bridge.worker_layers import Packed, Repacked, forget_packed_embeddings

CURE = "Trainer and engine hold different models: start both from the same folder."


def folder_shapes(folder: str) -> dict[str, tuple[int, ...]]:
    """Name → shape of the weights in a Hugging Face folder, from the files' headers."""
    with WeightFolder(folder) as weights:
        names = [name for name in sorted(weights.names) if not name.endswith(IGNORED_SUFFIXES)]
        return {name: shape_of(weights.source(name)) for name in names}


def _forget_packed_experts(model: Any) -> None:
    """On a CPU vLLM packs experts when it makes their kernel, at the first load alone, and copies later weights as they
    are into the packed ones' place. Without a kernel it makes one, and packs, again."""
    from vllm.platforms import current_platform

    for layer in model.modules() if current_platform.is_cpu() else ():
        method = getattr(layer, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


class WeightLoader:
    """New weights for one worker's model: `begin`, `load` as often as needed, `finish`.

    Nothing may be generated in between. The loader may hold a tensor until its layer is complete (experts for example):
    tensors of a layer should be neighbours and must not be overwritten in the meantime.

    A publish must bring every tensor of the folder that the engine was started from, once (a tied head under the
    embedding's name alone). Raises BridgeError for a name or shape that does not fit, and for what is missing. After a
    failure, whatever its reason, some layers are new and some old: publish again before generating.
    """

    def __init__(self, model: torch.nn.Module, vllm_config: Any) -> None:
        self._model, self._vllm_config = model, vllm_config
        self._shapes = folder_shapes(vllm_config.model_config.model)
        forget_packed_embeddings(model)
        self._repacked, self._packed = Repacked(model), Packed(model, self._shapes)
        # The engine's own, fused names. A tied head is the embedding under a second one.
        first: dict[int, str] = {}
        self._names, self._aliases = [], {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            found = first.setdefault(id(parameter), name)
            if found == name:
                self._names.append(name)
            else:
                self._aliases[found] = name

    def begin(self, *, verify: bool = False) -> None:
        """Give the layers their loading form back. `verify`: keep the checksums that `report` gives."""
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        self._expected = {name: s for name, s in self._shapes.items() if name not in self._aliases.values()}
        self._awaited = set(self._names)
        _forget_packed_experts(self._model)
        with set_current_vllm_config(self._vllm_config):
            initialize_layerwise_reload(self._repacked)
        self._packed.begin()
        self._ledger = Ledger(self._model, self._vllm_config.model_config.dtype, self._aliases) if verify else None

    @torch.no_grad()
    def load(self, items: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load (Hugging Face name, full tensor) pairs; each rank of a tensor-parallel engine takes its part."""
        from vllm.config import set_current_vllm_config

        with self._abandoned_on_failure(), set_current_vllm_config(self._vllm_config):
            self._awaited -= self._model.load_weights(self._checked(items))

    def _checked(self, items: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in items:
            self._check(name, tuple(tensor.shape))
            if self._ledger is not None:
                self._ledger.receive(name, tensor)
            yield name, tensor

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        expected = self._expected.pop(name, None)
        if expected is None:
            why = "came before, or is tied to another" if name in self._shapes else "is not in its folder"
            raise BridgeError(f"the engine was published {name!r}, which {why}.{nearest(name, self._expected)} {CURE}")
        if shape != expected:
            raise BridgeError(f"{name!r} was published with shape {list(shape)}: expected {list(expected)}. {CURE}")

    def finish(self) -> None:
        """Repack what is not yet repacked. Raises BridgeError when something got no weights."""
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
        """The checksums of a finished publish, for Verifier.compare."""
        return None if self._ledger is None else self._ledger.report()

    @contextmanager
    def _abandoned_on_failure(self) -> Iterator[None]:
        """On a failure, layers that are not complete get back the old tensors that they were not loaded into: the next
        publish finds an engine in order, and no layer is left in uninitialised memory."""
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader import reload
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

        try:
            yield
        except BaseException:
            if self._ledger is not None:
                self._ledger.close()
            self._packed.abandon()
            for layer in self._repacked.modules():
                info = get_layerwise_info(layer)
                if info.can_load():
                    info.load_numel = 0
                    info.loaded_weights.clear()
            with set_current_vllm_config(self._vllm_config):
                reload.finalize_layerwise_reload(self._repacked, self._vllm_config.model_config)
            raise


class Ledger:
    """Checksums of what arrives at one worker, and of its parameters when vLLM has loaded them and not yet repacked
    them: afterwards the values may be out of reach inside a kernel's own format."""

    def __init__(self, model: torch.nn.Module, dtype: torch.dtype, aliases: dict[str, str]) -> None:
        self._model, self._dtype = model, dtype
        self._aliases = {alias: name for name, alias in aliases.items()}
        self._received: dict[str, int] = {}
        self._totals: dict[str, int] = {}
        self._held: dict[str, int] = {}
        self._methods = []
        prefixes: dict[int, list[str]] = {}  # a module may be known under several names
        for name, module in model.named_modules(remove_duplicate=False):
            prefixes.setdefault(id(module), []).append(name)
        for module in model.modules():
            method = getattr(module, "quant_method", None)
            if method is not None and "process_weights_after_loading" not in vars(method):
                self._methods.append(method)
                method.process_weights_after_loading = self._watching(method.process_weights_after_loading, prefixes)

    def _watching(self, process: Callable[..., Any], prefixes: dict[int, list[str]]) -> Callable[..., Any]:
        def count_and_process(layer: torch.nn.Module) -> Any:
            for name, parameter in layer.named_parameters(recurse=False):
                if name != "bias":  # it is never repacked, and may come after the weight is
                    held = total(parameter)
                    self._held.update({f"{prefix}.{name}": held for prefix in prefixes[id(layer)]})
            return process(layer)

        return count_and_process

    def receive(self, name: str, tensor: torch.Tensor) -> None:
        self._received[name] = digest(tensor)
        self._totals[name] = total(tensor.to(self._dtype))

    def close(self) -> None:
        """Leave vLLM's methods as they were."""
        for method in self._methods:
            del method.process_weights_after_loading
        self._methods = []

    def report(self) -> Report:
        self.close()
        packed = getattr(self._model, "packed_modules_mapping", {})
        sources = {}
        for name, parameter in self._model.named_parameters(remove_duplicate=False):
            found = sources_of(name, self._totals, packed, self._aliases)
            if found:
                sources[name] = found
                if name not in self._held:  # not repacked; some products want a bias in fp32
                    self._held[name] = total(parameter.to(self._dtype))
        held = {name: self._held[name] for name in sources}
        return {"received": self._received, "totals": self._totals, "held": held, "sources": sources}


class PublishExtension:
    """Mixed into vLLM's worker by `worker_extension_cls="megatron_srpo.bridge.worker.PublishExtension"`."""

    vllm_config: Any  # of the worker
    model_runner: Any
    _publisher: WeightLoader | None = None

    def publish_weights(self, items: Iterable[tuple[str, torch.Tensor]], verify: bool = False) -> Report | None:
        """A whole publish from an iterator, tensor by tensor, without copies; in-process engines only. See
        WeightLoader; the result is its report."""
        if self._publisher is None:
            self._publisher = WeightLoader(self.model_runner.get_model(), self.vllm_config)
        self._publisher.begin(verify=verify)
        self._publisher.load(items)
        self._publisher.finish()
        return self._publisher.report()
