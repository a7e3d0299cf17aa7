"""Finds the environment class of a name: a built-in one, or the user's "module:Class" or "path/file.py:Class"."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_srpo.core.errors import UserError
from megatron_srpo.core.user_code import load_file
from megatron_srpo.environments.base import Environment

BUILT_IN = {
    "tools": "megatron_srpo.environments.tools:Tools",
    "python": "megatron_srpo.environments.code:PythonCode",
    "textarena": "megatron_srpo.environments.textarena:TextArena",
    "openenv": "megatron_srpo.environments.openenv:OpenEnv",
    "verifiers": "megatron_srpo.environments.verifiers:Verifiers",
}


def resolve(reference: str) -> type[Environment]:
    """The class. UserError with the cure if there is none."""
    found = load_object(BUILT_IN.get(reference, reference), "environment")
    if not isinstance(found, type) or not issubclass(found, Environment):
        raise UserError(
            f"environment {reference!r}: expected a subclass of megatron_srpo.environments.Environment, got {found!r}"
        )
    if found.step is Environment.step:
        raise UserError(f"environment {reference!r}: the class has no method step(self, reply)")
    return found


def check_arguments(environment: type[Environment], arguments: Mapping[str, Any], name: str) -> None:
    """Make a built-in environment once. UserError names every argument that it does not take."""
    try:
        environment(**arguments)
    except ValidationError as error:
        wrong = [_wrong(one) for one in error.errors()]
        known = ", ".join(list(inspect.signature(environment.__init__).parameters)[1:])
        raise UserError(f'arguments of a "{name}" environment: {"; ".join(wrong)} (it takes {known})') from None


def _wrong(one: Mapping[str, Any]) -> str:
    """One error of pydantic's in words. The `input` of a missing argument is all arguments, so it is not shown."""
    argument = ".".join(map(str, one["loc"]))
    missing = str(one["type"]).startswith("missing")
    if missing:
        return f'the argument "{argument}" is missing; give it in environment.arguments'
    return f"{argument} = {one['input']!r}: {one['msg']}"


def load_object(reference: str, what: str) -> object:
    """What "module:name" or "path/file.py:name" names. UserError if there is no such thing."""
    where, _, name = reference.rpartition(":")
    try:
        module = load_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    except UserError:
        raise
    except ImportError as error:
        package = (error.name or where).partition(".")[0].replace("_", "-")
        raise UserError(f"{what} {reference!r} needs a package: {error}. Install it: pip install {package}") from error
    except (Exception, SystemExit) as error:  # the user's module may raise anything while it is imported
        raise UserError(f"{what} {reference!r}: cannot import {where!r}: {type(error).__name__}: {error}") from error
    found = getattr(module, name, None)
    if found is None:
        public = [key for key in vars(module) if not key.startswith("_")]
        nearest = difflib.get_close_matches(name, public, n=1)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        raise UserError(f"{what} {reference!r}: {where!r} has no {name!r}.{hint}")
    return found
