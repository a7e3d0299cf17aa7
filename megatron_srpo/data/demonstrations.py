"""Answers as a teacher reads them: without their thinking, and with no letters of theirs as a control token.

The tokens of an answer that a teacher may be shown are made by the rank that has the answer, while other answers are
still being generated. On rank 0, at 5 µs per token, they would take seconds of a large batch, and everyone would wait.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache

from megatron_srpo.data.control_tokens import control_tokens
from megatron_srpo.data.tokenizer import Tokenizer, load_tokenizer

_THINKING = re.compile("</?think>")


class UntrustedText:
    """Encodes text that a model wrote, so that nothing in it becomes a control token. `kwargs`: the arguments of the
    chat template."""

    def __init__(self, tokenizer: Tokenizer, kwargs: Mapping[str, object]) -> None:
        self._tokenizer = tokenizer
        tokens = control_tokens(tokenizer, kwargs)
        control = set(tokenizer.convert_tokens_to_ids(tokens))
        obeyed = [token for token in tokens if control & set(self._split(f"a{token}a"))]
        # Some tokenizers cannot be told to read these tokens as letters. Then they are removed from the text.
        self._removed = re.compile("|".join(map(re.escape, obeyed))) if obeyed else None

    def encode(self, text: str) -> array[int]:
        """Its token ids."""
        while self._removed is not None and self._removed.search(text):  # removing one may form another
            text = self._removed.sub("", text)
        return array("i", self._split(text))

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


class Demonstrations:
    """Tokenizes answers in a thread. It has a tokenizer of its own, because whether control tokens are split is a state
    of the tokenizer, which another thread's call would change. It is loaded for the first answer.

    `tokenizer`: its folder. `kwargs`: the arguments of the chat template.
    """

    def __init__(self, tokenizer: str, kwargs: Mapping[str, object]) -> None:
        self._make = lru_cache(1)(lambda: UntrustedText(load_tokenizer(tokenizer), kwargs))
        self._thread = ThreadPoolExecutor(1, "demonstrations")
        self._begun: dict[str, Future[array[int]]] = {}

    def begin(self, text: str) -> None:
        """Have an answer tokenized, in the background. Any thread may call it."""
        if text not in self._begun:
            self._begun[text] = self._thread.submit(lambda: self._make().encode(strip_thinking(text)))

    def take(self, texts: Iterable[str]) -> dict[str, array[int]]:
        """Text → the tokens that a teacher reads, for those of `texts` that were begun; waits for them, and forgets
        them. Raises what went wrong."""
        begun = {text: found for text in texts if (found := self._begun.pop(text, None)) is not None}
        return {text: found.result() for text, found in begun.items()}

    def close(self) -> None:
        """End the thread; what it has not begun is not done."""
        self._thread.shutdown(cancel_futures=True)
