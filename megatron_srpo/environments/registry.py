"""Finds the environment class of a name: a built-in one, or the user's "module:Class" or "path/file.py:Class"."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from megatron_srpo.core.errors import UserError
from megatron_srpo.core.text import clause
from megatron_srpo.core.user_code import load_file
from megatron_srpo.environments.base import Environment

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

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
    if not isinstance(inspect.getattr_static(found, "prepare"), classmethod | staticmethod):
        raise UserError(f"environment {reference!r}: prepare must be a class method; write @classmethod above it")
    return found


def check_arguments(environment: type[Environment], arguments: Mapping[str, Any], name: str, kind: str) -> None:
    """Whether the class `name` of `kind` takes these arguments; a built-in one, which costs little, is made once.
    UserError names every argument that is missing, unknown or wrong, and its key."""
    wrong = list(_misfits(environment, arguments, kind))
    if not wrong and name in BUILT_IN:
        try:
            environment(**arguments)
        except ValidationError as error:
            wrong = [_wrong(one, kind) for one in error.errors()]
    if wrong:
        subject = f'a "{name}" environment' if name in BUILT_IN else environment.__name__
        known = ", ".join(inspect.signature(environment).parameters) or "none"
        raise UserError(f"arguments of {subject}: {'; '.join(wrong)} (it takes {known})")


def _misfits(environment: type[Environment], arguments: Mapping[str, Any], kind: str) -> Iterator[str]:
    """The arguments that the constructor or `prepare`, which gets the same ones, does not take or lacks."""
    told: set[str] = set()
    for method in (environment, environment.prepare):
        known = inspect.signature(method).parameters.values()
        named = [one for one in known if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
        missing = {one.name for one in named if one.default is one.empty} - arguments.keys() - told
        takes_all = any(one.kind is one.VAR_KEYWORD for one in known)
        unknown = set() if takes_all else arguments.keys() - {one.name for one in named} - told
        told |= missing | unknown
        for name in sorted(missing):
            yield f'the argument "{name}" is missing; set environment.arguments.{kind}.{name}'
        where = "prepare() takes" if method == environment.prepare else "there is"
        for name in sorted(unknown):
            yield f"environment.arguments.{kind}.{name}: {where} no such argument"


def _wrong(one: ErrorDetails, kind: str) -> str:
    """One error of pydantic's in words; a check of ours raises ValueError with its own."""
    problem = str(one["ctx"]["error"]) if one["type"] == "value_error" else one["msg"]
    return f"environment.arguments.{kind}.{'.'.join(map(str, one['loc']))} = {one['input']!r}: {problem}"


def load_object(reference: str, what: str) -> object:
    """What "module:name" or "path/file.py:name" names. UserError if there is no such thing."""
    where, _, name = reference.rpartition(":")
    try:
        module = load_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    except UserError:
        raise
    except ModuleNotFoundError as error:
        if error.name and (where == error.name or where.startswith(f"{error.name}.")):
            raise UserError(
                f"{what} {reference!r}: there is no module {error.name!r}. Expected one of an installed package or of "
                f"the working directory {Path.cwd()}; name another, or a file: path/file.py:{name}"
            ) from error
        package = (error.name or where).partition(".")[0].replace("_", "-")
        raise UserError(
            f"{what} {reference!r} needs a package: {clause(error)}. Install it: pip install {package}"
        ) from error
    except (Exception, SystemExit) as error:  # the user's module may raise anything while it is imported
        raise UserError(f"{what} {reference!r}: cannot import {where!r}: {type(error).__name__}: {error}") from error
    found = getattr(module, name, None)
    if found is None:
        public = [key for key in vars(module) if not key.startswith("_")]
        nearest = difflib.get_close_matches(name, public, n=1)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        raise UserError(f"{what} {reference!r}: {where!r} has no {name!r}.{hint}")
    return found
