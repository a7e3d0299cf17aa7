"""Our engines against vLLM's own offline generate, on the same prompts, in turns.

    python -m benchmarks.rollout [--model DIR] [--prompts 32] [--samples 4] [--length 32] [--tokens 64]
                                 [--placement servers]

"vllm" is what a user of vLLM who needs no reproducible samples would run: no seeds, no log-probs, no text. "seeded"
adds what we ask for, seeds and log-probs, with vLLM's own sampler. Colocated: the same engine answers all, so that
nothing but our own code differs. Servers: one server against an engine in this process; the two are never busy at the
same time. CPU seconds, the least of all rounds, are those of this process and of the servers.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil

os.environ.setdefault("OMP_NUM_THREADS", "1")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a folder with tokenizer; without it a random model of --size")
    parser.add_argument("--size", default="1M", choices=("1M", "30M"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--length", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--placement", default="colocated", choices=("colocated", "servers"))
    return parser.parse_args()


def offline(llm: Any, requests: Sequence[Any], tokens: int, *, seeded: bool) -> None:
    """vLLM as its documentation has it, bare or asked for what we ask for."""
    from vllm import SamplingParams

    parameters = [
        SamplingParams(
            temperature=1.0, max_tokens=tokens, ignore_eos=True, detokenize=False,
            seed=request.seed if seeded else None, logprobs=0 if seeded else None, flat_logprobs=seeded,
        )
        for request in requests
    ]  # fmt: skip
    llm.reset_prefix_cache()  # as ours, so that no round finds the prompts of the one before
    llm.generate([{"prompt_token_ids": r.token_ids} for r in requests], parameters, use_tqdm=False)


@contextmanager
def vllms_own_sampler(llm: Any) -> Iterator[None]:
    """The engine samples as vLLM does, with a generator per request."""
    from vllm.v1.sample.sampler import Sampler

    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    ours, runner.sampler = runner.sampler, Sampler("processed_logprobs")
    try:
        yield
    finally:
        runner.sampler = ours


def cpu_seconds() -> float:
    """Of this process and its running children."""
    me = psutil.Process()
    times = [process.cpu_times() for process in (me, *me.children(recursive=True))]
    return sum(one.user + one.system for one in times)


def in_turns(actions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, tuple[float, float]]:
    """(median seconds of the clock, least CPU seconds) of each, after one round that is not counted."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in actions}
    for round_ in range(repeats + 1):
        for name, action in actions.items():
            started, used = time.perf_counter(), cpu_seconds()
            action()
            if round_:
                taken[name].append((time.perf_counter() - started, cpu_seconds() - used))
    return {
        name: (statistics.median(wall for wall, _ in values), min(cpu for _, cpu in values))
        for name, values in taken.items()
    }


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
        ids = torch.randint(5, 60, (options.prompts, options.length), generator=draw).tolist()
        requests = [
            GenerateRequest(p, s, ids[p], request_seed(0, 0, str(p), s))
            for p in range(options.prompts) for s in range(options.samples)
        ]  # fmt: skip
        sampling = SamplingSettings(max_tokens=options.tokens, ignore_eos=True)
        settings = {"cpu_kv_cache_gib": 0.5, "max_num_seqs": 256, "enforce_eager": True}
        common = {
            "hf_dir": str(folder),
            "dtype": options.dtype,
            "max_model_len": options.length + options.tokens + 32,
            "seed": 0,
        }
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

        def seeded() -> None:
            with vllms_own_sampler(engine._llm):
                offline(engine._llm, requests, options.tokens, seeded=True)

        seconds = in_turns(
            {
                "ours": lambda: ours.generate(requests, sampling),
                "vllm": lambda: offline(engine._llm, requests, options.tokens, seeded=False),
                "seeded": seeded,
            },
            options.repeats,
        )
        ours.close()
        engine.close()
    made = len(requests) * options.tokens
    for name, (wall, used) in seconds.items():
        print(f"{options.placement} {name}: {made / wall:.0f} tokens/s, {used:.3f} CPU s")
    print(f"RESULT {options.placement}, CPU s: vllm ÷ ours {seconds['vllm'][1] / seconds['ours'][1]:.3f}, "
          f"seeded ÷ ours {seconds['seeded'][1] / seconds['ours'][1]:.3f}")  # fmt: skip


if __name__ == "__main__":
    main()
