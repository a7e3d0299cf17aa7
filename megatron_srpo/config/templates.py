"""The grammar of the teacher's templates: text with placeholders, read without ever formatting anything."""

from __future__ import annotations

from collections.abc import Collection, Iterator
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


def template_problems(teacher: TeacherConfig, sources: Collection[str] = ()) -> Iterator[str]:
    """A line for every template that cannot be used, and for every text that no template shows. `sources`: what teaches
    (algorithm.teachers)."""
    for key in TEMPLATES:
        try:
            template_pieces(key, getattr(teacher, key))
        except ValueError as error:
            yield f"teacher.{key}: {error}"
            return
    shown = {name for kind, name in template_pieces("template", teacher.template) if kind == "field"}
    for name, key in {"instruction": "instruction", "feedback": "feedback_section"}.items():
        if name not in shown and getattr(teacher, key) != type(teacher).model_fields[key].default:
            yield (
                f"teacher.{key}: the teacher never reads it, because teacher.template has no {{{name}}}; add the "
                f"placeholder, or leave teacher.{key} out"
            )
    if "feedback" not in shown and "feedback" in sources:
        yield (
            "teacher.template: it has no {feedback}, and algorithm.use_feedback or algorithm.teachers shows feedback "
            "to the teacher; add the placeholder"
        )
