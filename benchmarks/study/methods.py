"""The methods of the study: the keys in which each differs, and from which method it takes its learning rate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# The learning rate of a method is chosen from the task's grid on SELECTION_SEED alone, which no table uses.
SELECTION_SEED = 100
MAIN_SEEDS, OTHER_SEEDS = 8, 5
# The experiment on collapse: the task whose answers can shrink, with one rate for all methods, so that what differs
# between SRPO and a guard is the guard.
COLLAPSE_TASK, COLLAPSE_RATE = "tally", 2e-4
COLLAPSE_METHODS = (
    "grpo", "srpo", "sdpo", "srpo-longest", "srpo-refresh", "srpo-handover", "srpo-floor", "srpo-median",
)  # fmt: skip


@dataclass(frozen=True)
class Method:
    """`keys` of the configuration. `rate_of`: the method whose learning rate it uses, "" for its own."""

    name: str
    keys: Mapping[str, object]
    rate_of: str = ""
    main: bool = False
    tasks: tuple[str, ...] = field(default=())  # the tasks it is for; () for all

    @property
    def seeds(self) -> int:
        return MAIN_SEEDS if self.main else OTHER_SEEDS


def _srpo(name: str, keys: Mapping[str, object], *, main: bool = False, tasks: tuple[str, ...] = ()) -> Method:
    """SRPO with one thing changed, at SRPO's learning rate."""
    return Method(name, {"algorithm.name": "srpo", **keys}, "srpo", main, tasks)


METHODS = {
    method.name: method
    for method in (
        Method("grpo", {"algorithm.name": "grpo"}, main=True),
        Method("sdpo", {"algorithm.name": "sdpo"}, main=True),
        Method("srpo", {"algorithm.name": "srpo"}, main=True),
        Method("mix", {"algorithm.name": "mix", "algorithm.mix_lambda": 0.9}, main=True),
        # Guards against collapse.
        _srpo("srpo-floor", {"algorithm.sibling_min_length": 0.8}),
        _srpo("srpo-longest", {"algorithm.sibling": "longest"}),
        _srpo("srpo-median", {"algorithm.sibling": "median"}),
        _srpo("srpo-refresh", {"teacher.mode": "refresh", "teacher.refresh_when": "improved"}),
        _srpo("srpo-handover", {"algorithm.distill_patience": 10, "algorithm.distill_decay": 10}),
        # Other sources for the teacher, and the control that sees no demonstration.
        _srpo("srpo-none", {"algorithm.teachers": ["none"]}),
        _srpo("srpo-solution", {"algorithm.teachers": ["sibling", "solution"]}),
        _srpo("srpo-memory", {"algorithm.teachers": ["sibling", "memory"]}),
        # Both together, at its own learning rate: what solves more prompts, and what lets distillation end.
        Method(
            "srpo-solution-handover",
            {
                "algorithm.name": "srpo",
                "algorithm.teachers": ["sibling", "solution"],
                "algorithm.distill_patience": 10,
                "algorithm.distill_decay": 10,
            },
            main=True,
        ),
        # What came after SRPO.
        Method("drift", {"algorithm.name": "drift"}),
        Method("scsdpo", {"algorithm.name": "scsdpo"}),
        Method("rlsd", {"algorithm.name": "rlsd", "teacher.mode": "refresh"}),
        Method("rlrt", {"algorithm.name": "rlrt"}),
        Method("contrastive", {"algorithm.name": "contrastive"}),
        Method("demopsd", {"algorithm.name": "demopsd"}),
        Method("rloo", {"algorithm.name": "rloo"}),
    )
}

# Warm starts are made anew in every session, and not the same bit for bit; only runs on the same one are compared.
# These were repeated, with fewer seeds, on the warm start on which the methods that are not main ones ran.
AGAIN: Mapping[str, tuple[str, ...]] = {
    "srpo": ("worksheet", "tally", "hard"),
    "srpo-solution-handover": ("worksheet",),
}
