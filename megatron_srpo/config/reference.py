"""The table of all keys, from the models and the comments beside them.

python -m megatron_srpo.config.reference > docs/configuration.md
"""

from __future__ import annotations

import inspect
import io
import re
import tokenize

from pydantic_core import PydanticUndefined

from megatron_srpo.config import schema
from megatron_srpo.config.load import config_fields, expected, to_toml_value

HEADER = """# Configuration

Written by `python -m megatron_srpo.config.reference > docs/configuration.md` from `megatron_srpo/config/schema.py`.

A run is one TOML file; `path` in `[model]` and `train` in `[data]` are required. Every key can be set on the command
line as well, `--section.key VALUE`, which wins over the file (the last one does, where a key is given twice). Unknown
keys, wrong types and contradictions are refused before anything is loaded; a bad row of the data, or a device that is
not there, once the libraries are loaded and before any model or engine. Each run writes what it really used to
`config.toml` in its output folder.
"""


def comments() -> dict[str, str]:
    """The comment on the line of each field, by "ClassName.field"."""
    source = inspect.getsource(schema)
    fields = {number: found for number, found in enumerate(source.splitlines(), 1) if _FIELD.match(found)}
    classes = {number: found[1] for number, line in enumerate(source.splitlines(), 1) if (found := _CLASS.match(line))}
    meanings = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        number = token.start[0]
        if token.type == tokenize.COMMENT and number in fields:
            owner = classes[max(line for line in classes if line < number)]
            meanings[f"{owner}.{_FIELD.match(fields[number])[1]}"] = token.string.lstrip("# ")
    return meanings


_FIELD = re.compile(r"    (\w+): ")
_CLASS = re.compile(r"class (\w+)\(")


def defaults() -> dict[str, str]:
    """Every dotted key with its default as TOML; "required" where there is none."""
    return {
        key: "required" if field.default is PydanticUndefined else to_toml_value(field.default)
        for key, field in config_fields().items()
    }


def markdown() -> str:
    """The whole page."""
    meanings, values = comments(), defaults()
    lines, section = [HEADER], ""
    for key, field in config_fields().items():
        name, _, leaf = key.partition(".")
        if name != section:
            section = name
            lines += [f"\n## [{name}]\n", "| key | default | expected | meaning |", "|---|---|---|---|"]
        owner = schema.Config.model_fields[name].annotation.__name__
        cells = [f"`{leaf}`", f"`{values[key]}`", expected(field), meanings.get(f"{owner}.{leaf}", "")]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
