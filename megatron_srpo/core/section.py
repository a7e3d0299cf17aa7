"""The base class of every section of the configuration."""

from __future__ import annotations

import os
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict

Folder = Annotated[str, AfterValidator(os.path.expanduser)]  # "~" is the user's home, in a file as in a shell


class Section(BaseModel):
    """Strict and frozen: "3" is no number, unknown keys are errors, and every default is validated too."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )
