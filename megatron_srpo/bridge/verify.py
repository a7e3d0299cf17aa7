"""Whether an engine has the weights that the trainer exported: checksums of every tensor, made on both sides.

Two sums modulo 2⁶⁴ over the bit patterns of a tensor's elements, as integers:

    digest    weighted by position: what was sent and what arrived are the same bytes in the same order
    total     not weighted: the same whatever the order, so that an engine's fused and sharded parameter, before it is
              repacked for its kernel, can be compared with the tensors that went into it

Together: every tensor arrived as it was exported, and every parameter of the engine holds exactly the values of its
own tensors. What they do not show: the order of the values inside a parameter, and what vLLM's repacking makes of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from megatron_srpo.bridge.errors import BridgeError

MODULUS = 2**64
CHUNK = 1 << 20  # elements that are widened to 64 bits at a time
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
REPEATED = ("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias")  # on several ranks where heads are few

Named = tuple[str, torch.Tensor]
Report = dict[str, Any]  # of one worker: WeightLoader.report


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bit patterns of a tensor's elements, in order, as signed integers."""
    return tensor.detach().contiguous().view(-1).view(INTEGERS[tensor.element_size()])


def digest(tensor: torch.Tensor) -> int:
    """Depends on every element and its place; 0 … 2⁶⁴−1."""
    result = tensor.numel()
    for chunk in bits(tensor).split(CHUNK):
        places = torch.arange(1, 2 * chunk.numel(), 2, device=chunk.device)  # odd: a changed bit always changes the sum
        result = (result * 6364136223846793005 + int((chunk * places).sum())) % MODULUS
    return result


def total(tensor: torch.Tensor) -> int:
    """The same for the elements in any order, and for added zeros; 0 … 2⁶⁴−1."""
    return int(bits(tensor).sum(dtype=torch.int64)) % MODULUS


class Verifier:
    """The trainer's side. `every`: publishes between two verifications, 1 = all, 0 = none; the first one is verified
    unless none is. Every rank makes the same calls."""

    def __init__(self, every: int) -> None:
        self._every, self._publishes = every, 0
        self._sent: dict[str, int] = {}
        self.unplaced: list[str] = []  # arrived as they were, in a parameter of which we do not know what it is made of

    def begin(self) -> bool:
        """Whether this publish is to be verified."""
        number, self._publishes = self._publishes, self._publishes + 1
        return self._every > 0 and number % self._every == 0

    def record(self, weights: Iterable[Named]) -> Iterator[Named]:
        """The weights; the digest of each is kept as it passes."""
        self._sent = {}
        for name, tensor in weights:
            self._sent[name] = digest(tensor)
            yield name, tensor

    def compare(self, engine: str, reports: list[Report]) -> None:
        """Raise BridgeError that names the first tensor that one engine's workers, by rank, have otherwise."""
        for rank, report in enumerate(reports):
            where = engine if len(reports) == 1 else f"{engine}, rank {rank}"
            received = report["received"]
            for name, sent in self._sent.items():
                if received.get(name) != sent:
                    raise BridgeError(
                        f"verification: {name!r} arrived at {where} with other values than it was exported with "
                        f"(checksum {received.get(name, 0):016x}, expected {sent:016x}). The engine must not be used: "
                        "start the run again from its last checkpoint; if it happens again, suspect memory or network."
                    )
        for parameter, names in reports[0]["sources"].items():
            held = sum(report["held"][parameter] for report in reports) % MODULUS
            if held not in _possible(names, reports[0]["totals"], len(reports)):
                raise BridgeError(
                    f"verification: {engine} does not hold in {parameter!r} what it was sent as "
                    f"{', '.join(names)}. This vLLM loads the model otherwise than expected: please report it."
                )
        placed = {name for names in reports[0]["sources"].values() for name in names}
        self.unplaced = [name for name in self._sent if name not in placed]


def _possible(names: list[str], totals: Mapping[str, int], ranks: int) -> set[int]:
    """Totals over all ranks of a parameter made of these tensors: split, whole on every rank, or with keys and values
    on several."""
    everything = sum(totals[name] for name in names)
    repeated = sum(totals[name] for name in names if name.endswith(REPEATED))
    times = range(ranks)
    return {everything * ranks % MODULUS} | {(everything + extra * repeated) % MODULUS for extra in times}


def sources_of(
    parameter: str, names: Iterable[str], packed: Mapping[str, list[str]], aliases: Mapping[str, str]
) -> list:
    """The Hugging Face tensors that an engine's parameter is made of; empty when unknown.

    `packed`: vLLM's own table of fused modules (packed_modules_mapping); `aliases`: engine name → published name.
    """
    known = set(names)
    if parameter in known:
        return [parameter]
    if parameter in aliases:
        return [aliases[parameter]]
    module, _, kind = parameter.rpartition(".")
    parent, _, leaf = module.rpartition(".")
    if leaf in packed:
        return [name for part in packed[leaf] if (name := f"{parent}.{part}.{kind}") in known]
    for fused, parts in (("w13_weight", ("gate_proj", "up_proj")), ("w2_weight", ("down_proj",))):  # all experts
        if kind == fused:
            experts = f"{module.removesuffix('.routed_experts')}."
            return [n for n in known if n.startswith(experts) and n.endswith(tuple(f".{p}.weight" for p in parts))]
    return []
