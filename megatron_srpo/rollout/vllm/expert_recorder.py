"""Records on a CPU which experts every token uses. On GPUs vLLM's own enable_return_routed_experts does it.

vLLM's worker half of that option needs Triton and Model Runner V2. Its scheduler half needs neither: with every step a
worker gives it the rows of the computed tokens, and it hands them out with the response (CompletionOutput's and the
server's `routed_experts`). The worker half here gives it the same rows. vLLM imports this module by its name.

A row is kept at the KV-cache slot of its token. A token whose computation the prefix cache spares has the slot of the
token that was computed, and so gets the experts with which its keys and values were made.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.distributed.aux_output_connector.connector import AuxOutputSchedulerConnector, AuxRequestOutput
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe.layer import MoERunner
from vllm.v1.core.sched.scheduler import Scheduler

from megatron_srpo.rollout.vllm.cpu_worker import NamedWorker

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import ModelRunnerOutput

UNKNOWN = -1  # no token was computed at this slot, or the layer has no experts


class RecordingScheduler(Scheduler):
    """vLLM's scheduler, which expects the experts of every computed token and returns them with the response."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.aux_output_connector = AuxOutputSchedulerConnector()


class ExpertRecorder:
    """What the routers of one worker's model chose, by KV-cache slot: [slots, layers, experts of a token] int16."""

    def __init__(self, model: torch.nn.Module, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
        if len(kv_cache_config.kv_cache_groups) != 1:
            raise ValueError("experts are recorded by KV-cache slot, which needs a model with one group of slots")
        config = vllm_config.model_config
        self._block_size = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        shape = config.get_total_num_hidden_layers(), config.get_num_experts_per_tok()
        self._slots = torch.full((kv_cache_config.num_blocks * self._block_size, *shape), UNKNOWN, dtype=torch.int16)
        self._dtype = np.uint8 if config.get_num_experts() <= 256 else np.uint16
        layers = [module for module in model.modules() if isinstance(module, MoERunner)]
        self._layers = [layer.layer_id for layer in layers]
        for layer in layers:
            layer.router.set_capture_fn(partial(self._record, layer.layer_id))

    def _record(self, layer: int, chosen: torch.Tensor) -> None:
        """Called by the router of a layer with the experts [tokens, experts of a token] of a step."""
        mappings = get_forward_context().slot_mapping
        if not mappings:  # a trial run, of no request
            return
        assert isinstance(mappings, dict), "on a CPU vLLM does not split a step"
        slots = next(iter(mappings.values()))
        real = slots >= 0  # the others fill the step up
        self._slots[slots[real], layer] = chosen[: len(slots)][real].to(self._slots.dtype)

    def rows(self, block_ids: list[int], start: int, stop: int) -> np.ndarray:
        """[stop − start, layers, experts of a token] of a request's tokens from `start` on; 0 in dense layers."""
        positions = torch.arange(start, stop)
        blocks = torch.tensor(block_ids, dtype=torch.long)
        found = self._slots[blocks[positions // self._block_size] * self._block_size + positions % self._block_size]
        assert bool((found[:, self._layers] >= 0).all()), "a computed token has no recorded experts"
        return found.clamp(min=0).numpy().astype(self._dtype)


class RecordingCPUWorker(NamedWorker):
    """A CPU worker that tells the scheduler which experts the tokens of a step used."""

    _recorder: ExpertRecorder
    _step: SchedulerOutput | None = None

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        super().initialize_from_config(kv_cache_config)
        self._recorder = ExpertRecorder(self.model_runner.get_model(), self.vllm_config, kv_cache_config)

    def execute_model(self, scheduler_output: SchedulerOutput) -> ModelRunnerOutput | None:
        self._step = scheduler_output
        return super().execute_model(scheduler_output)

    def sample_tokens(self, grammar_output: GrammarOutput | None) -> ModelRunnerOutput:
        output, step = super().sample_tokens(grammar_output), self._step
        assert step is not None and step.aux_output_connector_metadata is not None
        wanted = step.aux_output_connector_metadata.requests  # request → its first token that is to be told
        output.aux_output_connector_output = {
            request: AuxRequestOutput(start, self._rows(request, start, step)) for request, start in wanted.items()
        }
        return output

    def _rows(self, request: str, start: int, step: SchedulerOutput) -> np.ndarray:
        """Of a request's tokens from `start` to the last one that this step computed."""
        state = self.model_runner.requests[request]
        stop = state.num_computed_tokens + step.num_scheduled_tokens[request]
        return self._recorder.rows(state.block_ids[0], start, stop)
