"""The methods that we add to vLLM's worker. vLLM mixes the class into its worker by `worker_extension_cls`.

The trainer imports this module to name the classes, so it imports vLLM only where vLLM is imported already: in a
worker.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from megatron_srpo.bridge.verify import Report
from megatron_srpo.config import LoraConfig
from megatron_srpo.core import loopback
from megatron_srpo.rollout.vllm.loaders import AnyLoader, make_loader

# A worker imports this module before it joins its process group.
if os.environ.get("VLLM_HOST_IP") == loopback.ADDRESS:
    loopback.confine_stores()

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

TRANSFER_BACKEND = "megatron_srpo"  # the name of our backend in vLLM's weight-transfer API


class PublishExtension:
    """Lets an engine in this process take new weights."""

    vllm_config: VllmConfig  # these two are the worker's
    model_runner: GPUModelRunner
    _weight_loader: AnyLoader | None = None

    def publish_weights(
        self, items: Iterable[tuple[str, torch.Tensor]], verify: bool = False, adapters: LoraConfig | None = None
    ) -> Report | None:
        """Load a whole publish from an iterator of (Hugging Face name, full tensor), without copies; of `adapters`, the
        factors alone. Returns the checksums if `verify` is set. Raises what the loader raises."""
        if self._weight_loader is None:
            self._weight_loader = make_loader(self.model_runner.get_model(), self.vllm_config, adapters)
        self._weight_loader.begin(verify=verify)
        self._weight_loader.load(items)
        self._weight_loader.finish()
        return self._weight_loader.report()


class ServerExtension(PublishExtension):
    """The extension of a server's workers: importing it makes our weight-transfer backend known to vLLM."""


if "vllm" in sys.modules:  # a worker imports this module before it loads the model and asks for the backend
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    from megatron_srpo.rollout.vllm.weight_receiver import WeightReceiver

    if TRANSFER_BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(TRANSFER_BACKEND, WeightReceiver)
