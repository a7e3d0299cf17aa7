"""Real vLLM engines on tiny models, what they are asked, and what transformers makes of their answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_srpo.bridge import Verifier
from megatron_srpo.bridge.verify import bits
from megatron_srpo.bridge.weight_stream import Sender
from megatron_srpo.config import LoraConfig, RolloutConfig
from megatron_srpo.core.records import Rollout
from megatron_srpo.rollout import ColocatedEngine, GenerateRequest, SamplingSettings, prepare_environment, request_seed
from megatron_srpo.rollout.vllm.servers import ServersEngine

VOCAB = 21  # so small that some responses end by themselves; odd, and not a multiple of what vLLM pads to
EOS = 1
MAX_TOKENS = 12
GREEDY = SamplingSettings(temperature=0.0, max_tokens=MAX_TOKENS)
SAMPLED = SamplingSettings(temperature=1.0, max_tokens=MAX_TOKENS)
LONG = [3 + (7 * i * i + i) % 17 for i in range(140)]  # longer than blocks of the prefix cache, 32 tokens on a CPU
PROMPTS = ([5, 9, 3, 3, 12], [17], [4, 8, 15, 16, 2, 3, 4, 20, 6, 7], [11, 5, 5])


@contextmanager
def tiny_engine(
    folder: str | Path, dtype: str = "float32", *, tensor_parallel_size: int = 1, max_model_len: int = 160,
    cpu_kv_cache_gib: float = 0.02, max_num_seqs: int = 64, max_num_batched_tokens: int = 0,
    adapters: LoraConfig | None = None, speculative_tokens: int = 0,
) -> Iterator[ColocatedEngine]:  # fmt: skip
    """A started engine, closed at the end."""
    prepare_environment("cpu")
    rollout = RolloutConfig(
        tensor_parallel_size=tensor_parallel_size,
        cpu_kv_cache_gib=cpu_kv_cache_gib,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        speculative_tokens=speculative_tokens,
        enforce_eager=True,
    )
    engine = ColocatedEngine(
        hf_dir=str(folder), dtype=dtype, rollout=rollout, max_model_len=max_model_len, seed=0, verifier=Verifier(1),
        adapters=adapters,
    )  # fmt: skip
    try:
        yield engine
    finally:
        engine.close()


class BitFlip(Verifier):
    """A verifier behind whose back one bit of one tensor changes, as bad memory or a bad wire would do it."""

    def __init__(self, name: str) -> None:
        super().__init__(1)
        self._name = name

    def record(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in super().record(weights):
            if name == self._name:
                tensor = tensor.clone()
                bits(tensor)[7] ^= 1
            yield name, tensor


class Alone:
    """The control channel of a run with one rank."""

    is_driver, rank, world_size = True, 0, 1

    def share(self, compute: Callable[[], Any]) -> Any:
        return compute()

    def gather(self, mine: Any) -> list[Any]:
        return [mine]


@contextmanager
def tiny_servers(
    folder: str | Path, logs: Path, dtype: str = "float32", *, control: Any = None, max_model_len: int = 160,
    said: list[str] | None = None, adapters: LoraConfig | None = None, **settings: Any,
) -> Iterator[ServersEngine]:  # fmt: skip
    """Started servers, ended at the end; `settings` are of the rollout section."""
    prepare_environment("cpu")
    rollout = RolloutConfig(
        placement="servers", cpu_kv_cache_gib=0.02, max_num_seqs=64, enforce_eager=True, **settings
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def make_sender(host: str) -> Sender:
        return Sender(host, timeout_s=rollout.server_timeout_seconds, backend="gloo", device=torch.device("cpu"))

    engine = ServersEngine(
        hf_dir=str(folder), tokenizer="", dtype=dtype, rollout=rollout, max_model_len=max_model_len, seed=0,
        device="cpu", control=control or Alone(), make_sender=make_sender, verifier=Verifier(1), logs=logs,
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False),
        say=[].append if said is None else said.append, adapters=adapters, folder_is_first=adapters is None,
    )  # fmt: skip
    try:
        engine._fleet.run(engine._fleet.wait_until_up())
        yield engine
    finally:
        engine.close()


def tiny_requests(samples: int = 4, *, run_seed: int = 0, iteration: int = 1) -> list[GenerateRequest]:
    """`samples` requests for every prompt in PROMPTS, in order."""
    return [
        GenerateRequest(prompt, sample, ids, request_seed(run_seed, iteration, f"prompt-{prompt}", sample))
        for prompt, ids in enumerate(PROMPTS)
        for sample in range(samples)
    ]


def answers(engine: ColocatedEngine) -> dict[str, Any]:
    """Greedy and sampled tokens and log-probs, to be compared bit for bit with another engine's."""
    greedy = engine.generate(tiny_requests(1), GREEDY)
    sampled = engine.generate(tiny_requests(), SAMPLED)
    return {
        name: [(rollout.token_ids, rollout.logprobs, rollout.finish_reason) for rollout in rollouts]
        for name, rollouts in (("greedy", greedy), ("sampled", sampled))
    }


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    """What a trainer whose weights are the folder's would publish."""
    return load_file(Path(folder) / "model.safetensors")


@torch.no_grad()
def largest_error(
    folder: str | Path, rollouts: Sequence[Rollout], temperature: float = 1.0, prompts: Sequence[list[int]] = PROMPTS
) -> float:
    """Largest |engine's − transformers'| log-prob over all tokens; the model runs in fp32, one response at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    largest = 0.0
    for rollout in rollouts:
        prompt = prompts[rollout.prompt]
        ids = torch.tensor([[*prompt, *rollout.token_ids]])
        logprobs = torch.log_softmax(model(ids).logits[0, len(prompt) - 1 : -1] / temperature, dim=-1)
        expected = logprobs.gather(1, ids[0, len(prompt) :, None])[:, 0]
        largest = max(largest, (torch.tensor(rollout.logprobs) - expected).abs().max().item())
    return largest
