"""The algorithms, one file each. Everything else asks an algorithm for its needs and its credit, never for its name.

    base.py          what an algorithm is, and the settings that methods share
    advantages.py    advantages of a group
    teachers.py      what a teacher is shown
    history.py       what earlier iterations saw of a prompt
    routing.py       groups → credit → samples
    contrast.py      groups that teach nothing make room for others (dynamic sampling)
    report.py        what routing did, for the log

The first algorithm is the default, and stands for methods with a teacher; the first without one for those.
"""

from megatron_srpo.algorithms.base import Algorithm, Distillation
from megatron_srpo.algorithms.contrastive import Contrastive
from megatron_srpo.algorithms.demopsd import DemoPsd
from megatron_srpo.algorithms.drift import Drift
from megatron_srpo.algorithms.grpo import Grpo
from megatron_srpo.algorithms.mix import Mix
from megatron_srpo.algorithms.rloo import Rloo
from megatron_srpo.algorithms.rlsd import Rlrt, Rlsd
from megatron_srpo.algorithms.scsdpo import ScSdpo
from megatron_srpo.algorithms.sdpo import Sdpo
from megatron_srpo.algorithms.srpo import Srpo

# The paper's methods and their controls, then what came after SRPO.
ALGORITHMS: tuple[type[Algorithm], ...] = (
    Srpo, Grpo, Sdpo, Mix, Rloo, Drift, ScSdpo, Rlsd, Rlrt, Contrastive, DemoPsd
)  # fmt: skip

__all__ = ["ALGORITHMS", "Algorithm", "Distillation"]
