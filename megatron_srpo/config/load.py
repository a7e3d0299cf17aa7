"""From TOML files and command line overrides to a `Config`, and back."""

from __future__ import annotations

import datetime
import difflib
import functools
import json
import math
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from megatron_srpo.algorithms.section import BY_NAME, DEFAULT, foreign_keys, known_fields, users_of
from megatron_srpo.config.check import listed
from megatron_srpo.config.schema import Config, LoraConfig
from megatron_srpo.core.atomic import atomic_write
from megatron_srpo.core.errors import ConfigError
from megatron_srpo.core.section import Section

ALGORITHM = "algorithm"  # the section whose keys depend on its `name`
STARTED_SERVERS = ("num_servers", "server_host", "server_port", "server_devices", "server_environment")
ANY_SERVERS = (
    *STARTED_SERVERS, "server_start_seconds", "server_timeout_seconds", "request_timeout_seconds",
    "max_server_restarts", "weight_transfer", "in_flight",
)  # fmt: skip
SHOWN = 70  # characters of a value in a message
OTHER_NAMES = {  # what neighbouring projects call a key
    "learning_rate": "optimizer.lr",
    "max_grad_norm": "optimizer.clip_grad",
    "grad_clip": "optimizer.clip_grad",
    "lr_warmup_steps": "optimizer.warmup_steps",
    "lr_scheduler_type": "optimizer.schedule",
    "num_generations": "rollout.n_samples_per_prompt",
    "group_size": "rollout.n_samples_per_prompt",
    "train_batch_size": "rollout.rollout_batch_size",
    "batch_size": "rollout.rollout_batch_size",
    "max_completion_length": "rollout.max_response_length",
    "max_new_tokens": "rollout.max_response_length",
    "max_steps": "run.iterations",
    "total_training_steps": "run.iterations",
    "num_train_epochs": "run.iterations",
    "tp_size": "parallel.tensor_model_parallel_size",
    "pp_size": "parallel.pipeline_model_parallel_size",
    "cp_size": "parallel.context_parallel_size",
    "ema_decay": "teacher.update_rate",
    "save_freq": "checkpoint.every",
    "test_freq": "eval.every",
    "total_epochs": "run.iterations",
    "ppo_mini_batch_size": "train.prompts_per_mini_batch",
    "ppo_max_token_len_per_gpu": "train.max_tokens_per_gpu",
    "n": "rollout.n_samples_per_prompt",
    "train_files": "data.train",
    "val_files": "data.test",
    "input_key": "data.prompt_key",
    "label_key": "data.answer_key",
    "num_rollout": "run.iterations",
    "hf_checkpoint": "model.path",
    "save_interval": "checkpoint.every",
    "eval_interval": "eval.every",
    "save_steps": "checkpoint.every",
    "eval_steps": "eval.every",
    "beta": "algorithm.kl_loss_coef",
    "prompt_data": "data.train",
    "train_dataset": "data.train",
    "eval_prompt_data": "data.test",
    "eval_dataset": "data.test",
    "ground_truth": "data.answer_key",
    "rollout_max_prompt_len": "data.max_prompt_length",
    "rollout_max_response_len": "rollout.max_response_length",
    "global_batch_size": "train.prompts_per_mini_batch",
    "rollout_num_gpus_per_engine": "rollout.tensor_parallel_size",
    "vllm_tensor_parallel_size": "rollout.tensor_parallel_size",
    "actor_rollout_ref.rollout.tensor_model_parallel_size": "rollout.tensor_parallel_size",
    "custom_reward_function.path": "reward.functions",
    "custom_rm_path": "reward.functions",
    "reward_funcs": "reward.functions",
}


@functools.cache
def config_fields() -> dict[str, FieldInfo]:
    """Every dotted key, "section.key", with pydantic's record of its type, default and bounds."""
    return {f"{name}.{key}": field for name in Config.model_fields for key, field in section_fields(name).items()}


def section_fields(name: str) -> dict[str, FieldInfo]:
    """The keys of one section; of [algorithm] those of every algorithm."""
    if name == ALGORITHM:
        return known_fields()
    section = Config.model_fields[name].annotation
    assert isinstance(section, type) and issubclass(section, Section)
    return section.model_fields


def nearest_key(key: str) -> str | None:
    """The existing key that `key` most likely means: another project's name first, then its last part in another
    section, then by spelling."""
    if key in OTHER_NAMES:
        return OTHER_NAMES[key]
    keys = list(config_fields())
    leaf = key.rpartition(".")[2].replace("-", "_")
    others = difflib.get_close_matches(leaf, OTHER_NAMES, n=1, cutoff=0.9)
    if others:
        return OTHER_NAMES[others[0]]
    same = [known for known in keys if known.rpartition(".")[2] == leaf]
    begun = [known for known in keys if known.startswith(key)]  # rollout.n_samples is the beginning of one key
    if len(begun) == 1:
        return begun[0]
    for pool in (same, keys):
        found = difflib.get_close_matches(key, pool, n=1, cutoff=0.0 if pool is same else 0.6)
        if found:
            return found[0]
    leaves = {known.rpartition(".")[2]: known for known in keys}
    found = difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.6)
    return leaves[found[0]] if found else None


# ---- reading ---------------------------------------------------------------------------------------------------------


def load_config(
    files: str | Path | Sequence[str | Path],
    overrides: Sequence[str] = (),
    *,
    tell: Callable[[str], None] = lambda text: None,
) -> Config:
    """Read one file or several and apply `overrides` ("--section.key", "VALUE", or "--section.key=VALUE").

    A key of a later file replaces the same key of an earlier one, and an override replaces both. A table that is the
    value of a key, such as data.chat_template_kwargs, is replaced as a whole. An override's value is a TOML literal;
    where the key holds text, quotes are optional. `tell` gets a line for the user about settings that have no effect.
    Raises ConfigError with all problems in one message.
    """
    paths = [Path(files)] if isinstance(files, str | Path) else [Path(file) for file in files]
    given, origins = _read_files(paths)
    pairs, problems = _split_overrides(overrides)
    for key, text in pairs:
        problem = _apply(given, key, text)
        problems += [problem] if problem else []
        origins[key] = "the command line"
    problems += _fill_names(given)
    config = None
    try:
        config = Config.model_validate(given)
    except ValidationError as error:
        problems += _explain(error, given, origins)
    if problems or config is None:
        raise ConfigError(
            listed(" + ".join([*map(str, paths), *(["the command line"] if overrides else [])]), problems)
        )
    for note in [*_without_effect(given), *_idle_teacher_keys(config), *_idle_keys(config)]:
        tell(note)
    return config


def _without_effect(given: dict[str, Any]) -> list[str]:
    """A line about settings of other algorithms, which may stand in the same file, and about settings of adapters that
    are not trained. Defaults are not worth one."""
    return [*_of_other_algorithms(given), *_of_no_adapters(given)]


def _of_no_adapters(given: dict[str, Any]) -> list[str]:
    section = given.get("lora", {})
    fields = LoraConfig.model_fields
    keys = [key for key in section if key not in ("rank", "path", "export") and section[key] != fields[key].default]
    if section.get("rank") or not keys:
        return []
    return [f"note: lora.rank = 0 trains all weights, without lora.{', '.join(keys)}: no effect"]


def _of_other_algorithms(given: dict[str, Any]) -> list[str]:
    section = given.get(ALGORITHM, {})
    keys = [key for key in foreign_keys(section) if section[key] != known_fields()[key].default]
    if not keys:
        return []
    users = sorted({user for key in keys for user in users_of(key)})
    return [
        f"note: algorithm.name = {json.dumps(section.get('name', DEFAULT))} does not use algorithm.{', '.join(keys)} "
        f"({', '.join(users)} would): no effect"
    ]


def _idle_teacher_keys(config: Config) -> list[str]:
    """A line about settings of other modes of the teacher, as above."""
    teacher = config.teacher
    users = {
        "update_rate": ("ema", "trust_region"),
        "update_every": ("ema",),
        "refresh_every": ("refresh",),
        "refresh_when": ("refresh",),
        "refresh_min_length": ("refresh",),
    }
    defaults = type(teacher).model_fields
    idle = [
        key
        for key, modes in users.items()
        if getattr(teacher, key) != defaults[key].default and teacher.mode not in modes
    ]
    notes: list[str] = []
    if not config.algorithm.needs.teacher:
        return notes
    if (
        teacher.mode == "refresh"
        and teacher.refresh_when == "always"
        and "refresh_min_length" in teacher.model_fields_set
    ):
        notes.append(
            'note: teacher.mode = "refresh" with refresh_when = "always" does not use teacher.refresh_min_length '
            '("improved" would): no effect'
        )
    if idle:
        modes = [mode for mode in get_args(defaults["mode"].annotation) if any(mode in users[key] for key in idle)]
        notes.append(
            f"note: teacher.mode = {json.dumps(teacher.mode)} does not use teacher.{', '.join(idle)} "
            f"({', '.join(modes)} would): no effect"
        )
    return notes


def _idle_keys(config: Config) -> list[str]:
    """A line about settings of servers, episodes and schedules that the run does not have, as above, and about those
    that mean something else with adapters."""
    rollout, colocated = config.rollout, config.rollout.placement == "colocated"
    of_episodes = tuple(key for key in type(config.environment).model_fields if key not in ("classes", "arguments"))
    cases = (
        (colocated, 'rollout.placement = "colocated"', rollout, "rollout", ANY_SERVERS),
        (not colocated, 'rollout.placement = "servers"', rollout, "rollout", ("sleep_while_training",)),
        (not colocated and not rollout.max_staleness, "rollout.max_staleness = 0", rollout, "rollout", ("in_flight",)),
        (bool(rollout.servers) and not colocated, "a run with rollout.servers", rollout, "rollout", STARTED_SERVERS),
        (not config.environment.classes, "a run without environment.classes", config.environment, "environment",
         of_episodes),
        (config.optimizer.schedule == "constant", 'optimizer.schedule = "constant"', config.optimizer, "optimizer",
         ("min_lr",)),
        (config.lora.rank > 0, "a run with adapters (lora.rank), which are matrices,", config.optimizer, "optimizer",
         ("decay_norms_and_biases",)),
        (not _has_shadow(config), "a run without weights of a teacher or a reference beside the student's",
         config.teacher, "teacher", ("offload",)),
    )  # fmt: skip
    notes = []
    for applies, what, section, name, keys in cases:
        defaults = type(section).model_fields
        idle = [key for key in keys if applies and getattr(section, key) != defaults[key].default]
        if idle:
            notes.append(f"note: {what} does not use {name}.{', '.join(idle)}: no effect")
    if config.lora.rank and "lr" not in config.optimizer.model_fields_set:
        notes.append(
            f"note: optimizer.lr = {config.optimizer.lr} is the default, a rate for all weights. Adapters (lora.rank) "
            "need 10 to 20 times as much (docs/lora.md); set it"
        )
    return notes


def _has_shadow(config: Config) -> bool:
    """Whether a second set of weights exists (mcore/policy.py). New adapters need none for the initial model."""
    needs, starts_as_base = config.algorithm.needs, config.lora.rank > 0 and not config.lora.path
    mode = config.teacher.mode if needs.teacher else "live"
    initial = needs.reference or mode in ("frozen", "trust_region")
    return mode in ("ema", "refresh") or (initial and not starts_as_base)


def _read_files(paths: Sequence[Path]) -> tuple[dict[str, Any], dict[str, str]]:
    """The sections of all files in one tree, and the file from which each key comes (nothing if there is one file)."""
    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for path in paths:
        for section, values in _read_toml(path).items():
            before = merged.get(section, {})
            if isinstance(values, dict) and isinstance(before, dict):
                merged[section] = before | values
                origins |= {f"{section}.{key}": str(path) for key in values}
            else:  # a plain value in place of a section: the validation reports it
                merged[section] = values
            origins[section] = str(path)
    return merged, origins if len(paths) > 1 else {}


def _fill_names(given: dict[str, Any]) -> list[str]:
    """Put run.benchmark and the method's name in place of {benchmark} and {method} in run.name and run.output_dir.
    Returns what is missing for it."""
    run, algorithm = given.get("run"), given.get(ALGORITHM, {})
    if not isinstance(run, dict) or not isinstance(algorithm, dict):
        return []
    names = {"benchmark": run.get("benchmark", ""), "method": run.get("method") or algorithm.get("name", DEFAULT)}
    problems = []
    for key in ("name", "output_dir"):
        for placeholder, name in names.items():
            text, mark = run.get(key), f"{{{placeholder}}}"
            if not isinstance(text, str) or mark not in text:
                continue
            if name:
                run[key] = text.replace(mark, str(name))
            else:
                problems.append(f"run.{key} = {_shown(text)}: needs the name for {mark}; set run.{placeholder}")
    return problems


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a byte order mark
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file. Expected a configuration in TOML{_tomls_beside(path)}.") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder. Expected a configuration file in TOML{_tomls_beside(path)}.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8. Expected a text file in TOML.") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        place = re.search(r"at line (\d+)", str(error))
        lines = text.splitlines() or [""]
        number = int(place[1]) if place else len(lines)
        line = lines[min(number, len(lines)) - 1].strip()
        raise ConfigError(f"{path}, line {number}: not valid TOML: {error}\n    {line}") from None


def _tomls_beside(path: Path) -> str:
    folder = path if path.is_dir() else path.parent
    names = sorted(file.name for file in folder.glob("*.toml"))[:8] if folder.is_dir() else []
    return f"; {folder} contains {', '.join(names)}" if names else ""


def _split_overrides(tokens: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Pairs (dotted key, value as text), and what is wrong with the form."""
    pairs, problems, rest = [], [], list(tokens)
    while rest:
        token = rest.pop(0)
        key, equals, value = token.removeprefix("--").partition("=")
        if not token.startswith("--"):
            problems.append(f"{token!r}: not expected here; an override is --section.key VALUE")
        elif equals:
            pairs.append((key, value))
        elif rest and not rest[0].startswith("--"):
            pairs.append((key, rest.pop(0)))
        else:
            problems.append(f"--{key}: has no value; write --{key} VALUE, or --{key}=VALUE if the value starts with --")
    return pairs, problems


def _apply(given: dict[str, Any], key: str, text: str) -> str | None:
    """Set one override in the tree; returns what is wrong, if its place does not exist."""
    parts = key.split(".")
    field = config_fields().get(".".join(parts[:2]))
    if field is None or (len(parts) > 2 and get_origin(field.annotation) is not dict):
        if key in Config.model_fields:
            return f"--{key}: is a section, not a key; set its keys one by one: --{key}.{_first_key(key)} VALUE"
        return f"--{key} {_shown(text)}: no such key{_nearest_hint(key)}"
    place = given
    for part in parts[:-1]:
        place = place.setdefault(part, {})
        if not isinstance(place, dict):  # the file has a plain value here: the validation reports it
            return None
    place[parts[-1]] = _value(text, Any if len(parts) > 2 else field.annotation)
    return None


def _value(text: str, annotation: object) -> Any:
    """`text` as a TOML literal, or as it stands where it is none, or where the key wants text and it reads as another
    type (a run may be named 17)."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    if set(parsed) != {"value"}:  # a line break in the text
        return text
    types = _plain_types(annotation)
    return text if str in types and type(parsed["value"]) not in types else parsed["value"]


def _plain_types(annotation: object) -> set[type]:
    """The Python types that a key accepts."""
    origin = get_origin(annotation)
    if origin in (Union, UnionType):
        return set().union(*(_plain_types(part) for part in get_args(annotation)))
    if origin is Literal:
        return {type(value) for value in get_args(annotation)}
    plain = origin or annotation
    return {plain} if isinstance(plain, type) else set()


# ---- explaining ------------------------------------------------------------------------------------------------------


def _explain(error: ValidationError, given: dict[str, Any], origins: Mapping[str, str]) -> list[str]:
    """One line for each key that is wrong, in the file's order, with its origin if there can be several."""
    lines: dict[str, str] = {}
    for details in error.errors(include_url=False):
        problem: dict[str, Any] = {**details}
        where = problem["loc"]
        if where[0] == ALGORITHM:  # pydantic puts the algorithm's name between section and key
            where = where[:1] + tuple(part for part in where[1:] if part not in BY_NAME)
            if problem["type"] == "union_tag_invalid":
                where, problem["input"] = (ALGORITHM, "name"), problem["input"]["name"]
        location = [str(part) for part in where[:2]]
        key = ".".join(location)
        if key in lines:  # the other types of a union, or another element of a list
            continue
        if len(where) > 2:  # an element of a list or table is wrong: show the whole value
            problem["input"] = given[location[0]][location[1]]
        origin = f" (from {origins[key]})" if key in origins else ""
        lines[key] = _explain_one(key, problem) + origin
    return list(lines.values())


def _explain_one(key: str, problem: dict[str, Any]) -> str:
    kind, value = problem["type"], problem["input"]
    field = config_fields().get(key)
    if kind == "missing":
        if field is None:
            return f"[{key}]: required section is missing; it needs {_required_keys(key)}"
        return f"{key}: required key is missing; expected {expected(field)}"
    if kind == "extra_forbidden":
        if "." not in key and isinstance(value, dict):
            found = difflib.get_close_matches(key, Config.model_fields, n=1, cutoff=0.5)
            hint = f"; the nearest is [{found[0]}]" if found else f"; the sections are {', '.join(Config.model_fields)}"
            return f"[{key}]: no such section{hint}"
        return f"{key} = {_shown(value)}: no such key{_nearest_hint(key)}"
    if field is None:
        return f"{key} = {_shown(value)}: expected a section [{key}] with keys such as {_first_key(key)}"
    if kind == "value_error":
        return f"{key} = {_shown(value)}: {problem['ctx']['error']}"
    return f"{key} = {_shown(value)}: expected {expected(field)}"


def _nearest_hint(key: str) -> str:
    found = nearest_key(key)
    return f"; the nearest is {found}" if found else f"; the sections are {', '.join(Config.model_fields)}"


def _first_key(section: str) -> str:
    return next(iter(section_fields(section)))


def _required_keys(section: str) -> str:
    return ", ".join(f"{section}.{name}" for name, field in section_fields(section).items() if field.is_required())


def expected(field: FieldInfo) -> str:
    """What a key accepts, in words: "a whole number ≥ 1", "one of "ema", "frozen", "live"."."""
    words = _type_in_words(field.annotation)
    bounds = []
    for bound in field.metadata:
        for attribute, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<")):
            limit = getattr(bound, attribute, None)
            if limit is not None:
                bounds.append(f"{sign} {limit}")
    return f"{words} {' and '.join(bounds)}".strip()


def _type_in_words(annotation: object) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return " or ".join(_type_in_words(part) for part in arguments)
    if origin is Literal:
        return ("one of " if len(arguments) > 1 else "") + _choices(annotation)
    if origin is list:
        elements = {str: "a list of strings", int: "a list of whole numbers"}
        return elements.get(arguments[0]) or f"a list with some of {_choices(arguments[0])}"
    if origin is dict:
        return "a table of strings" if arguments[1] is str else "a table"
    words: dict[object, str] = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}
    return words[annotation]


def _choices(annotation: object) -> str:
    return ", ".join(json.dumps(value) for value in get_args(annotation))


def _shown(value: object) -> str:
    text = to_toml_value(value)
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"


# ---- writing ---------------------------------------------------------------------------------------------------------


def to_toml(config: Config) -> str:
    """The whole configuration, defaults included, as TOML that `load_config` reads back to an equal one."""
    sections = []
    for name, values in config.model_dump().items():
        lines = [f"{key} = {to_toml_value(value)}" for key, value in values.items()]
        sections.append("\n".join([f"[{name}]", *lines]))
    return "\n\n".join(sections) + "\n"


def save_resolved(config: Config, path: str | Path) -> None:
    """Write `to_toml(config)` to `path`, whole or not at all; makes its folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    header = "# Resolved configuration of this run: the files, the overrides and the defaults.\n\n"
    atomic_write(path, header + to_toml(config))


def to_toml_value(value: object) -> str:
    """A value as a TOML literal on one line; tables inline."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return "[" + ", ".join(to_toml_value(item) for item in value) + "]"
    if isinstance(value, dict):
        pairs = [f"{_toml_key(str(key))} = {to_toml_value(item)}" for key, item in value.items()]
        return "{ " + ", ".join(pairs) + " }" if pairs else "{}"
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    return json.dumps(str(value), ensure_ascii=False)


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else to_toml_value(key)
