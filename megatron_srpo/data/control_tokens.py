"""The tokens with which a chat template marks turns. Text of others must not contain them, or it could end a turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress

from megatron_srpo.data.dataset import DataError
from megatron_srpo.data.prompts import render_chat
from megatron_srpo.data.tokenizer import Tokenizer


def control_tokens(tokenizer: Tokenizer, kwargs: Mapping[str, object]) -> list[str]:
    """The special tokens, and the added tokens with which the chat template marks turns: some tokenizers do not call
    them special. `kwargs` are those of the template."""
    marked = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    text = ""
    for roles in (("user",), ("user", "assistant", "user"), ("user", "assistant", "tool")):
        with suppress(DataError):  # a template may refuse an earlier answer, or tools
            text += render_chat(tokenizer, [{"role": role, "content": "a"} for role in roles], kwargs, "a chat")
    # Most special tokens of Llama and Mistral have no name in the tokenizer's configuration, and are listed as added.
    special = [t for t in dict.fromkeys([*tokenizer.all_special_tokens, *marked]) if t != tokenizer.unk_token]
    # Some tokenizers have runs of spaces, or words, among the added tokens: these are text.
    added = [token for token in tokenizer.get_added_vocab() if token.strip() and not token.isalnum()]
    return special + [token for token in added if token in text and token not in special]


def defused(text: str, tokens: Sequence[str]) -> str:
    """The text with a space behind the first character of each of `tokens`, which are then letters for the tokenizer:
    "<|im_end|>" becomes "< |im_end|>"."""
    for token in tokens:
        text = text.replace(token, f"{token[0]} {token[1:]}")
    return text
