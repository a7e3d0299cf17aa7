"""Machines: their published peaks, and the shares of the peaks that are assumed or were measured.

Peaks come from the vendors' data sheets (dense bf16). Memory is what CUDA reports: about 79 GiB on a card that is sold
with 80 GB. For B200 and GB200 it is 1 % less than in the data sheet, because we know no report of theirs. The shares
are assumptions until benchmarks/calibrate.py measures them on a machine; a prediction says which ones it uses.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from megatron_srpo.core.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """One accelerator and its network. Units are FLOP/s, bytes, bytes/s and seconds."""

    name: str
    flops: float  # peak, dense products in the model's dtype
    memory: float  # as CUDA reports it, which is less than the name of the GPU says
    bandwidth: float  # peak of the memory
    link: float  # peak to the GPUs of the same node, in one direction
    network: float  # peak of a GPU to other nodes, in one direction
    node: int = 8  # GPUs of a node
    # shares of the peaks that real work reaches
    product_share: float = 0.65  # large matrix products of a training step
    attention_share: float = 0.45
    bandwidth_share: float = 0.80
    link_share: float = 0.75
    network_share: float = 0.80
    # costs besides bytes and FLOPs
    latency: float = 20e-6  # of a collective
    layer_overhead: float = 0.0  # of a layer's forward pass on the host, if the GPU's work does not hide it
    decode_overhead: float = 2e-3  # of an engine's step: scheduling, sampling, launches
    reserved: float = 3.0 * GIB  # CUDA context, communication buffers, workspace
    fragmentation: float = 0.05  # share of the allocated memory that is lost
    headroom: float = 0.03  # share of the memory that a proposal leaves free, because predictions are not exact
    source: str = "assumed efficiencies"

    @property
    def usable(self) -> float:
        """Bytes that a layout may need."""
        return self.memory * (1 - self.headroom)

    @property
    def product_rate(self) -> float:
        return self.flops * self.product_share

    @property
    def attention_rate(self) -> float:
        return self.flops * self.attention_share

    @property
    def memory_rate(self) -> float:
        return self.bandwidth * self.bandwidth_share

    def link_rate(self, ranks: int) -> float:
        """Bytes/s of one GPU in a collective over `ranks` neighbours, inside a node or through the network."""
        return self.link * self.link_share if ranks <= self.node else self.network * self.network_share


MACHINES: dict[str, Machine] = {
    machine.name: machine
    for machine in (
        Machine("a100", 312e12, 79.2 * GIB, 2.04e12, 300e9, 25e9),
        Machine("h20", 148e12, 95.0 * GIB, 4.0e12, 450e9, 50e9, product_share=0.85, attention_share=0.60),
        Machine("h100", 989e12, 79.1 * GIB, 3.35e12, 450e9, 50e9),
        Machine("h200", 989e12, 139.8 * GIB, 4.8e12, 450e9, 50e9),
        Machine("b200", 2250e12, 166.0 * GIB, 8.0e12, 900e9, 50e9),
        Machine("gb200", 2500e12, 172.0 * GIB, 8.0e12, 900e9, 100e9, node=72),
    )
}


def machine_of(name: str, calibration: Path | None = None) -> Machine:
    """A machine by name. The measurements in a file of `benchmarks/calibrate.py` replace the assumptions.

    UserError for an unknown name, or a file that is no calibration.
    """
    name = name if name in MACHINES else name.lower()
    known = {field.name for field in dataclasses.fields(Machine)}
    measured: dict = {}
    if calibration is not None:
        try:
            measured = json.loads(calibration.read_text(encoding="utf-8"))["machine"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            why = f"it has no {error}" if isinstance(error, KeyError) else error
            raise UserError(
                f"plan: {calibration} is no calibration ({why}): make it with python -m benchmarks.calibrate FILE"
            ) from None
        unknown = sorted(set(measured) - known)
        if unknown:
            raise UserError(f"plan: {calibration} has {', '.join(unknown)}: expected {', '.join(sorted(known))}")
    if name in MACHINES:
        return dataclasses.replace(MACHINES[name], **measured)
    if str(measured.get("name")).lower() == name.lower():
        return Machine(**measured)
    raise UserError(f"plan: no machine {name!r}: expected --gpu {', '.join(MACHINES)}, or one that --calibration names")
