"""Weights between Hugging Face folders, Megatron's shards and the rollout engines.

rules.py          the invertible arithmetic of splitting and fusing tensors
table.py          the names and rules of one model, from its family (megatron_srpo/families)
load.py           Hugging Face folder → shards
export.py         shards → (Hugging Face name, full tensor), over tensor-, pipeline- and expert-parallel ranks
hf_folder.py      export → Hugging Face folder
safetensors_file.py  writes one safetensors file, tensor by tensor
inventory.py      what an export would contain, from shapes only
buffers.py        memory that is used again
weight_stream.py  the stream of an export to engines in other processes, both ends
base_checksum.py  a checksum of the weights under LoRA adapters
peft_folder.py    peft's adapter folder, written and read
verify.py         checksums of what was exported and of what an engine holds
"""

from megatron_srpo.bridge.base_checksum import base_checksum
from megatron_srpo.bridge.errors import BridgeError
from megatron_srpo.bridge.export import Exporter, export_hf
from megatron_srpo.bridge.hf_folder import write_hf_folder
from megatron_srpo.bridge.load import ShardReader, load_hf_weights, read_config
from megatron_srpo.bridge.peft_folder import load_adapter, load_weights, write_adapter_folder
from megatron_srpo.bridge.table import weight_table
from megatron_srpo.bridge.verify import Verifier

__all__ = [
    "BridgeError",
    "Exporter",
    "ShardReader",
    "Verifier",
    "base_checksum",
    "export_hf",
    "load_adapter",
    "load_hf_weights",
    "load_weights",
    "read_config",
    "weight_table",
    "write_adapter_folder",
    "write_hf_folder",
]
