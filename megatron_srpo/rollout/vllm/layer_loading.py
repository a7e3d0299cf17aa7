"""How each kind of layer of a running vLLM model takes new weights:

in place    the layer computes with its weights as they were loaded: new ones are loaded into the same memory
packed      a linear layer or LM head on a CPU computes with a packed copy: it is loaded, then packed again
repacked    other layers (experts, quantised ones): vLLM's layer-wise reload rebuilds the whole layer
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from megatron_srpo.bridge.buffers import Buffers
from megatron_srpo.bridge.verify import sources_of

if TYPE_CHECKING:
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    PackedLayer: TypeAlias = LinearBase | ParallelLMHead


def _is_plain(layer: torch.nn.Module) -> bool:
    """Whether the layer's weights are not quantised."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    return type(getattr(layer, "quant_method", None)) in (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)


def _is_packed(layer: torch.nn.Module) -> bool:
    """Whether the layer computes with a packed copy. On a CPU it lives in the closure of the layer's `cpu_linear`."""
    return _is_plain(layer) and bool(getattr(getattr(layer, "cpu_linear", None), "__closure__", None))


def is_loaded_in_place(layer: torch.nn.Module) -> bool:
    """Whether the layer computes with its parameters' own memory, in the form in which they are loaded."""
    if getattr(layer, "quant_method", None) is None:
        return not hasattr(layer, "process_weights_after_loading") or next(layer.parameters(), None) is None
    return _is_plain(layer) and not _is_packed(layer)


class RepackedLayers:
    """The layers of a model that are neither loaded in place nor packed, in the form of a model for vLLM's reload."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._layers = [m for m in model.modules() if not is_loaded_in_place(m) and not _is_packed(m)]

    def modules(self) -> list[torch.nn.Module]:
        return self._layers


def forget_packed_embeddings(model: torch.nn.Module) -> None:
    """Drop the packed copy of an input embedding that is not also the `lm_head`: it is looked up, never multiplied.

    vLLM packs it all the same. A plain linear product replaces the packed one, in case a model does use it."""
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    heads = {id(getattr(module, "lm_head", None)) for module in model.modules()}
    for layer in model.modules():
        if type(layer) is VocabParallelEmbedding and _is_packed(layer) and id(layer) not in heads:
            layer.cpu_linear = torch.nn.functional.linear  # type: ignore[assignment]  # vLLM's attribute


def packed_layers(model: torch.nn.Module) -> dict[str, PackedLayer]:
    """A model's packed layers, by name."""
    return {name: layer for name, layer in model.named_modules() if _is_packed(layer)}


class PackedLayers:
    """The packed layers of a model.

    A linear layer has no other copy of its weight. It gets memory for the weight when the first tensor comes, is packed
    when the last one has come, and leaves the memory to the next layer. An LM head keeps its weight, which may be the
    embedding's: it is loaded in place and packed at the end. Biases are not packed.

    `names` are the Hugging Face names of the tensors of a publish.
    """

    def __init__(self, model: torch.nn.Module, names: Iterable[str]) -> None:
        fused, names = getattr(model, "packed_modules_mapping", {}), list(names)
        packed = packed_layers(model)
        self._heads = [layer for layer in packed.values() if layer.weight.numel() > 0]
        # The number of tensors that make up a weight; 0 when vLLM's table does not tell: the layer is packed at the
        # end.
        self._parts = {
            layer: len(sources_of(f"{name}.weight", names, fused, {}))
            for name, layer in packed.items()
            if layer.weight.numel() == 0
        }
        self._awaited: dict[PackedLayer, int] = {}  # layer → number of its tensors that are still to come

    def begin(self) -> None:
        """Make the linear layers ready to load."""
        self._awaited, buffers = dict(self._parts), Buffers(torch.device("cpu"))
        for layer in self._parts:
            layer.register_parameter("weight", self._loading_form(layer, buffers))

    def _loading_form(self, layer: PackedLayer, buffers: Buffers) -> torch.nn.Parameter:
        """The weight's parameter as it was before vLLM first packed it, still without memory."""
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
        from vllm.model_executor.model_loader.reload.sanitize import restore_layer_refs

        recorded = get_layerwise_info(layer).restore_metadata[0]["weight"]
        form: Any = torch.empty(0, dtype=recorded.dtype)  # becomes one of vLLM's parameters
        form.__class__, form.__dict__ = recorded.__class__, recorded.__dict__.copy()
        load = restore_layer_refs(form, layer).weight_loader

        def load_and_pack(parameter: torch.nn.Parameter, *arguments: object, **options: object) -> object:
            if parameter.numel() == 0:
                flat = buffers.take(recorded.numel() * recorded.element_size())
                parameter.data = flat.view(recorded.dtype).view(recorded.shape)
            result = load(parameter, *arguments, **options)
            self._awaited[layer] -= 1
            if self._awaited[layer] == 0:
                self._pack(layer)
            return result

        form.weight_loader = load_and_pack
        return form

    def _pack(self, layer: PackedLayer) -> None:
        layer.cpu_linear = None  # frees the old copy before the new one is made
        layer.quant_method.process_weights_after_loading(layer)
        self._awaited.pop(layer, None)

    def finish(self) -> None:
        """Pack the remaining layers. All tensors must have come."""
        for layer in [*self._awaited, *self._heads]:
            self._pack(layer)

    def abandon(self) -> None:
        """Layers that are not complete continue with their old packed copy. Their bias may be new."""
        for layer in self._awaited:
            layer.weight = torch.nn.Parameter(torch.empty(0, dtype=layer.weight.dtype), requires_grad=False)
        self._awaited = {}
