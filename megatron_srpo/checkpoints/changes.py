"""What may differ between the run that wrote a checkpoint and the one that goes on from it.

Every key is in one class. FIXED: another value is another run. RESETS: another value throws a part of the state away,
which has to be named in checkpoint.allow_reset. QUIET: no influence on what is learned. All others may change, and the
difference is told.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

FIXED = ("algorithm.name",)
RESETS = {"run.seed": "data", "data.shuffle": "data", "teacher.mode": "teacher"}
QUIET = (
    "run.name", "run.output_dir", "run.device", "run.control_timeout_minutes", "run.watchdog_minutes",
    "reward.workers", "checkpoint", "eval", "observe",
)  # fmt: skip


@dataclass(frozen=True)
class Change:
    """A key with another value. `kind` is its class; `reset` what has to be allowed, in class "reset"."""

    key: str
    before: Any
    now: Any
    kind: Literal["fixed", "reset", "quiet", "told"]
    reset: str = ""

    def __str__(self) -> str:
        return f"{self.key}: {self.before!r} → {self.now!r}"


def kind_of(key: str) -> Literal["fixed", "reset", "quiet", "told"]:
    """The class of a dotted key."""
    if key in FIXED:
        return "fixed"
    if key in RESETS:
        return "reset"
    return "quiet" if key in QUIET or key.partition(".")[0] in QUIET else "told"


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[Change]:
    """The keys that two configurations (as `Config.model_dump`) have with different values. A key that only one has
    belongs to another version of the program and is passed over."""
    found = []
    for section in [name for name in before if name in now]:
        for key in [name for name in before[section] if name in now[section]]:
            old, new = before[section][key], now[section][key]
            if old != new:
                dotted = f"{section}.{key}"
                found.append(Change(dotted, old, new, kind_of(dotted), RESETS.get(dotted, "")))
    return found


def architecture(model_path: str) -> str:
    """What tells a model's architecture: a digest of its config.json, or the path where there is none."""
    try:
        return hashlib.sha256((Path(model_path) / "config.json").read_bytes()).hexdigest()
    except OSError:
        return model_path
