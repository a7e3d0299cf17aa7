"""The table of all keys, from the models and the docstrings of their fields.

python -m megatron_srpo.config.reference > docs/configuration.md
"""

from __future__ import annotations

from pydantic_core import PydanticUndefined

from megatron_srpo.config.load import config_fields, expected, to_toml_value

HEADER = """# Configuration

This page lists every key of a run's configuration. `python -m megatron_srpo.config.reference > docs/configuration.md`
writes it from `megatron_srpo/config/schema.py`.

A run is one TOML file. It must set `path` in `[model]` and `train` in `[data]`. You can set every key on the command
line as well, with `--section.key VALUE`. The command line wins over the file, and the last value wins if you give a
key twice.

Before anything is loaded, the program refuses unknown keys, wrong types and contradictions between keys. It checks the
rows of the data and the device before it builds a model or an engine. Each run writes the configuration that it used,
defaults included, to `config.toml` in its output folder.

The column "allowed" says which values a key accepts. Keys marked "required" have no default.
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
        cells = [f"`{leaf}`", " ".join((field.description or "").split()), expected(field), f"`{values[key]}`"]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
