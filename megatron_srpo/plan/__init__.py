"""Plans without a GPU: predicts memory, time and layouts of a model on a cluster by formulas.

    architecture.py   the sizes of a model; the shipped models     layout.py         how a model is split over GPUs
    hardware.py       machines: peaks, and what share is reached   workload.py       what an iteration consists of
    activations.py    saved bytes of a row                         memory.py         memory of a GPU, part by part
    duration.py       time of an iteration, part by part           search.py         tries all layouts
    report.py         prints tables and JSON                       configuration.py  writes a layout's configuration
    sharing.py        shared prompts, and what they cost           meter.py         computes what a run really reaches

All numbers for GPUs are predictions; their assumptions are printed with them (docs/planning.md).
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
