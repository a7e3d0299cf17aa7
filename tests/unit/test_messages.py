"""Messages that are joined from sentences of several authors."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import megatron_srpo
from megatron_srpo.core.errors import UserError
from megatron_srpo.core.text import clause
from megatron_srpo.environments.registry import load_object
from megatron_srpo.rewards.registry import unknown

PACKAGE = Path(megatron_srpo.__file__).parent
# Variables that hold what another function, or a library, has said: it may end with a stop.
SAID = re.compile(r"(str\()?(error|problem|reason|ended)\)?|message\[.*\]|_with_last_words.*")


def doubled(source: str) -> list[str]:
    """Where an f-string puts a stop behind what may already end with one."""
    texts = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.JoinedStr)]
    return [
        f"{part.lineno}: {{{ast.unparse(part.value)}}}{rest.value[:20]}"
        for text in texts
        for part, rest in zip(text.values, text.values[1:], strict=False)
        if isinstance(part, ast.FormattedValue)
        and isinstance(rest, ast.Constant)
        and re.match(r"\.(\s|$)", str(rest.value))
        and SAID.fullmatch(ast.unparse(part.value))
    ]


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_stop_follows_what_may_end_with_one(file):
    assert doubled(file.read_text(encoding="utf-8")) == []


def test_a_doubled_stop_would_be_found():
    assert doubled('f"no: {error}. Try again"') == ["1: {error}. Try again"]
    assert doubled('f"no: {clause(error)}. Try again"') == doubled('f"{error}: again"') == []


def test_a_clause_has_no_stop_at_its_end():
    assert clause(ValueError("It is wrong.")) == "It is wrong" and clause("a.b ") == "a.b"


def test_the_message_of_a_kind_without_reward_can_be_continued(tmp_path):
    problem = unknown("sums", {})
    assert problem is not None and problem.endswith('"path/file.py:function".')
    (tmp_path / "bad.py").write_text("import no_such_module")
    with pytest.raises(UserError) as caught:
        load_object(f"{tmp_path}/bad.py:Any", "environment")
    assert ".." not in str(caught.value).replace("...", "")
