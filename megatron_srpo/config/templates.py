"""The grammar of the teacher's templates: text with placeholders, read without ever formatting anything."""

from __future__ import annotations

from collections.abc import Iterator
from string import Formatter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_srpo.config.schema import TeacherConfig

Piece = tuple[str, str]  # ("text", literal) or ("field", name)

# teacher.KEY: (placeholders that it knows, those that it needs)
TEMPLATES = {
    "template": ({"question", "solution", "feedback", "instruction"}, {"question", "solution"}),
    "solution_section": ({"solution"}, {"solution"}),
    "feedback_section": ({"feedback"}, {"feedback"}),
}


def template_pieces(key: str, template: str) -> list[Piece]:
    """teacher.`key`'s template as pieces; {{ and }} are braces. ValueError for an unknown or repeated placeholder, or
    a needed one that is missing."""
    known, needed = TEMPLATES[key]
    expected = ", ".join(f"{{{name}}}" for name in sorted(known))
    try:
        parsed = list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"{error}; the placeholders are {expected}, and {{{{ stands for a brace") from None
    pieces: list[Piece] = []
    for literal, name, specification, conversion in parsed:
        if literal:
            pieces.append(("text", literal))
        if name is None:
            continue
        if name in known and (specification or conversion):
            raise ValueError(
                f"{{{name}}} has a format or a conversion; write the name alone, because the text is inserted as it is"
            )
        if name not in known:
            raise ValueError(f"unknown placeholder {{{name}}}; expected {expected}, and {{{{ stands for a brace")
        if ("field", name) in pieces:
            raise ValueError(f"{{{name}}} appears twice; expected once")
        pieces.append(("field", name))
    for name in sorted(needed):
        if ("field", name) not in pieces:
            raise ValueError(f"{{{name}}} is missing; the teacher cannot see it without the placeholder")
    return pieces


def template_problems(teacher: TeacherConfig) -> Iterator[str]:
    """A line for every template that cannot be used."""
    for key in TEMPLATES:
        try:
            template_pieces(key, getattr(teacher, key))
        except ValueError as error:
            yield f"teacher.{key}: {error}"
