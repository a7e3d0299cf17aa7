"""Planning without a GPU: memory, time and layouts of a model on a cluster, from formulas.

    architecture.py   a model's numbers; the shipped models        layout.py      how it is cut over GPUs
    hardware.py       peaks, and the shares that are reached       workload.py    what an iteration consists of
    activations.py    saved bytes of a row                         memory.py      a GPU's memory, line by line
    duration.py       an iteration's time, line by line            search.py      all layouts, the best first
    report.py         tables and JSON                              configuration.py  the configuration of a layout
    meter.py          what a run really reached

Everything that it says of a GPU is a prediction under assumptions that are printed with it (docs/planning.md).
"""

from megatron_srpo.plan.architecture import SHIPPED, Architecture, read_architecture, shipped_if_absent
from megatron_srpo.plan.hardware import MACHINES, Machine, machine_of
from megatron_srpo.plan.layout import Layout
from megatron_srpo.plan.meter import Meter
from megatron_srpo.plan.search import Candidate, Found, evaluate, search
from megatron_srpo.plan.workload import Workload

__all__ = [
    "MACHINES",
    "SHIPPED",
    "Architecture",
    "Candidate",
    "Found",
    "Layout",
    "Machine",
    "Meter",
    "Workload",
    "evaluate",
    "machine_of",
    "read_architecture",
    "search",
    "shipped_if_absent",
]
