"""Rollout engines: prompts in, responses with the engine's own log-probs out, new weights every iteration.

    engine.py       the protocol, requests, sampling, seeds
    environment.py  what must be set before vLLM is imported
    colocated.py    vLLM inside the training ranks
    vllm_engine.py  starting and stopping one vLLM engine
    guest.py        what an engine changes in the trainer's process, put back
    balance.py      which engine answers which request
    cpu_worker.py   vLLM's CPU worker with shared memory names of our own (imported by vLLM)
    servers.py      vLLM servers in processes of their own: the driver asks, and sends them the weights
    fleet.py        which of them are fit, who answers what; restarts
    http.py         what is said to one server, and what counts as an answer
    server_process.py, guardian.py, guard.py   its process, what ends it with the trainer, who may ask it
    ahead.py        the next batches, generated while this one trains

Importing this package imports no vLLM.
"""

from megatron_srpo.rollout.colocated import ColocatedEngine
from megatron_srpo.rollout.engine import GenerateRequest, RolloutEngine, RolloutError, SamplingSettings, request_seed
from megatron_srpo.rollout.environment import prepare_environment

__all__ = [
    "ColocatedEngine",
    "GenerateRequest",
    "RolloutEngine",
    "RolloutError",
    "SamplingSettings",
    "prepare_environment",
    "request_seed",
]
