"""The engine's half of a publish: new weights into a running vLLM worker.

vLLM repacks weights after loading (on CPUs, and for quantisation), so that they cannot be loaded a second time as they
are. Its layer-wise reload gives every layer its loading form back, loads, and repacks: an updated engine then equals an
engine that was started on the new weights, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch


class PublishExtension:
    """Mixed into vLLM's worker by `worker_extension_cls="megatron_srpo.bridge.worker.PublishExtension"`.

    begin_publish, load_bucket as often as needed, finish_publish; or publish_weights, which streams an iterator in the
    same process. Nothing may be generated in between. The worker may hold a tensor until its layer is complete (query,
    key and value for example): tensors of a layer should be neighbours and must not be overwritten in the meantime.
    """

    vllm_config: Any  # of the worker
    model_config: Any
    model_runner: Any

    def begin_publish(self) -> None:
        """Give every layer its loading form back."""
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        model = self.model_runner.get_model()
        # A tied head is the embedding under a second name until the reload gives each name a tensor of its own; it
        # must then be loaded too, or the engine goes on with the old head.
        first = {id(parameter): name for name, parameter in model.named_parameters()}
        self._aliases = {
            first[id(parameter)]: name
            for name, parameter in model.named_parameters(remove_duplicate=False)
            if first[id(parameter)] != name
        }
        with set_current_vllm_config(self.vllm_config):
            initialize_layerwise_reload(model)
        self._awaited = {name for name, _ in model.named_parameters()}

    @torch.no_grad()
    def load_bucket(self, items: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load (Hugging Face name, full tensor) pairs; each rank of a tensor-parallel engine takes its part."""
        from vllm.config import set_current_vllm_config

        with set_current_vllm_config(self.vllm_config):
            self._awaited -= self.model_runner.get_model().load_weights(self._with_aliases(items))

    def _with_aliases(self, items: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in items:
            yield name, tensor
            if name in self._aliases:
                yield self._aliases[name], tensor

    def finish_publish(self) -> None:
        """Repack what is not yet repacked. Raises RuntimeError when a parameter got no weights."""
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        missing = sorted(self._awaited)
        with set_current_vllm_config(self.vllm_config):
            finalize_layerwise_reload(self.model_runner.get_model(), self.model_config)
        if missing:
            raise RuntimeError(
                f"the publish left {len(missing)} of the engine's parameters on old weights, the first is "
                f"{missing[0]!r}: trainer and engine hold different models"
            )

    def publish_weights(self, items: Iterable[tuple[str, torch.Tensor]]) -> None:
        """A whole publish from an iterator, tensor by tensor, without copies; in-process engines only."""
        self.begin_publish()
        self.load_bucket(items)
        self.finish_publish()
