"""Options that the commands of the study share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeVar

Number = TypeVar("Number", int, float)


def at_least_one(number: Callable[[str], Number]) -> Callable[[str], Number]:
    """The type of an option whose value is a number of at least 1."""

    def parse(text: str) -> Number:
        try:
            value = number(text)
        except ValueError:
            value = number("0")
        if not value >= 1:  # so that it is true for nan
            raise argparse.ArgumentTypeError(
                f"expected {'a whole number' if number is int else 'a number'} of at least 1, got {text!r}"
            )
        return value

    return parse
