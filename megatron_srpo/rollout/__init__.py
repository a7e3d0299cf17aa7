"""Rollout engines: prompts in, responses with the engine's own log-probs out, new weights in every iteration.

    engine.py       the protocol of an engine, requests, sampling settings, seeds
    balance.py      splits requests among engines
    partial.py      responses that go on in the next iteration
    prefetcher.py   generates the next batches while this one trains
    fleet.py        servers: which ones are usable, who answers a request, restarts
    http.py         HTTP to one server
    vllm/           the engine: everything that knows vLLM

The rest of the package imports engines from here only, so that another engine is one more folder and a choice in this
file. Importing this package imports no vLLM.
"""

from megatron_srpo.rollout.engine import (
    Feed,
    GenerateRequest,
    OnRollout,
    RolloutEngine,
    RolloutError,
    SamplingSettings,
    experts_of_turns,
    request_seed,
    turn_seed,
)
from megatron_srpo.rollout.partial import Part, PartialPool, under_way
from megatron_srpo.rollout.prefetcher import Prefetcher
from megatron_srpo.rollout.vllm import (
    ColocatedEngine,
    ServersEngine,
    ServersFollower,
    become_server,
    engine_tool_parser,
    prepare_environment,
    prompt_traces,
)

__all__ = [
    "ColocatedEngine",
    "Feed",
    "GenerateRequest",
    "OnRollout",
    "Part",
    "PartialPool",
    "Prefetcher",
    "RolloutEngine",
    "RolloutError",
    "SamplingSettings",
    "ServersEngine",
    "ServersFollower",
    "become_server",
    "engine_tool_parser",
    "experts_of_turns",
    "prepare_environment",
    "prompt_traces",
    "request_seed",
    "turn_seed",
    "under_way",
]
