"""vLLM as the rollout engine, in the training ranks or in servers. Nothing outside this folder knows vLLM.

In the trainer's processes:
    environment.py       what must be set before vLLM is imported
    settings.py          what an engine is started with, and vLLM's arguments that follow from it
    colocated.py         engines inside the training ranks
    start.py             starts and stops an engine in this process
    process_state.py     restores what an engine changes in this process
    servers.py           engines in servers; rank 0 asks them and sends them the weights
    client.py            the routes of one server
    answers.py           how a server's answer travels
    server_process.py    the process of one server
    tool_parser.py       reads the tool calls of a model's turn
    prompt_trace.py      hidden states and log-probs of prompts, for comparisons

Inside vLLM's processes:
    parent_watcher.py    ends a server when its trainer is gone
    token_middleware.py  refuses requests without the run's token
    answer_route.py      answers in arrays instead of JSON
    cpu_worker.py        the CPU worker, with names of our own for shared memory
    speculation.py       speculative decoding on a CPU: drafts, and which of them are kept
    draft_table.py       which token last followed an n-gram
    worker_extension.py  the methods that we add to the worker
    weight_receiver.py   our backend of vLLM's weight-transfer API
    weight_loader.py     loads and checks a publish
    layer_loading.py     how each kind of layer takes new weights
"""

from megatron_srpo.rollout.vllm.colocated import ColocatedEngine
from megatron_srpo.rollout.vllm.environment import prepare_environment
from megatron_srpo.rollout.vllm.prompt_trace import prompt_traces
from megatron_srpo.rollout.vllm.server_process import become_server
from megatron_srpo.rollout.vllm.servers import ServersEngine, ServersFollower
from megatron_srpo.rollout.vllm.tool_parser import engine_tool_parser

__all__ = [
    "ColocatedEngine",
    "ServersEngine",
    "ServersFollower",
    "become_server",
    "engine_tool_parser",
    "prepare_environment",
    "prompt_traces",
]
