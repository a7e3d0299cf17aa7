"""Builds the prompt of the self-teacher: the question, a correct sibling's answer, feedback on the failed attempt.

A model wrote the demonstration and the feedback, so they are inserted as plain text. They are never formatted, and they
are encoded separately from the chat template's own text: a `<|im_end|>` inside them is a sequence of letters and does
not end a turn. For the same reason a demonstration can be cut at any token: its middle is left out, because its end is
usually the answer.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache

from megatron_srpo.config import DataConfig, TeacherConfig
from megatron_srpo.config.templates import Piece, template_pieces
from megatron_srpo.core.records import Prompt, TurnFeedback
from megatron_srpo.data.dataset import DataError
from megatron_srpo.data.demonstrations import UntrustedText, strip_thinking
from megatron_srpo.data.prompts import encode, on_all_cores, render_chat
from megatron_srpo.data.tokenizer import Tokenizer

_GAP = "\n[…]\n"  # stands for the part of a demonstration that was left out
_RECENT = 64  # texts whose tokens are kept: the samples of a group share the question, and mostly the demonstration
_NO_TURNS = TurnFeedback()
_WITH_GAP = 4  # a demonstration that is cut to fewer than this many times the tokens of _GAP keeps its end alone


@dataclass(frozen=True)
class TeacherPrompt:
    """Token ids of an enriched prompt. `truncated`: the demonstration or the feedback was cut to fit. `filled`: the
    tokens that replace each gap of the TurnFeedback."""

    ids: array[int]
    truncated: bool
    filled: tuple[array[int], ...] = ()


class TeacherPromptBuilder:
    """Calling it with (prompt, solution, feedback) gives a TeacherPrompt, or None if nothing can be shown. With
    `turns`, feedback on later turns of an episode stands at these turns too.

    `limit` is that of the whole teacher prompt and of all feedback at turns, in tokens; it may be changed. The check of
    the configuration has already verified the templates.
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
        self._untrusted = UntrustedText(tokenizer, self._kwargs)
        self._gap = self._untrusted.encode(_GAP)
        self._inserted = lru_cache(_RECENT)(self._untrusted.encode)
        self._literal = lru_cache(_RECENT)(lambda texts: [array("i", ids) for ids in encode(tokenizer, list(texts))])
        # What is known of the prompts of a batch: by (id of the prompt, names of what it shows), and by text.
        self._known_pieces: dict[tuple[int, tuple[str, ...]], list[Piece]] = {}
        self._known_ids: dict[str, array[int]] = {}
        self._batch: Sequence[Prompt] = ()  # kept, so that no other prompt gets the id of one of these
        self._check_chat_template()
        if teacher.feedback_at == "turn":
            self._check_later_messages()

    def __call__(
        self, prompt: Prompt, solution: str | None, feedback: str | None, turns: TurnFeedback = _NO_TURNS, *,
        solution_ids: array[int] | None = None,
    ) -> TeacherPrompt | None:  # fmt: skip
        """Removes thinking from the solution. If the prompt is too long, cuts the middle of the demonstration, then
        the end of the longest feedback, never the question. None if no token of them is left, or if the chat template
        changes the end of a message that feedback is added to. `solution_ids`: the tokens that `Demonstrations` has
        made of the solution."""
        shown = {"solution": strip_thinking(solution or ""), "feedback": (feedback or "").strip()}
        shown = {name: text for name, text in shown.items() if text and ("field", name) in self._template}
        messages = {_name(index): text for index, text in turns.messages.items()}
        gaps = {f"gap {number}": text for number, (_, text) in enumerate(turns.gaps)}
        if not shown and not messages and not gaps:
            return None
        pieces = self._pieces(prompt, [*shown, *messages]) if shown or messages else []
        if any(pieces.count(("field", name)) != 1 for name in messages):
            return None
        section = self._sections["feedback"]
        known = {} if solution_ids is None else {"solution": solution_ids}
        texts = {**shown, **messages, **gaps}
        inserted = {name: (known[name] if name in known else self._inserted(text))[:] for name, text in texts.items()}
        literals = self._literals([*pieces, *section])
        fixed = sum(len(literals[text]) for kind, text in pieces if kind == "text") if pieces else len(prompt.token_ids)
        words = sum(len(literals[text]) for kind, text in section if kind == "text")
        fixed += sum(len(gap.before) + words + len(gap.after) - (gap.end - gap.begin) for gap, _ in turns.gaps)
        room, needed = self.limit - fixed, sum(map(len, inserted.values()))
        truncated = self._cut(inserted, needed - room)
        if not any(inserted.values()) or sum(map(len, inserted.values())) > room:
            return None

        def tokens(pieces: Iterable[Piece], **fields: str) -> array[int]:
            found = array("i")
            for kind, text in pieces:
                found += literals[text] if kind == "text" else inserted[fields.get(text, text)]
            return found

        ids = tokens(pieces) if pieces else array("i", prompt.token_ids)
        filled = tuple(
            gap.before + tokens(section, feedback=name) + gap.after
            for name, (gap, _) in zip(gaps, turns.gaps, strict=True)
        )
        return TeacherPrompt(ids, truncated, filled)

    def prepare(self, prompts: Sequence[Prompt]) -> None:
        """Render the questions of a batch with the place of a solution, and tokenize them all at once, on all cores:
        rank 0 does it while the other ranks wait. What is not prepared is made when it is asked for."""
        self._batch, self._known_pieces, self._known_ids = prompts, {}, {}
        shown = tuple(name for name in ("solution",) if ("field", name) in self._template)
        found = {(id(prompt), shown): self._pieces(prompt, shown) for prompt in prompts}
        texts = list(dict.fromkeys(text for pieces in found.values() for kind, text in pieces if kind == "text"))
        with on_all_cores():
            ids = encode(self._tokenizer, texts)
        self._known_pieces, self._known_ids = found, dict(zip(texts, (array("i", one) for one in ids), strict=True))

    def _literals(self, pieces: Sequence[Piece]) -> dict[str, array[int]]:
        texts = list(dict.fromkeys(text for kind, text in pieces if kind == "text"))
        unknown = tuple(text for text in texts if text not in self._known_ids)
        made = dict(zip(unknown, self._literal(unknown), strict=True))
        return {text: made[text] if text in made else self._known_ids[text] for text in texts}

    def words(self, *shown: str) -> int:
        """How many tokens the templates add to a question, with the sections of `shown` ("solution", "feedback"), but
        without the texts of these."""
        prompt = Prompt("teacher", ({"role": "user", "content": "question"},), [], "", "")
        pieces = self._pieces(prompt, {name for name in shown if ("field", name) in self._template})
        plain = render_chat(self._tokenizer, prompt.messages, self._kwargs, prompt.uid)
        question, *rest = encode(self._tokenizer, [plain, *(text for kind, text in pieces if kind == "text")])
        return sum(map(len, rest)) - len(question)

    def _cut(self, inserted: dict[str, array[int]], excess: int) -> bool:
        """Shorten the solution in its middle, then the longest feedback at its end, by `excess` tokens. Returns whether
        anything was cut."""
        cut = False
        for name in sorted(inserted, key=lambda name: (name != "solution", -len(inserted[name]))):
            ids = inserted[name]
            if excess > 0 and ids:
                cut = True
                kept = max(0, len(ids) - excess)
                excess -= len(ids) - kept
                ids[:] = self._without_middle(ids, kept) if name == "solution" else ids[:kept]
        return cut

    def _without_middle(self, ids: array[int], kept: int) -> array[int]:
        """`kept` tokens: the beginning, the sign of a gap, and the end. In little room only the end."""
        if kept < _WITH_GAP * len(self._gap):
            return ids[len(ids) - kept :]
        head = (kept - len(self._gap)) // 2
        tail = kept - len(self._gap) - head
        return ids[:head] + self._gap + ids[len(ids) - tail :]

    def _pieces(self, prompt: Prompt, shown: Collection[str]) -> list[Piece]:
        """The whole chat, as literal text and the places of the untrusted texts in it: of "solution" and "feedback" in
        the question, and at the ends of messages (`_name`)."""
        if (known := self._known_pieces.get((id(prompt), tuple(shown)))) is not None:
            return known
        marks = _marks(prompt.messages, shown)
        messages = list(prompt.messages)
        users = [index for index, message in enumerate(messages) if message["role"] == "user"]
        last = max(users) if prompt.question is None else prompt.question
        own = {name: marks[name] for name in self._sections if name in marks}
        if own:
            messages[last] = {**messages[last], "content": self._content(messages[last]["content"], own)}
        for index, message in enumerate(messages):
            if (mark := marks.get(_name(index))) is not None:
                more = _fill(self._sections["feedback"], {"feedback": mark})
                messages[index] = {**message, "content": message["content"] + more}
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

    def _check_later_messages(self) -> None:
        """DataError if nothing can be added to any message that follows an answer."""
        found = []
        for role in ("user", "tool"):
            messages = tuple({"role": each, "content": "text"} for each in ("user", "assistant", role))
            with suppress(DataError):  # a template may know no tools
                found.append(self._pieces(Prompt("teacher", messages, [], "", "", question=0), [_name(2)]))
        if not any(pieces.count(("field", _name(2))) == 1 for pieces in found):
            raise DataError(
                "the tokenizer's chat template does not show a message behind an answer once, as it is, so that "
                'teacher.feedback_at = "turn" cannot add feedback to it; set it to "prompt"'
            )


def _fill(pieces: Sequence[Piece], fields: dict[str, str]) -> str:
    return "".join(text if kind == "text" else fields.get(text, "") for kind, text in pieces)


def _name(index: int) -> str:
    """Of the feedback at the end of a message."""
    return f"message {index}"


def _marks(messages: Sequence[dict[str, str]], names: Collection[str]) -> dict[str, str]:
    """Placeholders for the untrusted texts while the chat template runs: letters and digits that no message has."""
    number = 0
    while any(f"SRPO{number}MARK" in message["content"] for message in messages):
        number += 1
    return {name: f"SRPO{number}MARK{place}END" for place, name in enumerate(names)}
