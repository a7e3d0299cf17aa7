"""Weights between Hugging Face folders, Megatron's shards, and the rollout engines.

rules.py      the invertible arithmetic of splitting and fusing
families/     one table of names and rules a model family
load.py       Hugging Face folder → shards
export.py     shards → (Hugging Face name, full tensor), over TP and PP
hf_folder.py  export → Hugging Face folder
stream_folder.py  the same, tensor by tensor
worker.py     export → running vLLM engine (the engine's half)
worker_layers.py  how each of its layers takes new weights
buffers.py    memory that is taken again
wire.py       the stream of an export to engines in other processes, both ends
worker_transfer.py  its end in a vLLM server, behind vLLM's weight-transfer API
verify.py     checksums of what was exported and what the engine holds
"""

from megatron_srpo.bridge.errors import BridgeError
from megatron_srpo.bridge.export import Exporter, export_hf
from megatron_srpo.bridge.families import FAMILIES, family_of, weight_table
from megatron_srpo.bridge.hf_folder import write_hf_folder
from megatron_srpo.bridge.load import ShardReader, load_hf_weights, read_config
from megatron_srpo.bridge.verify import Verifier

__all__ = [
    "FAMILIES",
    "BridgeError",
    "Exporter",
    "ShardReader",
    "Verifier",
    "export_hf",
    "family_of",
    "load_hf_weights",
    "read_config",
    "weight_table",
    "write_hf_folder",
]
