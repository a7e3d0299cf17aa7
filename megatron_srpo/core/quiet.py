"""Silences what libraries say of themselves."""

from __future__ import annotations

import warnings


def quiet_libraries() -> None:
    """From now on torch, Megatron and transformers warn of nothing. At every start they say what a user cannot act on;
    nothing of ours goes through `warnings`. Call it before they are imported."""
    for module in ("torch", "megatron", "transformers"):
        warnings.filterwarnings("ignore", module=module + r"\..*")
