"""Responses made up from a reference answer, in the form that a kind expects: `check` scores them before a run."""

from __future__ import annotations

import json
from collections.abc import Callable

from megatron_srpo.rewards.answers import math_reference, mcq_reference
from megatron_srpo.rewards.tooluse import expected_calls

Form = Callable[[object], str]


def _plain(answer: object) -> str:
    return answer.strip() if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False, default=str)


def _calls(answer: object) -> str:
    calls = expected_calls(answer)
    pairs = zip(calls.actions, calls.inputs, strict=True)
    return "\n".join(f"Action: {action}\nAction Input: {json.dumps(given)}" for action, given in pairs)


FORMS: dict[str, tuple[str, Form]] = {
    "mcq": ("<answer>LETTER</answer>", lambda answer: f"<answer>{mcq_reference(answer)}</answer>"),
    "math": ("\\boxed{ANSWER}", lambda answer: f"\\boxed{{{math_reference(answer)}}}"),
    "exact": ("ANSWER", _plain),
    "tooluse": ("Action: NAME, Action Input: JSON", _calls),
    "reasoning_gym": ("<answer>ANSWER</answer>", lambda answer: f"<answer>{_plain(answer)}</answer>"),
}
OWN: tuple[tuple[str, Form], ...] = (  # what a user's own function may look for
    ("ANSWER", _plain),
    ("<answer>ANSWER</answer>", lambda answer: f"<answer>{_plain(answer)}</answer>"),
    ("\\boxed{ANSWER}", lambda answer: f"\\boxed{{{_plain(answer)}}}"),
    ("#### ANSWER", lambda answer: f"#### {_plain(answer)}"),
)


def forms(kind: str, *, own: bool) -> tuple[tuple[str, Form], ...]:
    """(description, answer → a response that has it) of each form to try. `own`: a function of the user scores it."""
    known = FORMS.get(kind.replace("-", "_"))
    return OWN if own or known is None else (known,)
