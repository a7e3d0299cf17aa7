"""vLLM's CPU worker with shared memory names that belong to one run. Imported by vLLM, by name."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker

SHARED_MEMORY_NAME = "shared_memory_name"  # key of vLLM's additional_config


class NamedCPUWorker(CPUWorker):
    """vLLM names the shared memory of a tensor-parallel engine after the last part of its rendezvous address. Under an
    external launcher that is the same for every job of the machine ("env://"): a second job, or the leftovers of a
    killed one, make the start fail with errno 17. The process group exists already, so the address is free to carry a
    name of our own."""

    def __init__(
        self, vllm_config: Any, local_rank: int, rank: int, distributed_init_method: str, **options: Any
    ) -> None:
        if distributed_init_method.startswith("env:"):
            distributed_init_method += f":{vllm_config.additional_config[SHARED_MEMORY_NAME]}"
        super().__init__(vllm_config, local_rank, rank, distributed_init_method, **options)
