"""A tiny Qwen3 in a Hugging Face folder, made half competent by a short supervised warm start.

Reinforcement learning needs a policy that is sometimes right, and self-distillation one that can use a solution that
it is shown. Both are taught here, with plain transformers and one AdamW, in about a minute on two cores.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import math
import os
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging

from examples.tiny.task import Example, Task, draw_question
from examples.tiny.tokenizer import character_tokenizer
from megatron_srpo.core.atomic import atomic_folder

PIECES = re.compile(r"<eos>|[\s\S]")
IGNORED = -100  # the label that cross_entropy skips


@dataclass(frozen=True)
class WarmStart:
    """The model's size and the recipe of its supervised training."""

    hidden_size: int
    layers: int
    heads: int
    key_value_heads: int
    ffn_size: int
    steps: int
    batch_size: int
    lr: float
    warmup_steps: int
    seed: int
    final_lr: float = 1.0  # the cosine schedule ends at this fraction of lr; 1 = constant
    beta2: float = 0.999
    initializer_range: float = 0.02
    max_positions: int = 256
    head_dim: int = 32  # the smallest that vLLM's CPU attention takes


def lr_factor(settings: WarmStart, step: int) -> float:
    """Linear warm-up times a cosine from 1 to `final_lr`; `step` counts from 0."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / settings.steps))
    return min(1.0, (step + 1) / settings.warmup_steps) * max(settings.final_lr, cosine)


def build_model(settings: WarmStart, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.ffn_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.key_value_heads,
        head_dim=settings.head_dim,
        max_position_embeddings=settings.max_positions,
        rope_theta=10000.0,
        initializer_range=settings.initializer_range,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        dtype="float32",
    )
    return Qwen3ForCausalLM(config)


def collate(examples: list[Example], tokenizer: PreTrainedTokenizerFast) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids [B, L] and labels [B, L] (IGNORED outside the targets), both int64.

    Causal attention never looks at padding to the right, so that no attention mask is needed.
    """
    encode = tokenizer.convert_tokens_to_ids
    sequences, labels = [], []
    for example in examples:
        # Within a prompt, the end-of-sequence token ends an earlier turn.
        prompt = encode(PIECES.findall(example.prompt))
        target = [*encode(list(example.target)), tokenizer.eos_token_id]
        sequences.append(prompt + target)
        label = list(target)
        if example.ignored is not None:
            label[example.ignored] = IGNORED
        labels.append([IGNORED] * len(prompt) + label)
    width = max(map(len, sequences))
    pad = tokenizer.pad_token_id
    ids = torch.tensor([sequence + [pad] * (width - len(sequence)) for sequence in sequences])
    return ids, torch.tensor([label + [IGNORED] * (width - len(label)) for label in labels])


def supervised_loss(model: Qwen3ForCausalLM, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the targets, nats a token. The head runs only where there is a target."""
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    targets = labels[:, 1:]
    scored = targets != IGNORED
    return F.cross_entropy(model.lm_head(hidden[scored]), targets[scored])


def train(task: Task, settings: WarmStart, report: Callable[[str], None]) -> tuple[Qwen3ForCausalLM, dict[str, float]]:
    """The warm start itself; needs `settings.seed` only, and reports a line every tenth of the way."""
    torch.manual_seed(settings.seed)
    rng = random.Random(settings.seed)
    tokenizer = character_tokenizer(task.characters, task.chat_template)
    model = build_model(settings, tokenizer).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=0.01, betas=(0.9, settings.beta2))
    start = time.monotonic()
    for step in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * lr_factor(settings, step)
        progress = step / settings.steps
        batch = [
            task.warm_start_example(rng, draw_question(task, rng, held_out=False), progress)
            for _ in range(settings.batch_size)
        ]
        loss = supervised_loss(model, *collate(batch, tokenizer))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % max(1, settings.steps // 10) == 0:
            report(f"warm start {step + 1}/{settings.steps}  loss {loss.item():.3f}  {time.monotonic() - start:.0f} s")
    facts = {"loss": loss.item(), "seconds": time.monotonic() - start, "parameters": model.num_parameters()}
    return model.eval(), facts


def cache_key(task: Task, settings: WarmStart) -> str:
    """Changes with the settings, the task's parameters, and the source of task and warm start."""
    parts = [json.dumps(dataclasses.asdict(settings), sort_keys=True), repr(task), inspect.getsource(type(task))]
    parts.append(Path(__file__).read_text())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def warm_started_model(task: Task, settings: WarmStart, cache: Path, report: Callable[[str], None] = print) -> Path:
    """The Hugging Face folder of the warm-started model: from `cache`, or made now. Complete or absent."""
    folder = cache / f"{task.name}-{cache_key(task, settings)}"
    if (folder / "warm_start.json").exists():
        return folder
    threads = torch.get_num_threads()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, min(4, len(os.sched_getaffinity(0)))))  # more slow so small a model down
    try:
        model, facts = train(task, settings, report)
    finally:
        torch.set_num_threads(threads)
    logging.disable_progress_bar()
    with atomic_folder(folder) as aside:
        model.save_pretrained(aside)
        character_tokenizer(task.characters, task.chat_template).save_pretrained(aside)
        (aside / "warm_start.json").write_text(json.dumps({**dataclasses.asdict(settings), **facts}, indent=2) + "\n")
    return folder
