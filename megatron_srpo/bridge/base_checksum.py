"""A checksum of the base weights of a run with adapters, the same under every layout."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_srpo.bridge.rules import Replicated
from megatron_srpo.bridge.table import weight_table
from megatron_srpo.bridge.verify import MODULUS, total
from megatron_srpo.core.tensors import ModelShards
from megatron_srpo.families import HfConfig


class Checksum:
    """Σ over tensors of (odd number from the name) · (sum of the bit patterns of the elements), modulo 2⁶⁴.

    str() is the dtype of the tensors and 16 hexadecimal digits.
    It reads tensors once and copies nothing. It does not see the order of the elements inside a tensor: it tells base
    models apart, and does not look for damage.
    """

    def __init__(self) -> None:
        self.value = 0
        self.dtypes: set[str] = set()

    def add(self, hf_names: Sequence[str], tensor: torch.Tensor) -> None:
        """Add a tensor, or a part of it. `hf_names` are those of all tensors of its Megatron parameter."""
        odd = 2 * zlib.crc32(",".join(hf_names).encode()) + 1
        self.value = (self.value + odd * total(tensor)) % MODULUS
        self.dtypes.add(str(tensor.dtype).removeprefix("torch."))

    def __str__(self) -> str:
        return f"{'+'.join(sorted(self.dtypes))}:{self.value:016x}"


def base_checksum(shards: ModelShards, hf_config: HfConfig) -> str:
    """The checksum of the weights as they were loaded, which does not depend on the layout. Collective. Every rank adds
    up what it holds and no other rank holds."""
    table = weight_table(hf_config, shards.padded_vocab_size)
    ordinary, experts = Checksum(), Checksum()
    for name, parameter in shards.parameters.items():
        mapped = table.lookup(name)
        if mapped.exported and (shards.tp_rank == 0 or not isinstance(mapped.rule, Replicated)):
            (ordinary if mapped.expert is None else experts).add(mapped.hf_names, parameter)
    device = next(iter(shards.parameters.values())).device
    whole = _summed(ordinary.value, device, shards.tp_group) + _summed(experts.value, device, shards.expert_group)
    result = Checksum()
    result.value, result.dtypes = _summed(whole, device, shards.pp_group), ordinary.dtypes | experts.dtypes
    return str(result)


def _summed(value: int, device: torch.device, group: dist.ProcessGroup | None) -> int:
    """The sum over a group, modulo 2⁶⁴."""
    value %= MODULUS
    if group is None:
        return value
    signed = torch.tensor([value - MODULUS if value >= MODULUS // 2 else value], device=device)
    dist.all_reduce(signed, group=group)
    return int(signed) % MODULUS
