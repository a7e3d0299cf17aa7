"""Tokens per second of our engines against vLLM's own offline generate, on the same prompts, in turns.

    python -m benchmarks.rollout [--model DIR] [--prompts 32] [--samples 4] [--tokens 64] [--placement servers]

Colocated: the same engine answers both ways, so that nothing but our own code differs. Servers: one server against an
engine in this process; the two are never busy at the same time.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a folder with tokenizer; without it a random model of --size")
    parser.add_argument("--size", default="1M", choices=("1M", "30M"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--placement", default="colocated", choices=("colocated", "servers"))
    return parser.parse_args()


def offline(llm: Any, requests: Sequence[Any], tokens: int) -> None:
    """vLLM as its documentation has it, asked for what we ask for."""
    from vllm import SamplingParams

    parameters = [
        SamplingParams(temperature=1.0, max_tokens=tokens, ignore_eos=True, seed=request.seed, logprobs=0)
        for request in requests
    ]
    llm.generate([{"prompt_token_ids": r.token_ids} for r in requests], parameters, use_tqdm=False)


def in_turns(actions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each, after one round that is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in actions}
    for round_ in range(repeats + 1):
        for name, action in actions.items():
            started = time.perf_counter()
            action()
            if round_:
                taken[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in taken.items()}


def main() -> None:
    options = arguments()
    import torch

    from benchmarks.weight_sync import make_model
    from megatron_srpo.bridge import Verifier
    from megatron_srpo.bridge.weight_stream import Sender
    from megatron_srpo.config import RolloutConfig
    from megatron_srpo.rollout import (
        ColocatedEngine,
        GenerateRequest,
        SamplingSettings,
        prepare_environment,
        request_seed,
    )
    from megatron_srpo.rollout.vllm.servers import ServersEngine

    prepare_environment("cpu")
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.model or make_model(options.size, options.dtype, Path(scratch) / "model")
        if not options.model:
            from examples.tiny.tokenizer import character_tokenizer

            character_tokenizer("0123456789", "").save_pretrained(folder)
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(5, 60, (options.prompts, 32), generator=draw).tolist()
        requests = [
            GenerateRequest(p, s, ids[p], request_seed(0, 0, str(p), s))
            for p in range(options.prompts) for s in range(options.samples)
        ]  # fmt: skip
        sampling = SamplingSettings(max_tokens=options.tokens, ignore_eos=True)
        settings = {"cpu_kv_cache_gib": 0.5, "max_num_seqs": 256, "enforce_eager": True}
        common = {"hf_dir": str(folder), "dtype": options.dtype, "max_model_len": 64 + options.tokens, "seed": 0}
        engine = ColocatedEngine(**common, rollout=RolloutConfig(**settings))
        ours: Any = engine
        alone = SimpleNamespace(share=lambda make: make(), gather=lambda mine: [mine], rank=0, world_size=1)
        if options.placement == "servers":
            ours = ServersEngine(
                **common, tokenizer="", rollout=RolloutConfig(placement="servers", **settings), device="cpu",
                control=alone, verifier=Verifier(0), decode=str, say=print,
                make_sender=lambda host: Sender(host, timeout_s=60, backend="gloo", device=torch.device("cpu")),
                logs=Path(scratch) / "logs",
            )  # fmt: skip
        seconds = in_turns(
            {
                "ours": lambda: ours.generate(requests, sampling),
                "vllm": lambda: offline(engine._llm, requests, options.tokens),
            },
            options.repeats,
        )
        ours.close()
        engine.close()
    made = len(requests) * options.tokens
    print(f"RESULT {options.placement}: ours {made / seconds['ours']:.0f} tokens/s, vLLM offline "
          f"{made / seconds['vllm']:.0f} tokens/s, ratio {seconds['vllm'] / seconds['ours']:.3f}")  # fmt: skip


if __name__ == "__main__":
    main()
