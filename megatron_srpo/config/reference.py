"""The table of all keys, from the models and the docstrings of their fields.

python -m megatron_srpo.config.reference > docs/configuration.md
"""

from __future__ import annotations

from pydantic_core import PydanticUndefined

from megatron_srpo.algorithms.section import BY_NAME, users_of
from megatron_srpo.config.load import ALGORITHM, config_fields, expected, to_toml_value

HEADER = """# Configuration

This page lists every key of a run's configuration. `python -m megatron_srpo.config.reference > docs/configuration.md`
writes it from `megatron_srpo/config/schema.py` and, for [algorithm], from `megatron_srpo/algorithms/`.

A run is one TOML file. It must set `path` in `[model]` and `train` in `[data]`. You can set every key on the command
line as well, with `--section.key VALUE`. The command line wins over the file, and the last value wins if you give a
key twice.

Before anything is loaded, the program refuses unknown keys, wrong types and contradictions between keys. It checks the
rows of the data and the device before it builds a model or an engine. Each run writes the configuration that it used,
defaults included, to `config.toml` in its output folder.

The column "allowed" says which values a key accepts. Keys marked "required" have no default. One file may hold keys of
several algorithms: those that the chosen one does not have are left out.
"""


def defaults() -> dict[str, str]:
    """Every dotted key with its default as TOML, or "required" if it has none."""
    return {
        key: "required" if field.default is PydanticUndefined else to_toml_value(field.default)
        for key, field in config_fields().items()
    }


def markdown() -> str:
    """The whole page."""
    values, section = defaults(), ""
    lines = [HEADER]
    for key, field in config_fields().items():
        name, _, leaf = key.partition(".")
        if name != section:
            section = name
            lines += [f"\n## [{name}]\n", "| key | meaning | allowed | default |", "|---|---|---|---|"]
        meaning = " ".join((field.description or "").split()) + _only(name, leaf)
        cells = [f"`{leaf}`", meaning, expected(field), f"`{values[key]}`"]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _only(section: str, key: str) -> str:
    """Which algorithms have this key, unless all have it."""
    users = users_of(key) if section == ALGORITHM else []
    others = [name for name in BY_NAME if name not in users]
    if not users or not others:
        return ""
    return f" Only for {', '.join(users)}." if len(users) <= len(others) else f" Not for {', '.join(others)}."


if __name__ == "__main__":
    print(markdown(), end="")
