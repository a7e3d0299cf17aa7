"""Accuracy of a Hugging Face folder by plain transformers: a judge that shares no code with the trainer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

BATCH = 256


class Judge:
    """A model folder, loaded for sampling in fp32 on the CPU."""

    def __init__(self, folder: Path):
        logging.disable_progress_bar()
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def render(self, question: str) -> str:
        """The prompt as the trainer gives it to the engine: the folder's own chat template."""
        message = [{"role": "user", "content": question}]
        return self.tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[str], max_new_tokens: int, temperature: float, seed: int = 0
    ) -> list[str | None]:
        """One response a prompt; None where it did not end by itself. Temperature 0 is greedy."""
        torch.manual_seed(seed)
        how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
        responses: list[str | None] = []
        for start in range(0, len(prompts), BATCH):
            batch = self.tokenizer(list(prompts[start : start + BATCH]), return_tensors="pt", padding=True)
            batch.pop("token_type_ids", None)
            ids = self.model.generate(**batch, max_new_tokens=max_new_tokens, **({"do_sample": False} | how))
            responses += map(self._text, ids[:, batch["input_ids"].shape[1] :].tolist())
        return responses

    def _text(self, ids: list[int]) -> str | None:
        end = self.tokenizer.eos_token_id
        return self.tokenizer.decode(ids[: ids.index(end)]) if end in ids else None

    def accuracy(self, rows: Sequence[dict[str, str]], max_new_tokens: int, temperature: float, seed: int = 0) -> float:
        """Share of `rows` answered exactly, each asked once."""
        return self.accuracy_of_prompts(
            [self.render(row["prompt"]) for row in rows], rows, max_new_tokens, temperature, seed
        )

    def accuracy_of_prompts(
        self,
        prompts: Sequence[str],
        rows: Sequence[dict[str, str]],
        max_new_tokens: int,
        temperature: float,
        seed: int = 0,
    ) -> float:
        """The same for prompts that are rendered already, for example with a demonstration."""
        responses = self.sample(prompts, max_new_tokens, temperature, seed)
        return sum(response == row["answer"] for response, row in zip(responses, rows, strict=True)) / len(rows)
