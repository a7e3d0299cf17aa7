"""The section [algorithm] of the configuration: `name` chooses the class, and with it the keys that are known."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Literal, Union

from pydantic import BeforeValidator, Discriminator, Tag
from pydantic.fields import FieldInfo

from megatron_srpo.algorithms import ALGORITHMS, Algorithm

NAMES = tuple(cls.model_fields["name"].default for cls in ALGORITHMS)
BY_NAME: dict[str, type[Algorithm]] = dict(zip(NAMES, ALGORITHMS, strict=True))
DEFAULT = NAMES[0]


@functools.cache
def known_fields() -> dict[str, FieldInfo]:
    """Every key of any algorithm, those that methods share first, with pydantic's record of it."""
    found: dict[str, FieldInfo] = {}
    for cls in sorted(ALGORITHMS, key=lambda cls: len(cls.__mro__)):
        found |= {key: field for key, field in cls.model_fields.items() if key not in found}
    name = FieldInfo(annotation=Literal[NAMES], default=DEFAULT)  # type: ignore[arg-type]
    name.description = "The algorithm. It decides which other keys of this section are known."
    return {**found, "name": name}


def users_of(key: str) -> list[str]:
    """Names of the algorithms that know `key`."""
    return [name for name, cls in BY_NAME.items() if key in cls.model_fields]


def foreign_keys(given: Mapping[str, object]) -> list[str]:
    """Keys of `given`, a section as a user wrote it, that only other algorithms have: they have no effect."""
    chosen = BY_NAME.get(str(given.get("name", DEFAULT)))
    return [] if chosen is None else [key for key in given if key in known_fields() and key not in chosen.model_fields]


def _own_keys(given: object) -> object:
    """One file may hold the settings of several methods: those of the others are left out."""
    if not isinstance(given, dict):
        return given
    foreign = foreign_keys(given)
    return {key: value for key, value in given.items() if key not in foreign}


def _name(given: object) -> str:
    return str(given.get("name", DEFAULT) if isinstance(given, dict) else getattr(given, "name", DEFAULT))


if TYPE_CHECKING:
    AnyAlgorithm = Algorithm
else:
    _tagged = tuple(Annotated[cls, Tag(name)] for name, cls in BY_NAME.items())
    AnyAlgorithm = Annotated[Union[_tagged], Discriminator(_name), BeforeValidator(_own_keys)]  # noqa: UP007


def algorithm(name: str = DEFAULT, **keys: object) -> Algorithm:
    """The algorithm `name` with these settings; keys that only others have are left out, as in a file."""
    return BY_NAME[name].model_validate(_own_keys({"name": name, **keys}))


def name_of(*, teacher: bool) -> str:
    """The first algorithm that has a teacher, or has none."""
    return next(name for name, cls in BY_NAME.items() if cls.model_validate({"name": name}).needs.teacher is teacher)
