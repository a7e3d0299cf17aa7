"""Checks that an engine has the weights that the trainer exported, by checksums of every tensor made on both sides.

Two sums modulo 2⁶⁴ over the bit patterns of a tensor's elements, as integers:

    digest    is weighted by position: two tensors with equal digests have the same bytes in the same order
    total     is not weighted and does not depend on the order. So an engine's fused and sharded parameter, before it
              is repacked for its kernel, can be compared with the tensors that went into it

Together they show that every tensor arrived as it was exported, and that every parameter of the engine holds exactly
the values of its own tensors. They do not show the order of the values inside a parameter, nor what the engine's
repacking makes of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TypedDict

import torch

from megatron_srpo.bridge.errors import BridgeError

MODULUS = 2**64
CHUNK = 1 << 20  # elements that are widened to 64 bits at a time
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Several tensor-parallel ranks hold the same key-value head when there are fewer of them than ranks.
REPEATED = tuple(f"{part}_proj.{kind}" for part in "kv" for kind in ("weight", "bias", "lora_B.weight"))

Named = tuple[str, torch.Tensor]


class Report(TypedDict):
    """The checksums of one worker after a publish."""

    received: dict[str, int]  # published name → digest of what arrived
    totals: dict[str, int]  # published name → total of what arrived, in the engine's dtype
    held: dict[str, int]  # engine's parameter → total of what it holds
    sources: dict[str, list[str]]  # engine's parameter → the published tensors that it is made of


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bit patterns of a tensor's elements, in order, as signed integers."""
    return tensor.detach().contiguous().view(-1).view(INTEGERS[tensor.element_size()])


def digest(tensor: torch.Tensor) -> int:
    """A checksum that depends on every element and its position; 0 … 2⁶⁴−1."""
    result = tensor.numel()
    for chunk in bits(tensor).split(CHUNK):
        places = torch.arange(1, 2 * chunk.numel(), 2, device=chunk.device)  # odd: a changed bit always changes the sum
        result = (result * 6364136223846793005 + int((chunk * places).sum())) % MODULUS
    return result


def total(tensor: torch.Tensor) -> int:
    """A checksum that depends neither on the order of the elements nor on added zeros; 0 … 2⁶⁴−1."""
    return int(bits(tensor).sum(dtype=torch.int64)) % MODULUS


class Verifier:
    """The trainer's side. It verifies the first publish and then every `every`-th one; 1 verifies all, 0 none. Every
    rank makes the same calls."""

    def __init__(self, every: int) -> None:
        self._every, self._publishes = every, 0
        self._sent: dict[str, int] = {}
        self.unplaced: list[str] = []  # tensors that arrived, but belong to a parameter whose parts we do not know

    def begin(self) -> bool:
        """Whether this publish is to be verified."""
        number, self._publishes = self._publishes, self._publishes + 1
        return self._every > 0 and number % self._every == 0

    def record(self, weights: Iterable[Named]) -> Iterator[Named]:
        """Yields the weights, and records the digest of each."""
        self._sent = {}
        for name, tensor in weights:
            self._sent[name] = digest(tensor)
            yield name, tensor

    def compare(self, engine: str, reports: list[Report]) -> None:
        """Compare with the reports of one engine's workers, in rank order. Raises BridgeError that names the first
        tensor that differs."""
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
    """The possible totals, over all ranks, of a parameter made of these tensors: it may be split over the ranks, whole
    on every rank, or split with keys and values on several ranks."""
    everything = sum(totals[name] for name in names)
    repeated = sum(totals[name] for name in names if name.endswith(REPEATED))
    times = range(ranks)
    return {everything * ranks % MODULUS} | {(everything + extra * repeated) % MODULUS for extra in times}


def sources_of(
    parameter: str, names: Iterable[str], packed: Mapping[str, list[str]], aliases: Mapping[str, str]
) -> list[str]:
    """The Hugging Face tensors that an engine's parameter is made of, or an empty list when that is unknown.

    `packed` is the engine's own table of fused modules (packed_modules_mapping). `aliases` is engine name → published
    name.
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
