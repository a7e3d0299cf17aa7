"""vLLM's CPU worker with our sampler, and with shared memory names that belong to one run. vLLM imports this module by
its name."""

from __future__ import annotations

from vllm.config import VllmConfig
from vllm.v1.worker.cpu_worker import CPUWorker

from megatron_srpo.rollout.vllm import counter_sampler, speculation

SHARED_MEMORY_NAME = "shared_memory_name"  # a key of vLLM's additional_config


class NamedWorker(CPUWorker):
    """Gives the shared memory blocks of a tensor-parallel engine a name of our own.

    vLLM names them after the last part of the rendezvous address. Under an external launcher that is the same for every
    job of the machine ("env://"), so a second job, or the leftovers of a killed one, make the start fail with errno 17.
    The process group exists already, so the address is free to carry our name.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        local_rank: int,
        rank: int,
        distributed_init_method: str,
        is_driver_worker: bool = False,
    ) -> None:
        if distributed_init_method.startswith("env:"):
            distributed_init_method += f":{vllm_config.additional_config[SHARED_MEMORY_NAME]}"
        super().__init__(vllm_config, local_rank, rank, distributed_init_method, is_driver_worker)

    def init_device(self) -> None:
        """Make the model runner, and have it sample by counter."""
        super().init_device()
        sampler = counter_sampler.install(self.model_runner)
        if self.model_runner.num_spec_tokens:
            speculation.install(self.model_runner, sampler)

    def record_logprobs(self) -> counter_sampler.LogprobRecord:
        """From now on the sampler keeps the log-probs of its tokens here. An engine in this process reads them."""
        return counter_sampler.record(self.model_runner)


class NamedCPUWorker(NamedWorker):
    """What an engine gets. vLLM adds its extension to the bases of this class, and refuses a class that has inherited
    one, so other workers inherit from NamedWorker."""
