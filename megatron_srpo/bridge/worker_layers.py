"""How each layer of a running vLLM model takes new weights:

in place    computes with its weights as they were loaded: they are loaded where they stand
packed      a linear layer or LM head on a CPU, which computes with a packed copy: loaded, then packed again
repacked    others (experts, quantisation): vLLM's layer-wise reload, which makes everything of a layer anew
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from megatron_srpo.bridge.buffers import Buffers
from megatron_srpo.bridge.verify import sources_of


def _is_plain(layer: torch.nn.Module) -> bool:
    """Whether its weights are not quantised."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    return type(getattr(layer, "quant_method", None)) in (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)


def _is_packed(layer: torch.nn.Module) -> bool:
    """On a CPU a packed copy of the weights lives in the closure of the product that vLLM has chosen for this layer."""
    return _is_plain(layer) and bool(getattr(getattr(layer, "cpu_linear", None), "__closure__", None))


def is_loaded_in_place(layer: torch.nn.Module) -> bool:
    """Whether its parameters are the very memory that it computes with, in the form in which they are loaded."""
    if getattr(layer, "quant_method", None) is None:
        return not hasattr(layer, "process_weights_after_loading") or next(layer.parameters(), None) is None
    return _is_plain(layer) and not _is_packed(layer)


class Repacked:
    """Of a model the layers that are neither loaded in place nor packed, as vLLM's layer-wise reload wants a model."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._layers = [m for m in model.modules() if not is_loaded_in_place(m) and not _is_packed(m)]

    def modules(self) -> list[torch.nn.Module]:
        return self._layers


def forget_packed_embeddings(model: torch.nn.Module) -> None:
    """vLLM packs an input embedding too, though it is looked up and nothing is multiplied with it, unless the model has
    it as its `lm_head` as well. A plain product stands by, which is right wherever a model should use it after all."""
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    heads = {id(getattr(module, "lm_head", None)) for module in model.modules()}
    for layer in model.modules():
        if type(layer) is VocabParallelEmbedding and _is_packed(layer) and id(layer) not in heads:
            layer.cpu_linear = torch.nn.functional.linear


def packed_layers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """A model's packed layers, by name."""
    return {name: layer for name, layer in model.named_modules() if _is_packed(layer)}


class Packed:
    """Of a model the packed layers. A linear layer has no other copy of its weight: it is given memory for it when the
    first tensor comes, packs it when the last has come, and leaves the memory to the next layer. An LM head keeps its
    weight (the embedding may be the same), which is loaded in place, and is packed at the end. Biases are not packed.

    `names`: the tensors of a publish, by their Hugging Face names.
    """

    def __init__(self, model: torch.nn.Module, names: Iterable[str]) -> None:
        fused, names = getattr(model, "packed_modules_mapping", {}), list(names)
        packed = packed_layers(model)
        self._heads = [layer for layer in packed.values() if layer.weight.numel() > 0]
        # How many tensors a weight is made of. 0: vLLM's table does not tell, and the layer is packed at the end.
        self._parts = {
            layer: len(sources_of(f"{name}.weight", names, fused, {}))
            for name, layer in packed.items()
            if layer.weight.numel() == 0
        }
        self._awaited: dict[torch.nn.Module, int] = {}  # tensors that have not come

    def begin(self) -> None:
        """Make the linear layers ready to load."""
        self._awaited, buffers = dict(self._parts), Buffers(torch.device("cpu"))
        for layer in self._parts:
            layer.register_parameter("weight", self._loading_form(layer, buffers))

    def _loading_form(self, layer: torch.nn.Module, buffers: Buffers) -> torch.nn.Parameter:
        """The weight as it was before vLLM packed it first, without memory as yet."""
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
        from vllm.model_executor.model_loader.reload.sanitize import restore_layer_refs

        recorded = get_layerwise_info(layer).restore_metadata[0]["weight"]
        form = torch.empty(0, dtype=recorded.dtype)
        form.__class__, form.__dict__ = recorded.__class__, recorded.__dict__.copy()
        load = restore_layer_refs(form, layer).weight_loader

        def load_and_pack(parameter: torch.nn.Parameter, *arguments: Any, **options: Any) -> Any:
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

    def _pack(self, layer: torch.nn.Module) -> None:
        layer.cpu_linear = None  # frees the old copy before the new one is made
        layer.quant_method.process_weights_after_loading(layer)
        self._awaited.pop(layer, None)

    def finish(self) -> None:
        """Pack what has not been packed. Everything must have come."""
        for layer in [*self._awaited, *self._heads]:
            self._pack(layer)

    def abandon(self) -> None:
        """A layer that is not complete goes on with its old copy; its bias may be new."""
        for layer in self._awaited:
            layer.weight = torch.nn.Parameter(torch.empty(0, dtype=layer.weight.dtype), requires_grad=False)
        self._awaited = {}
