"""Speculative decoding (rollout.speculative_tokens) against plain decoding, on the same requests, in turns.

    python -m benchmarks.speculation [--size 1M | 30M] [--drafts 2,4,8] [--prompts 16] [--samples 8] [--tokens 64]
                                     [--model DIR --data ROWS.jsonl]

Every number of drafts has an engine in a process of its own; one after the other they answer the same requests.
Without --model the model is random: at temperature 1 its answers are new text, at 0.05 they repeat themselves. With
--model the prompts are those of the rows, at temperature 1. Prompts are new in every round, or the same in every round
("again": the engine has seen other answers to them). CPU seconds are those of the engine's process, the least of all
rounds but the first. "Differ" counts responses with other tokens than without drafts, and log-probs beyond 1e-4 nats:
there is rounding, because a single row is multiplied in another way than several.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
Answer = tuple[Sequence[int], Sequence[float]]  # token ids and log-probs
SYNTHETIC = [("new text", 1.0, False), ("repetitive", 0.05, False), ("repetitive, again", 0.05, True)]
REAL = [("rows", 1.0, False), ("rows, again", 1.0, True)]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="1M", choices=("1M", "30M"))
    parser.add_argument("--model", type=Path, help="a folder with tokenizer; needs --data")
    parser.add_argument("--data", type=Path, help="rows with prompts, in the trainer's format")
    parser.add_argument("--drafts", default="2,4,8", help="tokens drafted at most, comma-separated")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=32, help="tokens of a random prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a response")
    parser.add_argument("--repeats", type=int, default=4)
    return parser.parse_args()


def answer_rounds(pipe: Connection, folder: str, drafts: int, max_model_len: int) -> None:
    """The process of one engine: a batch comes in, what it took goes out."""
    from megatron_srpo.config import RolloutConfig
    from megatron_srpo.rollout import ColocatedEngine, SamplingSettings, prepare_environment

    prepare_environment("cpu")
    rollout = RolloutConfig(cpu_kv_cache_gib=0.5, enforce_eager=True, speculative_tokens=drafts)
    engine = ColocatedEngine(hf_dir=folder, dtype="float32", max_model_len=max_model_len, seed=0, rollout=rollout)
    steps, vllm = 0, engine._llm.llm_engine
    step = vllm.step

    def counted() -> Any:
        nonlocal steps
        steps += 1
        return step()

    vllm.step = counted
    pipe.send("ready")
    while (batch := pipe.recv()) is not None:
        requests, temperature, tokens, ignore_eos = batch
        steps, used = 0, time.process_time()
        sampling = SamplingSettings(temperature=temperature, max_tokens=tokens, ignore_eos=ignore_eos)
        rollouts = engine.generate(requests, sampling)
        used = time.process_time() - used
        drafted, accepted = (sum(getattr(r, name) for r in rollouts) for name in ("drafted", "accepted"))
        pipe.send((used, steps, drafted, accepted, [(r.token_ids, r.logprobs) for r in rollouts]))
    engine.close()


def differs(ours: Answer, plain: Answer) -> bool:
    """Whether a response has other tokens, or log-probs that are not equal to rounding."""
    return ours[0] != plain[0] or max(abs(a - b) for a, b in zip(ours[1], plain[1], strict=True)) > 1e-4


def prompts_of(options: argparse.Namespace, folder: Path, round_: int) -> list[list[int]]:
    """The token ids of a round's prompts."""
    if options.data is None:
        import torch

        draw = torch.Generator().manual_seed(round_)
        return torch.randint(5, 60, (options.prompts, options.length), generator=draw).tolist()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [json.loads(line)["prompt"] for line in options.data.read_text().splitlines()]
    chosen = [rows[(round_ * options.prompts + i) % len(rows)] for i in range(options.prompts)]
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": row}], add_generation_prompt=True, tokenize=False)
        for row in chosen
    ]
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def make_requests(options: argparse.Namespace, folder: Path, prompts: int, seeds: int) -> list[Any]:
    """A batch with the prompts of one round and the seeds of another."""
    from megatron_srpo.rollout import GenerateRequest, request_seed

    ids = prompts_of(options, folder, prompts)
    return [
        GenerateRequest(p, s, ids[p], request_seed(0, seeds, str(p), s))
        for p in range(options.prompts) for s in range(options.samples)
    ]  # fmt: skip


def main() -> None:
    options = arguments()
    from benchmarks.weight_sync import make_model

    with tempfile.TemporaryDirectory() as scratch:
        folder = options.model or make_model(options.size, "float32", Path(scratch) / "model")
        if not options.model:
            from examples.tiny.tokenizer import character_tokenizer

            character_tokenizer("0123456789", "").save_pretrained(folder)
        spawn = multiprocessing.get_context("spawn")
        engines = {}
        longest = max(map(len, prompts_of(options, folder, 0))) + options.tokens + 16
        for drafts in [0, *map(int, options.drafts.split(","))]:
            pipe, theirs = spawn.Pipe()
            process = spawn.Process(target=answer_rounds, args=(theirs, str(folder), drafts, longest), daemon=True)
            process.start()
            engines[drafts] = pipe, process
            assert pipe.recv() == "ready"
        for number, (name, temperature, again) in enumerate(REAL if options.model else SYNTHETIC):
            taken: dict[int, list[Any]] = {drafts: [] for drafts in engines}
            for round_ in range(options.repeats + 1):
                first = 1000 * (number + 1)
                requests = make_requests(options, folder, first if again else first + round_, first + round_)
                for drafts, (pipe, _) in engines.items():
                    pipe.send((requests, temperature, options.tokens, not options.model))
                    taken[drafts].append(pipe.recv())
            plain = taken[0][1:]
            for drafts, rounds in taken.items():
                rounds = rounds[1:]
                seconds = min(used for used, *_ in rounds)
                drafted, accepted, steps, theirs = (
                    sum(r[i] for r in which) for i, which in ((2, rounds), (3, rounds), (1, rounds), (1, plain))
                )
                made = sum(len(ids) for r in rounds for ids, _ in r[4])
                pairs = (
                    pair
                    for ours, other in zip(rounds, plain, strict=True)
                    for pair in zip(ours[4], other[4], strict=True)
                )
                differ = sum(differs(ours, other) for ours, other in pairs)
                print(
                    f"RESULT {name}, {drafts} drafts: {seconds:.3f} CPU s, ÷ plain "
                    f"{seconds / min(used for used, *_ in plain):.2f}; steps ÷ plain {steps / theirs:.2f}; "
                    f"accepted {accepted} of {drafted} drafted, {made} tokens; {differ} differ",
                    flush=True,
                )
        for pipe, process in engines.values():
            pipe.send(None)
            process.join()


if __name__ == "__main__":
    main()
