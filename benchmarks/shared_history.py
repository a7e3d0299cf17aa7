"""How many tokens of split episodes are computed once, of all that could be.

    python -m benchmarks.shared_history TOKENIZER_FOLDER [--turns 6] [--thinking 60]

An episode is split where the chat template rewrites earlier turns. Sequences share the equal beginnings of their
prompts. Trained tokens that come back as history are computed again, although a tree of whole sequences would have them
once: "any tree" counts that one.
"""

from __future__ import annotations

import argparse
from array import array
from typing import Any

import numpy as np

from megatron_srpo.batching.prefixes import prefixes_of
from megatron_srpo.core.records import Padding, Sample, Stream

# As Llama 3's template does, this one removes white space at the ends of a turn.
TRIMS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def sequences(tokenizer: Any, turns: int, thinking: int, ending: str, template: str | None) -> list[list[list[int]]]:
    """[prompt, everything behind it] of each sequence of one episode, as environment.history = "split" makes them."""
    messages = [
        {"role": "system", "content": "Work step by step. " * 12},
        {"role": "user", "content": "Find it. " * 40},
    ]
    made: list[list[list[int]]] = []
    for turn in range(turns):
        prompt = list(tokenizer.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=True, return_dict=True
        )["input_ids"])  # fmt: skip
        answer = f"I try number {turn} and look at what comes back."
        thought = f"<think>\n{f'Is it {turn}? ' * (thinking // 5)}\n</think>\n\n" if thinking else ""
        response = tokenizer(f"{thought}{answer}{ending}<|im_end|>", add_special_tokens=False)["input_ids"]
        last = made[-1][0] + made[-1][1] if made else None
        if last and prompt[: len(last)] == last:
            made[-1][1] = prompt[len(made[-1][0]) :] + response
        else:
            made.append([prompt, list(response)])
        messages += [
            {"role": "assistant", "content": thought + answer + ending},  # what goes is the template's matter
            {"role": "user", "content": f"{37 * turn}. " * 9},
        ]
    return made


def computed(made: list[list[list[int]]]) -> int:
    """Tokens that a row of these sequences has."""
    samples = [
        Sample(
            "episode", 0, Stream(array("i", prompt), array("i", rest), np.ones(len(rest), bool)),
            np.zeros(len(rest), np.float32), 1.0, {"policy": 1.0}, part=part,
        )
        for part, (prompt, rest) in enumerate(made)
    ]  # fmt: skip
    chains = prefixes_of(range(len(samples)), samples, Padding(shares=True), "student")
    prefixes = {key: end - (chain[i - 1][1] if i else 0) for chain in chains for i, (key, end) in enumerate(chain)}
    own = sum(len(p) + len(r) - (c[-1][1] if c else 0) for (p, r), c in zip(made, chains, strict=True))
    return own + sum(prefixes.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tokenizer", help="a folder with a tokenizer and its chat template")
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--thinking", type=int, default=60, help="tokens of a turn's thinking, about")
    options = parser.parse_args()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    cases = {
        "its template, thinking": (options.thinking, "", None),
        "its template, no thinking": (0, "", None),
        "a template that trims, answers end with a space": (0, " ", TRIMS),
    }
    for name, (thinking, ending, template) in cases.items():
        made = sequences(tokenizer, options.turns, thinking, ending, template)
        whole = [tuple(prompt + rest) for prompt, rest in made]
        tree = len({sequence[: end + 1] for sequence in whole for end in range(len(sequence))})
        print(
            f"{name}: {len(made)} sequences, {sum(map(len, whole))} tokens, {computed(made)} computed, any tree {tree}"
        )


if __name__ == "__main__":
    main()
