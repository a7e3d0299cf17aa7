"""Builds the prompt of the self-teacher: the question, a correct sibling's answer, feedback on the failed attempt.

A model wrote the demonstration and the feedback, so they are inserted as plain text. They are never formatted, and they
are encoded separately from the chat template's own text: a `<|im_end|>` inside them is a sequence of letters and does
not end a turn. For the same reason a demonstration can be cut at any token: its middle is left out, because its end is
usually the answer.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from megatron_srpo.config import DataConfig, TeacherConfig
from megatron_srpo.config.templates import Piece, template_pieces
from megatron_srpo.core.records import Prompt
from megatron_srpo.data.control_tokens import control_tokens
from megatron_srpo.data.dataset import DataError
from megatron_srpo.data.prompts import encode, render_chat
from megatron_srpo.data.tokenizer import Tokenizer

_THINKING = re.compile("</?think>")
_GAP = "\n[…]\n"  # stands for the part of a demonstration that was left out
_RECENT = 64  # texts whose tokens are kept: the samples of a group share the question, and mostly the demonstration
_WITH_GAP = 4  # a demonstration that is cut to fewer than this many times the tokens of _GAP keeps its end alone


@dataclass(frozen=True)
class TeacherPrompt:
    """Token ids of an enriched prompt. `truncated`: the demonstration or the feedback was cut to fit."""

    ids: array[int]
    truncated: bool


class TeacherPromptBuilder:
    """Calling it with (prompt, solution, feedback) gives a TeacherPrompt, or None if nothing can be shown.

    `limit` is that of the whole teacher prompt, in tokens; it may be changed. The check of the configuration has
    already verified the templates.
    """

    def __init__(self, tokenizer: Tokenizer, teacher: TeacherConfig, data: DataConfig, limit: int) -> None:
        self._tokenizer = tokenizer
        self._kwargs = data.chat_template_kwargs
        self.limit = limit
        self._instruction = teacher.instruction
        self._template = template_pieces("template", teacher.template)
        self._sections = {
            name: template_pieces(f"{name}_section", getattr(teacher, f"{name}_section"))
            for name in ("solution", "feedback")
        }
        self._untrusted = _UntrustedText(tokenizer, control_tokens(tokenizer, self._kwargs))
        self._gap = self._untrusted.encode(_GAP)
        self._inserted = lru_cache(_RECENT)(self._untrusted.encode)
        self._literal = lru_cache(_RECENT)(lambda texts: encode(tokenizer, list(texts)))
        self._check_chat_template()

    def __call__(self, prompt: Prompt, solution: str | None, feedback: str | None) -> TeacherPrompt | None:
        """Removes thinking from the solution. If the prompt is too long, cuts the middle of the demonstration, then
        the end of the feedback, never the question. None if no token of either is left."""
        shown = {"solution": strip_thinking(solution or ""), "feedback": (feedback or "").strip()}
        shown = {name: text for name, text in shown.items() if text and ("field", name) in self._template}
        if not shown:
            return None
        pieces = self._pieces(prompt, set(shown))
        fixed = self._literal(tuple(text for kind, text in pieces if kind == "text"))
        inserted = {name: list(self._inserted(text)) for name, text in shown.items()}
        room = self.limit - sum(map(len, fixed))
        needed = sum(map(len, inserted.values()))
        truncated = self._cut(inserted, needed - room)
        if not any(inserted.values()) or sum(map(len, inserted.values())) > room:
            return None
        literal = iter(fixed)
        ids = [token for kind, name in pieces for token in (next(literal) if kind == "text" else inserted[name])]
        return TeacherPrompt(array("i", ids), truncated)

    def words(self, *shown: str) -> int:
        """How many tokens the templates add to a question, with the sections of `shown` ("solution", "feedback"), but
        without the texts of these."""
        prompt = Prompt("teacher", ({"role": "user", "content": "question"},), [], "", "")
        pieces = self._pieces(prompt, {name for name in shown if ("field", name) in self._template})
        plain = render_chat(self._tokenizer, prompt.messages, self._kwargs, prompt.uid)
        question, *rest = encode(self._tokenizer, [plain, *(text for kind, text in pieces if kind == "text")])
        return sum(map(len, rest)) - len(question)

    def _cut(self, inserted: dict[str, list[int]], excess: int) -> bool:
        """Shorten the solution in its middle, then the feedback at its end, by `excess` tokens. Returns whether
        anything was cut."""
        cut = False
        for name in ("solution", "feedback"):
            ids = inserted.get(name, [])
            if excess > 0 and ids:
                cut = True
                kept = max(0, len(ids) - excess)
                excess -= len(ids) - kept
                ids[:] = self._without_middle(ids, kept) if name == "solution" else ids[:kept]
        return cut

    def _without_middle(self, ids: list[int], kept: int) -> list[int]:
        """`kept` tokens: the beginning, the sign of a gap, and the end. In little room only the end."""
        if kept < _WITH_GAP * len(self._gap):
            return ids[len(ids) - kept :]
        head = (kept - len(self._gap)) // 2
        tail = kept - len(self._gap) - head
        return ids[:head] + self._gap + ids[len(ids) - tail :]

    def _pieces(self, prompt: Prompt, shown: set[str]) -> list[Piece]:
        """The whole chat, as literal text and the places of the untrusted texts in it."""
        marks = _marks(prompt.messages)
        messages = list(prompt.messages)
        users = [index for index, message in enumerate(messages) if message["role"] == "user"]
        last = max(users) if prompt.question is None else prompt.question
        content = self._content(messages[last]["content"], {name: marks[name] for name in shown})
        messages[last] = {**messages[last], "content": content}
        text = render_chat(self._tokenizer, messages, self._kwargs, prompt.uid, prompt.tools)
        names = {mark: name for name, mark in marks.items()}
        parts = re.split("(" + "|".join(names) + ")", text)
        return [("field", names[part]) if part in names else ("text", part) for part in parts if part]

    def _content(self, question: str, marks: dict[str, str]) -> str:
        """The user's message, with a mark in place of each untrusted text. Fields that are not shown are empty."""
        fields = {"question": question, "instruction": self._instruction}
        for name, mark in marks.items():
            fields[name] = _fill(self._sections[name], {name: mark})
        return _fill(self._template, fields)

    def _check_chat_template(self) -> None:
        messages = ({"role": "user", "content": "question"},)
        shown = {name for name in self._sections if ("field", name) in self._template}
        pieces = self._pieces(Prompt("teacher", messages, [], "", ""), shown)
        for name in shown:
            count = pieces.count(("field", name))
            if count != 1:
                raise DataError(
                    f"the tokenizer's chat template shows the last user message {count} times or changes it; a teacher "
                    "prompt needs it once, as it is"
                )


class _UntrustedText:
    """Encodes text that a model wrote, so that nothing in it becomes a control token."""

    def __init__(self, tokenizer: Tokenizer, tokens: list[str]) -> None:
        self._tokenizer = tokenizer
        control = set(tokenizer.convert_tokens_to_ids(tokens))
        obeyed = [token for token in tokens if control & set(self._split(f"a{token}a"))]
        # Some tokenizers cannot be told to read these tokens as letters. Then they are removed from the text.
        self._removed = re.compile("|".join(map(re.escape, obeyed))) if obeyed else None

    def encode(self, text: str) -> list[int]:
        while self._removed is not None and self._removed.search(text):  # removing one may form another
            text = self._removed.sub("", text)
        return self._split(text)

    def _split(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def strip_thinking(text: str) -> str:
    """The text without its `<think>…</think>` parts, stripped. A part that never closes reaches to the end; a
    `</think>` alone closes a part that began with the text, because its opening tag is in the prompt."""
    kept: list[str] = []
    start, thinking = 0, False
    for tag in _THINKING.finditer(text):
        if tag.group() == "</think>":
            if not thinking:
                kept.clear()
            start, thinking = tag.end(), False
        elif not thinking:
            kept.append(text[start : tag.start()])
            thinking = True
    if not thinking:
        kept.append(text[start:])
    return "".join(kept).strip()


def _fill(pieces: Sequence[Piece], fields: dict[str, str]) -> str:
    return "".join(text if kind == "text" else fields.get(text, "") for kind, text in pieces)


def _marks(messages: Sequence[dict[str, str]]) -> dict[str, str]:
    """Placeholders for the untrusted texts while the chat template runs: letters and digits that no message has."""
    number = 0
    while any(f"SRPO{number}MARK" in message["content"] for message in messages):
        number += 1
    return {name: f"SRPO{number}MARK{name.upper()}" for name in ("solution", "feedback")}
