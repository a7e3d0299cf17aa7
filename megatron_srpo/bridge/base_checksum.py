"""A checksum of the base weights of a run with adapters, the same under every layout."""

from __future__ import annotations

import zlib

import torch
import torch.distributed as dist

from megatron_srpo.bridge.rules import Replicated
from megatron_srpo.bridge.table import weight_table
from megatron_srpo.bridge.verify import MODULUS, total
from megatron_srpo.core.tensors import ModelShards
from megatron_srpo.families import HfConfig


def base_checksum(shards: ModelShards, hf_config: HfConfig) -> str:
    """dtype and 16 hexadecimal digits, which identify the weights as they were loaded. Collective.

    Σ over tensors of (odd number from the name) · (sum of the bit patterns of the elements), modulo 2⁶⁴. Every rank
    adds up what it holds and no other rank holds. It reads the weights once and copies nothing. It does not see the
    order of the elements inside a tensor: it tells base models apart, and does not look for damage.
    """
    table = weight_table(hf_config, shards.padded_vocab_size)
    sums = {False: 0, True: 0}  # by whether the parameter belongs to an expert
    kinds = set()
    for name, parameter in shards.parameters.items():
        mapped = table.lookup(name)
        kinds.add(str(parameter.dtype).removeprefix("torch."))
        if mapped.exported and (shards.tp_rank == 0 or not isinstance(mapped.rule, Replicated)):
            odd = 2 * zlib.crc32(",".join(mapped.hf_names).encode()) + 1
            sums[mapped.expert is not None] += odd * total(parameter)
    device = next(iter(shards.parameters.values())).device
    ordinary = _summed(sums[False], device, shards.tp_group)
    experts = _summed(sums[True], device, shards.expert_group)
    return f"{'+'.join(sorted(kinds))}:{_summed(ordinary + experts, device, shards.pp_group):016x}"


def _summed(value: int, device: torch.device, group: dist.ProcessGroup | None) -> int:
    """The sum over a group, modulo 2⁶⁴."""
    value %= MODULUS
    if group is None:
        return value
    signed = torch.tensor([value - MODULUS if value >= MODULUS // 2 else value], device=device)
    dist.all_reduce(signed, group=group)
    return int(signed) % MODULUS
