"""Examples → prompts: applies the tokenizer's chat template, and drops or refuses prompts that are too long."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from megatron_srpo.config import DataConfig
from megatron_srpo.core.records import Prompt
from megatron_srpo.core.text import THINK
from megatron_srpo.core.time_limit import TimeIsUp, time_limit
from megatron_srpo.data.dataset import DataError, Example
from megatron_srpo.data.prompt_cache import PromptCache
from megatron_srpo.data.tokenizer import Tokenizer

_RESERVED = {
    "conversation",
    "tools",
    "messages",
    "tokenize",
    "add_generation_prompt",
    "continue_final_message",
    "return_dict",
}
TEMPLATE_SECONDS = 10.0  # limit for one prompt, which takes less than a millisecond
_AT_ONCE = 1024  # texts in one call of the tokenizer


def render_prompts(
    examples: Sequence[Example], tokenizer: Tokenizer, config: DataConfig, split: str, cache: Path | None = None
) -> tuple[list[Prompt], int]:
    """The prompts in the examples' order, and how many were dropped because of `config.max_prompt_length` tokens.

    A prompt's uid is "<split>:<row>". `cache` is a folder in which token ids are kept for the next call. DataError if
    prompts are too long and `config.overlong_prompts` is "error", or if no prompt is left.
    """
    kept = PromptCache(cache and cache / f"{split}.ids", examples, tokenizer, config.chat_template_kwargs)
    found = kept.read()
    if found is None:
        found = _all_ids(examples, tokenizer, config)
        kept.write(found)
    prompts: list[Prompt] = []
    too_long: list[tuple[Example, int]] = []
    for example, ids in zip(examples, found, strict=True):
        if len(ids) > config.max_prompt_length:
            too_long.append((example, len(ids)))
        else:
            prompts.append(_prompt(example, ids, split))
    if too_long and (config.overlong_prompts == "error" or not prompts):
        raise DataError(_overlong(too_long, len(examples), config))
    return prompts, len(too_long)


def _all_ids(examples: Sequence[Example], tokenizer: Tokenizer, config: DataConfig) -> list[list[int]]:
    """The token ids of the rendered examples. DataError for one without tokens."""
    found: list[list[int]] = []
    for start in range(0, len(examples), _AT_ONCE):
        some = examples[start : start + _AT_ONCE]
        texts = [render_chat(tokenizer, one.messages, config.chat_template_kwargs, one.source) for one in some]
        with on_all_cores():
            found += encode(tokenizer, texts)
    for example, ids in zip(examples, found, strict=True):
        if not ids:
            raise DataError(
                f"{example.source}: the chat template makes no token of these messages; a response needs at least "
                "one token before it. Correct the row, or the template of the tokenizer"
            )
    return found


@contextmanager
def on_all_cores() -> Iterator[None]:
    """Let the tokenizer encode a batch in threads, because the other ranks wait for it. Afterwards it has one thread,
    as before, because processes are forked later."""
    before = os.environ.get("TOKENIZERS_PARALLELISM", "false")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        yield
    finally:
        os.environ["TOKENIZERS_PARALLELISM"] = before


def opened_thinking(tokenizer: Tokenizer, text: str) -> str:
    """ "<think>" if the chat template has begun the model's thinking at the end of `text`, else "". A response does not
    have this tag, and would look like an answer if its thinking is cut. "" also where `</think>` is a special token,
    which rewards never see."""
    if not text.rstrip().endswith(THINK):
        return ""
    end = tokenizer.encode("</think>", add_special_tokens=False)
    seen = tokenizer.decode(end, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return THINK if "</think>" in seen else ""


def render_chat(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, object]], kwargs: Mapping[str, object], where: str,
    tools: Sequence[Mapping[str, object]] = (),
) -> str:  # fmt: skip
    """The text of the chat template for the messages, up to the assistant's answer. `where` is the place that an error
    names, `tools` are JSON schemas of functions. DataError if the template refuses them."""
    reserved = _RESERVED & set(kwargs)
    if reserved:
        raise DataError(f"data.chat_template_kwargs: {sorted(reserved)} are set by the trainer; remove them")
    try:
        with time_limit(TEMPLATE_SECONDS):
            options = {**kwargs, "tools": list(tools)} if tools else kwargs
            return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True, **options)
    except TimeIsUp as error:
        raise DataError(
            f"{where}: the tokenizer's chat template does not come to an end ({error}). Use another template"
        ) from error
    except Exception as error:  # templates raise their own errors, e.g. that they have no system role
        raise DataError(f"{where}: the tokenizer's chat template refuses these messages: {error}") from error


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of rendered texts. Special tokens in the texts become their ids; none are added."""
    return tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []


def _prompt(example: Example, ids: list[int], split: str) -> Prompt:
    uid = f"{split}:{example.row}"
    return Prompt(
        uid, example.messages, list(ids), example.answer, example.kind, example.metadata, example.source,
        example.solution,
    )  # fmt: skip


def hides_system(tokenizer: Tokenizer, prompt: Prompt, config: DataConfig) -> bool:
    """Whether the chat template omits the system message with which this prompt begins."""
    text = render_chat(tokenizer, prompt.messages, config.chat_template_kwargs, prompt.source)
    return text == render_chat(tokenizer, prompt.messages[1:], config.chat_template_kwargs, prompt.source)


def _overlong(too_long: list[tuple[Example, int]], count: int, config: DataConfig) -> str:
    example, _ = too_long[0]
    shortest, longest = (limit(length for _, length in too_long) for limit in (min, max))
    lengths = str(longest) if shortest == longest else f"{shortest} to {longest}"
    return (
        f"{len(too_long)} of {count} prompts are longer than data.max_prompt_length = {config.max_prompt_length} "
        f"tokens ({lengths}; first: {example.source}). Raise data.max_prompt_length"
        + ("" if len(too_long) == count else ', or drop them: data.overlong_prompts = "drop"')
    )
