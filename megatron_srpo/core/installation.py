"""What to do if a package is missing. Only the standard library is imported here; anything else may be missing."""

from __future__ import annotations

import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
DISTRIBUTION = "megatron-srpo"
EXTRAS = {  # top-level module → the extra of this package that installs it; all others come with the base or "cpu"
    "matplotlib": "report",
    "pyarrow": "data",
    "datasets": "data",
    "transformers": "data",
    "tokenizers": "data",
    "math_verify": "rewards",
    "reasoning_gym": "rewards",
    "tensorboard": "track",
    "wandb": "track",
}
BASE = {"pydantic", "rich", "typer", "numpy", "safetensors"}


def in_checkout() -> bool:
    """Whether this package runs from a checkout, which has `make setup`."""
    return (CHECKOUT / "requirements" / "cpu.txt").is_file()


def how_to_install(extra: str) -> str:
    """A command that installs an extra of this package ("" for the package itself) for this Python."""
    wanted = f"{DISTRIBUTION}[{extra}]" if extra else DISTRIBUTION
    return f"{sys.executable} -m pip install '{wanted}'"


def setup_command(*, cuda: bool) -> str:
    """The command that installs everything that a run needs."""
    if in_checkout():
        return "make setup DEVICE=gpu PYTHON=python3.12" if cuda else "make setup"
    return how_to_install("gpu" if cuda else "cpu")


def is_ours(error: ModuleNotFoundError) -> bool:
    """Whether a module of this package is missing, which is a defect."""
    return not error.name or error.name.partition(".")[0] == "megatron_srpo"


def missing_module(error: ModuleNotFoundError) -> str:
    """The message for a package that is not installed: what is missing, and how to install it."""
    name = (error.name or str(error)).partition(".")[0]
    text = f"this Python ({sys.executable}) has no module {error.name or name!r}"
    if in_checkout():
        return (
            f"{text}. `make setup` creates an environment that has everything, in .venv: activate it "
            "(. .venv/bin/activate), or start .venv/bin/python"
        )
    if name in BASE or name in EXTRAS:
        return f"{text}. Install it: {how_to_install(EXTRAS.get(name, ''))}"
    return (
        f"{text}. Training and plan --check need PyTorch and Megatron Core, and training needs vLLM too. Install them: "
        f"{how_to_install('cpu')} (without a GPU), or {how_to_install('gpu')}"
    )
