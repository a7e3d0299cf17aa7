"""The kind mcq: the response names an option of a multiple-choice question, as `<answer>LETTER</answer>`."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_srpo.core.text import after_thinking
from megatron_srpo.rewards.answers import mcq_reference
from megatron_srpo.rewards.registry import Verdict, register
from megatron_srpo.rewards.tags import last_tagged


@register("mcq")
def score(response: str, answer: object, metadata: Mapping[str, object]) -> Verdict:
    """1 if the text between the last `<answer>` and `</answer>` is the answer's letter, else 0. Thinking is a draft.

    The row's answer may be written as `B`, `b`, `(B)`, `B. text` or `Answer: B`. The response is well-formed if it ends
    with that pair and one capital letter is between the tags. The feedback never names the right option, because a
    teacher that reads it would only have to copy it.
    """
    return _compare(response, last_tagged(after_thinking(response), "answer"), answer)


def score_lenient(response: str, answer: object, metadata: Mapping[str, object]) -> Verdict:
    """As SDPO's code scores (reward.mcq_format = "lenient"): 1 if the text after the last `<answer>`, up to the next
    `</answer>`, is the answer's letter. The end of the response replaces a tag that is missing behind the letter, and
    its start one before it. Whether a response is well-formed does not depend on this."""
    return _compare(response, response.rpartition("<answer>")[2].partition("</answer>")[0].strip(), answer)


def _compare(response: str, given: str | None, answer: object) -> Verdict:
    expected = mcq_reference(answer)
    if given is None:
        return Verdict(0.0, "The response has no <answer>…</answer> with the letter of an option.", False)
    is_letter = len(given) == 1 and "A" <= given <= "Z"
    well_formed = is_letter and "<answer>" in response and response.rstrip().endswith("</answer>")
    if given == expected:
        return Verdict(1.0, None, well_formed, given)
    if is_letter:
        return Verdict(0.0, f"Option {given} is not the right one.", well_formed, given)
    return Verdict(0.0, "The text between <answer> and </answer> is not the letter of an option.", False, given)
