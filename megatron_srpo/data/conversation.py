"""The token stream of a conversation in several turns: token in, token out.

What the model has sampled is never tokenised again. The messages that follow it are appended as tokens, if the chat
template's text of the whole conversation begins with the text that is there already. Where it does not, the template
rewrites history (Qwen3 drops the thinking of earlier turns): then a new sequence begins with the rewritten text, or the
history is kept, whichever the configuration says (environment.history).
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Literal

from megatron_srpo.core.records import Context, Gap, Prompt
from megatron_srpo.core.text import THINK
from megatron_srpo.data.control_tokens import control_tokens, defused
from megatron_srpo.data.dataset import DataError
from megatron_srpo.data.demonstrations import strip_thinking
from megatron_srpo.data.prompts import encode, opened_thinking, render_chat
from megatron_srpo.data.tokenizer import Tokenizer

Message = dict[str, str]
Tools = Sequence[Mapping[str, object]]
_REPLY = "SRPO0REPLY"  # stands for the last reply while the template runs
_MARK = "SRPO0GAP"  # stands for what a teacher may be shown behind a message


class Chat:
    """What all conversations of a run share: the tokenizer and the options of its chat template. `gaps`: conversations
    find out where a teacher can be shown more (teacher.feedback_at = "turn")."""

    def __init__(
        self, tokenizer: Tokenizer, kwargs: Mapping[str, object], history: Literal["split", "keep"], *,
        gaps: bool = False,
    ) -> None:  # fmt: skip
        self.tokenizer, self.keeps_history, self.finds_gaps = tokenizer, history == "keep", gaps
        self._kwargs, self._control = kwargs, control_tokens(tokenizer, kwargs)
        self.end = "" if tokenizer.eos_token_id is None else self.decode([tokenizer.eos_token_id])
        self.shown_roles: set[str] = set()  # of messages that the template is known to show

    def begin(self, prompt: Prompt, messages: Sequence[Message] | None = None, tools: Tools = ()) -> Conversation:
        """A conversation that starts with the prompt of the data, or with an environment's own messages and tools."""
        return Conversation(self, prompt, prompt.messages if messages is None else self.defuse(messages), tools)

    def render(self, messages: Sequence[Mapping[str, object]], tools: Tools) -> str:
        """The text of the chat template, up to the model's next turn. DataError if the template refuses them."""
        return render_chat(self.tokenizer, messages, self._kwargs, "an episode", tools)

    def encode(self, text: str) -> list[int]:
        (ids,) = encode(self.tokenizer, [text])
        return list(ids)

    def decode(self, ids: Sequence[int], *, special: bool = True) -> str:
        """The text with its special tokens, or without them."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False)

    def defuse(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        """Messages of an environment, in which nothing can end a turn or begin one."""
        return tuple({**message, "content": defused(message["content"], self._control)} for message in messages)


class Conversation:
    """One episode's messages and tokens. `context` is the present sequence: what the engine continues."""

    def __init__(self, chat: Chat, prompt: Prompt, messages: Sequence[Message], tools: Tools) -> None:
        self._chat, self.tools = chat, tuple(tools)
        self.messages, self._first = list(messages), len(messages)
        users = [index for index, message in enumerate(messages) if message["role"] == "user"]
        self._question = users[-1] if users else None
        self._text = chat.render(messages, self.tools)
        self.token_ids, self.logprobs = array("i"), array("f")  # behind the first prompt; see Rollout
        self.trained: list[bool] = []
        self.contexts: list[Context] = []
        self.turns: list[int] = []
        self.answers: list[int] = []  # index of the message that each turn answers
        self.gaps: list[Gap] = []
        self.context = list(prompt.token_ids)
        if tools or tuple(messages) != prompt.messages:
            self._new_sequence(self._text)

    def add_reply(self, ids: Sequence[int], logprobs: Sequence[float], *, stopped: bool) -> str:
        """A turn of the model; returns its text, with the `<think>` that the template may have written before it.
        `stopped`: it ended by itself, so that its last token is the end."""
        self._opened = opened_thinking(self._chat.tokenizer, self._text)
        opened = THINK if self._text.rstrip().endswith(THINK) else ""
        text, end = self._chat.decode(ids[:-1] if stopped else ids), self._chat.decode(ids[-1:]) if stopped else ""
        self._text += text + end
        self._end = end
        self.token_ids.extend(ids)
        self.logprobs.extend(logprobs)
        self.trained += [True] * len(ids)
        self.context += ids
        self.turns.append(len(ids))
        self.answers.append(len(self.messages) - 1)
        self.messages.append({"role": "assistant", "content": text})
        return opened + text

    def add_messages(self, messages: Sequence[Message], room: int, longest: int) -> bool:
        """What the environment answers. False, and nothing is appended, if more than `room` tokens would be appended,
        or the sequence would have more than `longest` tokens."""
        messages = self._chat.defuse(messages)
        text, continues = self._following(messages)
        self._check_shown(messages)
        ids = self._chat.encode(text)
        if not continues:
            if len(ids) > longest:
                return False
            self.messages += messages
            self._new_sequence(text, ids)
            return True
        if len(ids) > room or len(self.context) + len(ids) > longest:
            return False
        if self._chat.finds_gaps:
            self._find_gap(messages, text, len(ids))
        self._text += text
        self.token_ids.extend(ids)
        self.logprobs.extend([0.0] * len(ids))
        self.trained += [False] * len(ids)
        self.context += ids
        self.messages += messages
        return True

    def _following(self, messages: Sequence[Message]) -> tuple[str, bool]:
        """The text that continues the sequence with these messages, and True. If history is rewritten, the text of the
        whole conversation, and False."""
        try:
            whole = self._chat.render([*self.messages, *messages], self.tools)
        except DataError:  # Mistral's wants the calls that a tool answers apart from the text, which has them
            return self._tail(messages), True
        if whole.startswith(self._text):
            return whole[len(self._text) :], True
        return (self._tail(messages), True) if self._chat.keeps_history else (whole, False)

    def _check_shown(self, messages: Sequence[Message]) -> None:
        """DataError if the template leaves messages of one of these roles out: the model would never read them."""
        roles = {message["role"] for message in messages} - self._chat.shown_roles
        if not roles:
            return
        text, _ = self._following([{**message, "content": message["content"] + _MARK} for message in messages])
        if text.count(_MARK) < len(messages):
            raise DataError(
                "the tokenizer's chat template does not show what the environment answers, in messages of the role "
                f"{' or '.join(sorted(roles))}. Use another template, or answer in messages of the role user"
            )
        self._chat.shown_roles |= roles

    def _find_gap(self, messages: Sequence[Message], text: str, tokens: int) -> None:
        """Note where a teacher can be shown more behind the last message: if the template then writes the same before
        it and behind it. `text`: of the messages, of so many `tokens`."""
        *others, last = messages
        marked, continues = self._following([*others, {**last, "content": last["content"] + _MARK}])
        before, found, after = marked.partition(_MARK)
        if continues and found and _MARK not in after and text.endswith(after):
            begin, parts = len(self.token_ids), [array("i", self._chat.encode(part)) for part in (before, after)]
            self.gaps.append(Gap(len(self.turns), begin, begin + tokens, *parts))

    def _tail(self, messages: Sequence[Message]) -> str:
        """What the template writes behind a reply, up to the next one. It is the same whatever the reply is."""
        first = self.messages[: self._first]
        try:
            text = self._chat.render([*first, {"role": "assistant", "content": _REPLY}, *messages], self.tools)
        except DataError:
            if all(message["role"] != "tool" for message in messages):
                raise
            text = self._chat.render([*first, *_with_calls(messages)], self.tools)
            _, found, tail = text.rpartition(_REPLY)[2].partition(self._chat.end)  # the end of the call's turn
            if not found:
                raise
            return tail
        before, found, tail = text.rpartition(_REPLY)
        if not found or _REPLY in before:
            raise DataError(
                "the tokenizer's chat template does not show an assistant's message once, as it is, so that "
                'environment.history = "keep" cannot continue it; use "split"'
            )
        # A model may have other ends than the template's, as Llama's for a call. They are not doubled.
        return tail.removeprefix(self._end if tail.startswith(self._end) else self._chat.end) if self._end else tail

    def _new_sequence(self, text: str, ids: Sequence[int] | None = None) -> None:
        self._text = text
        self.context = list(self._chat.encode(text) if ids is None else ids)
        begin = Context(
            len(self.token_ids), array("i", self.context), tuple(self.messages), self.tools, self._question
        )  # fmt: skip
        self.contexts.append(begin)

    @property
    def shows_tools(self) -> bool:
        """Whether the chat template has shown the tools, if there are any."""
        first = self.messages[: self._first]
        return not self.tools or self._chat.render(first, self.tools) != self._chat.render(first, ())

    @property
    def transcript(self) -> str:
        """What was said, for a teacher that is shown this episode: without thinking, and with the environment's
        messages in brackets. Of one turn it is the reply as it is."""
        said = self.messages[self._first :]
        if len(said) == 1:
            return said[0]["content"]
        return "\n\n".join(
            strip_thinking(message["content"]) if message["role"] == "assistant"
            else f"[{message['role']}] {message['content']}"
            for message in said
        )  # fmt: skip

    @property
    def reply(self) -> str:
        """The text of the last turn without special tokens, as reward functions read every response, with the `<think>`
        that the template may have written before it; "" before the first turn."""
        if not self.turns:
            return ""
        return self._opened + self._chat.decode(self.token_ids[-self.turns[-1] :], special=False)

    @property
    def said(self) -> list[Message]:
        """Everything behind the first prompt."""
        return self.messages[self._first :]


def _with_calls(messages: Sequence[Message]) -> list[dict[str, object]]:
    """Answers of tools behind a turn that calls as many, for templates that take calls apart from the text."""
    calls: list[dict[str, object]] = []
    answers: list[dict[str, object]] = []
    for message in messages:
        if message["role"] != "tool":
            answers.append({**message})
            continue
        name = f"call{len(calls):05}"  # of nine letters and digits, as Mistral's template wants it
        calls.append({"id": name, "type": "function", "function": {"name": _REPLY, "arguments": {}}})
        answers.append({**message, "tool_call_id": name})
    return [{"role": "assistant", "content": "", "tool_calls": calls}, *answers]
