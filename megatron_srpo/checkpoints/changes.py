"""Which keys may differ between the run that wrote a checkpoint and the run that resumes from it.

Every key is in one class. FIXED: with another value it is another run. RESETS: another value discards a part of the
state, which checkpoint.allow_reset must allow. QUIET: the key has no influence on what is learned. All other keys may
change, and the run prints the difference.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_srpo.core.json_types import JsonValue

FIXED = ("algorithm.name", "lora.rank", "lora.alpha", "lora.rslora", "lora.targets")
RESETS = {"run.seed": "data", "data.shuffle": "data", "teacher.mode": "teacher"}
QUIET = (
    "run.name", "run.output_dir", "run.benchmark", "run.method", "run.device",
    "run.control_timeout_minutes", "run.watchdog_minutes", "reward.workers", "lora.export", "checkpoint", "eval",
    "observe",
)  # fmt: skip
# How versions without the key trained, where that is not the key's default.
BEFORE_THE_KEY: dict[str, JsonValue] = {"optimizer.decay_norms_and_biases": True, "lora.rank": 0}

Kind = Literal["fixed", "reset", "quiet", "told"]
ConfigValues = Mapping[str, Mapping[str, JsonValue]]  # section → key → value, as of Config.model_dump(mode="json")


@dataclass(frozen=True)
class Change:
    """A key with another value. `kind` is its class; `reset` is what must be allowed in class "reset".

    Example: Change("run.seed", 0, 1, "reset", "data")
    """

    key: str
    before: JsonValue
    now: JsonValue
    kind: Kind
    reset: str = ""

    def __str__(self) -> str:
        return f"{self.key}: {self.before!r} → {self.now!r}"


def kind_of(key: str) -> Kind:
    """The class of a dotted key."""
    if key in FIXED:
        return "fixed"
    if key in RESETS:
        return "reset"
    return "quiet" if key in QUIET or key.partition(".")[0] in QUIET else "told"


def changes(before: ConfigValues, now: ConfigValues) -> list[Change]:
    """The keys whose values differ in two configurations. A key that only one of them has belongs to another version of
    the program and is ignored, unless its default changes how a run of that version continues."""
    found = []
    for section in now:
        if section == "lora" and not now[section]["rank"] and not before.get(section, {}).get("rank"):
            continue  # without adapters its other keys mean nothing
        for key, new in now[section].items():
            dotted = f"{section}.{key}"
            old = before.get(section, {}).get(key, BEFORE_THE_KEY.get(dotted, new))
            if old != new:
                found.append(Change(dotted, old, new, kind_of(dotted), RESETS.get(dotted, "")))
    return found


def architecture(model_path: str) -> str:
    """A text that identifies a model's architecture: a digest of its config.json, or the path if there is none."""
    try:
        return hashlib.sha256((Path(model_path) / "config.json").read_bytes()).hexdigest()
    except OSError:
        return model_path
