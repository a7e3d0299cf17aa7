"""vLLM engines inside the training ranks."""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist

from megatron_srpo.bridge import Verifier
from megatron_srpo.bridge.verify import Report
from megatron_srpo.config import LoraConfig, RolloutConfig
from megatron_srpo.core.records import Rollout
from megatron_srpo.core.text import clause
from megatron_srpo.rollout.balance import split_requests
from megatron_srpo.rollout.engine import (
    Feed,
    GenerateRequest,
    OnRollout,
    RolloutError,
    SamplingSettings,
    check_lengths,
    decode_inside,
)
from megatron_srpo.rollout.vllm.adapter_loader import adapter_request
from megatron_srpo.rollout.vllm.environment import shared_memory_name, unlink_blocks
from megatron_srpo.rollout.vllm.expert_records import expert_record
from megatron_srpo.rollout.vllm.process_state import preserved_generators
from megatron_srpo.rollout.vllm.settings import EngineSettings, check_model, model_shape
from megatron_srpo.rollout.vllm.start import start_engine, stop_engine

if TYPE_CHECKING:
    from vllm import LLM, CompletionOutput, RequestOutput
    from vllm.v1.engine import EngineCoreRequest

    from megatron_srpo.rollout.vllm.counter_sampler import LogprobRecord

T = TypeVar("T")
SLEEPERS = ("weights", "kv_cache")  # vLLM's tags of the memory that it gives back while it sleeps


class ColocatedEngine:
    """A RolloutEngine on the training ranks: rollout.tensor_parallel_size consecutive ranks are one engine.

    Making one is collective. Without a torch.distributed world it is a single engine in this process. `control_group`
    is a gloo group over all ranks, which carries token ids, log-probs and text. `device` is "cpu" or "cuda".
    `tokenizer` is the tokenizer's folder if it is not `hf_dir`. `adapters`: what publishes bring, if not whole models;
    publish before the first generation then. Call prepare_environment first.
    """

    def __init__(
        self, *, hf_dir: str, dtype: str, rollout: RolloutConfig, max_model_len: int, seed: int,
        control_group: dist.ProcessGroup | None = None, device: str = "cpu", tokenizer: str = "",
        verifier: Verifier | None = None, adapters: LoraConfig | None = None,
    ) -> None:  # fmt: skip
        self._control, self._device, self._max_model_len = control_group, device, max_model_len
        in_world = dist.is_initialized()
        self._rank, self._world = (dist.get_rank(), dist.get_world_size()) if in_world else (0, 1)
        if in_world and "RANK" not in os.environ:
            raise RolloutError(
                "torch.distributed runs, but RANK is not set: the ranks must be torchrun's (or set its variables). Is "
                "another engine open in this process? Close it first."
            )
        self._size = size = rollout.tensor_parallel_size
        if self._world % size:
            raise RolloutError(
                f"rollout.tensor_parallel_size = {size} does not divide the {self._world} rank(s): every engine is a "
                "group of that many. Choose a divisor, or start another number of processes."
            )
        check_model(str(hf_dir), rollout, max_model_len, device, adapters)
        self._engines, self._engine, self._is_leader = self._world // size, self._rank // size, self._rank % size == 0
        name = shared_memory_name(self._on_all_ranks(os.getpid())[self._engine * size])
        settings = EngineSettings(
            str(hf_dir), str(tokenizer or hf_dir), dtype, rollout, max_model_len, seed, device, name, adapters
        )
        self._shape = model_shape(str(hf_dir))
        self._engine_llm: LLM | None = start_engine(settings)
        if size > 1:
            unlink_blocks(name)
        _spare_work_on_requests(self._llm)
        self._record: LogprobRecord | None = None  # where the sampler keeps log-probs, if it is ours
        if device == "cpu":
            (self._record,) = self._llm.collective_rpc("record_logprobs")
        decode = partial(self._llm.get_tokenizer().decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        self._decode = partial(decode_inside, self._shape.vocab, decode)
        self._asleep: set[str] = set()  # of SLEEPERS
        self._half_published = False
        self._added = 0  # requests so far
        self._mine: set[tuple[int, int]] = set()  # prompt and sample of the last requests of this rank's engine
        self._cache_is_empty = False
        self._dropped = False  # whether the engine sleeps without its weights
        self._verifier = verifier or Verifier(0)
        self._adapters, self._adapter = adapters, adapter_request() if adapters is not None else None
        self.weight_version = 0

    def _on_all_ranks(self, mine: T) -> list[T]:
        """What every rank brings, by rank."""
        found = [mine] * self._world
        if self._world > 1:
            dist.all_gather_object(found, mine, group=self._control)
        return found

    def generate(
        self, requests: Sequence[GenerateRequest], sampling: SamplingSettings,
        on_rollout: OnRollout | None = None,
    ) -> list[Rollout]:  # fmt: skip
        """See RolloutEngine. Raises RolloutError for a prompt that leaves no room for `max_tokens`."""
        mine = self._begin(requests, sampling)
        try:
            answers, error = self._run(mine, sampling, on_rollout if self._is_leader else None), None
        except Exception as failure:
            if self._size > 1:  # this engine's other ranks wait inside vLLM and never reach the gather: end the job
                raise
            answers, error = [], failure  # the other ranks wait in the gather and must learn of the error there
        found = self._gather(answers if self._is_leader else [], error)
        return sorted(found, key=lambda rollout: (rollout.prompt, rollout.sample))

    def _begin(self, requests: Sequence[GenerateRequest], sampling: SamplingSettings) -> list[GenerateRequest]:
        """This engine's share of the requests, once it can generate."""
        if self._half_published:
            raise RuntimeError("the last publish failed: some layers are new, some are old. Publish again first.")
        if self._dropped:
            raise RuntimeError("the engine has dropped its weights, because a publish was to come next. Publish first.")
        check_lengths(requests, sampling, self._max_model_len)
        self._wake(*SLEEPERS)
        if sampling.goes_on:  # an engine has the keys and values of its own requests
            return [request for request in requests if (request.prompt, request.sample) in self._mine]
        mine = split_requests(requests, self._engines, sampling.max_tokens)[self._engine]
        self._mine = {(request.prompt, request.sample) for request in mine}
        return mine

    def _run(
        self, requests: list[GenerateRequest], sampling: SamplingSettings, on_rollout: OnRollout | None
    ) -> list[Rollout]:
        """The answers of this rank's engine, in the order in which they are complete."""
        if not requests:
            return []
        if not sampling.goes_on:
            self._forget()
        answers: list[Rollout] = []
        asked: dict[str, GenerateRequest] = {}
        with preserved_generators(self._device):
            self._add(requests, sampling, asked)
            while self._llm.llm_engine.has_unfinished_requests():
                for rollout in self._step(asked, sampling):
                    answers.append(rollout)
                    if on_rollout is not None:
                        on_rollout(rollout)
        assert not asked, f"vLLM left {len(asked)} requests without an answer"
        return answers

    def converse(
        self, requests: Sequence[GenerateRequest], sampling: SamplingSettings,
        begin: Callable[[list[GenerateRequest]], Feed],
    ) -> None:  # fmt: skip
        """See RolloutEngine. The first rank of each engine has its feed, and tells the others what to add."""
        mine = self._begin(requests, sampling)
        self._forget()
        feed = begin(mine) if self._is_leader else None
        asked: dict[str, GenerateRequest] = {}
        with preserved_generators(self._device):
            while True:
                busy = self._llm.llm_engine.has_unfinished_requests()
                found = self._from_leader(feed, wait=not busy)
                if found is None and not busy:
                    break
                if found:
                    check_lengths(found, sampling, self._max_model_len)
                    self._add(found, sampling, asked)
                for rollout in self._step(asked, sampling):
                    if feed is not None:
                        feed.answer(rollout)
        assert not asked, f"vLLM left {len(asked)} requests without an answer"

    def _from_leader(self, feed: Feed | None, *, wait: bool) -> list[GenerateRequest] | None:
        """What the feed has, which the engine's first rank alone sees, on all its ranks. All raise what it raises."""
        found: list[GenerateRequest] | Exception | None = None
        if feed is not None:
            try:
                found = feed.ready(wait=wait)
            except Exception as error:
                found = error
        if self._size > 1:
            from vllm.distributed import get_tp_group

            found = get_tp_group().broadcast_object(found, src=0)
        if isinstance(found, Exception):
            raise found
        return found

    def _add(
        self, requests: Sequence[GenerateRequest], sampling: SamplingSettings, asked: dict[str, GenerateRequest]
    ) -> None:
        """Give requests to vLLM; `asked` has those that it works on, by vLLM's name."""
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        for request in requests:
            # Of this request alone, so vLLM need not copy them deeply, which is half of its work on a request.
            parameters = SamplingParams(
                temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k,
                max_tokens=request.longest(sampling), ignore_eos=sampling.ignore_eos, seed=request.seed,
                logprobs=None if self._record else 0, flat_logprobs=True, detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY, skip_clone=True,
            )  # fmt: skip
            self._added += 1
            asked[str(self._added)] = request
            tokens = [*request.token_ids, *request.begun] if request.begun else request.token_ids
            self._llm.llm_engine.add_request(
                str(self._added), tokens_input(tokens), parameters, lora_request=self._adapter
            )

    def _step(self, asked: dict[str, GenerateRequest], sampling: SamplingSettings) -> list[Rollout]:
        """The responses that one step of vLLM completes."""
        return [self._rollout(asked.pop(output.request_id), output, sampling) for output in self._llm.llm_engine.step()]

    def _rollout(self, request: GenerateRequest, output: RequestOutput, sampling: SamplingSettings) -> Rollout:
        (answer,) = output.outputs
        ids, logprobs = list(answer.token_ids), self._logprobs(output, answer)
        if len(ids) != len(logprobs) or answer.finish_reason not in ("stop", "length"):
            raise RuntimeError(
                f"vLLM returned {len(ids)} tokens, {len(logprobs)} log-probs and finish_reason "
                f"{answer.finish_reason!r} for prompt {request.prompt}, sample {request.sample}"
            )
        part = request.cut and answer.finish_reason == "length"
        try:
            text = decode_inside(self._shape.vocab, lambda _: "", ids) if part else self._decode([*request.begun, *ids])
        except ValueError as error:
            raise RolloutError(
                f"vLLM's answer to prompt {request.prompt}, sample {request.sample} cannot be used: {clause(error)}. "
                "The engine's weights or its sampler are damaged; start the run again."
            ) from error
        drafted, accepted = _draft_counts(answer)
        return Rollout(
            request.prompt, request.sample, array("i", ids), array("f", logprobs), text,
            "part" if part else answer.finish_reason, self.weight_version, drafted=drafted, accepted=accepted,
            experts=expert_record(answer.routed_experts, request.length + len(ids), self._shape)
            if sampling.experts else None,
        )  # fmt: skip

    def _logprobs(self, output: RequestOutput, answer: CompletionOutput) -> list[float]:
        """Of the answer's tokens."""
        if self._record is None:
            return list(answer.logprobs.logprobs)
        return self._record.take(output.request_id, len(output.prompt_token_ids), len(answer.token_ids)).tolist()

    def _gather(self, answers: list[Rollout], error: Exception | None) -> list[Rollout]:
        """All answers on rank 0, [] elsewhere. A failure of any rank is raised on that rank and on rank 0."""
        mine = answers, repr(error) if error else None
        parts: list[tuple[list[Rollout], str | None]] | None = [mine]
        if self._world > 1:
            parts = [mine] * self._world if self._rank == 0 else None
            dist.gather_object(mine, parts, dst=0, group=self._control)
        if error is not None:
            raise error
        if parts is None:
            return []
        failed = [f"rank {rank}: {why}" for rank, (_, why) in enumerate(parts) if why]
        if failed:
            raise RuntimeError(f"generation failed on {'; '.join(failed)}")
        return [answer for answers, _ in parts for answer in answers]

    def publish(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """See RolloutEngine. The worker takes the tensors one by one, and copies them only into its own weights.

        Raises BridgeError when the tensors are not those of the engine's model. After a failure the engine refuses to
        generate until a whole publish has succeeded.
        """
        self._half_published = True
        self._wake("weights")
        verify = self._verifier.begin()
        items = self._verifier.record(weights) if verify else iter(weights)
        reports = self._llm.collective_rpc("publish_weights", args=(items, verify, self._adapters))
        if verify:
            self._compare(reports[0])
        self._reset_cache()
        self.weight_version, self._half_published, self._dropped = version, False, False

    def _compare(self, report: Report) -> None:
        """Every rank compares all engines, so that all ranks raise the same error."""
        reports = self._on_all_ranks(report)
        for engine in range(self._engines):
            mine = reports[engine * self._size : (engine + 1) * self._size]
            self._verifier.compare(f"engine {engine}", mine)

    def _forget(self) -> None:
        """Cache entries of an earlier call would change roundings, and a resumed run has no earlier call."""
        if not self._cache_is_empty:  # a publish has just reset it
            self._reset_cache()
        self._cache_is_empty = False

    def _reset_cache(self) -> None:
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM's prefix cache is in use and cannot be reset: requests are still running")
        self._cache_is_empty = True

    @property
    def draws_one_by_one(self) -> bool:
        """Whether vLLM asks a random generator per request. On a CPU our sampler does not, nor does V2 on a GPU."""
        return self._device == "cuda" and not self._llm.llm_engine.vllm_config.use_v2_model_runner

    def metrics(self) -> dict[str, float]:
        return {}

    def sleep(self, *, publish_next: bool = False) -> None:
        """See RolloutEngine. The cache is dropped, and the weights move to the host (vLLM's level 1) or are dropped as
        well (level 2), which saves two copies of them and the host's memory. On a CPU nothing happens."""
        if self._device == "cuda" and not self._asleep:
            drop = publish_next and self._adapters is None  # a publish of adapters does not bring the base weights
            self._llm.sleep(level=2 if drop else 1)
            self._asleep, self._dropped = set(SLEEPERS), drop

    def _wake(self, *parts: str) -> None:
        """Give these parts their memory back, if they sleep."""
        sleeping = [part for part in parts if part in self._asleep]
        if sleeping:
            self._llm.wake_up(tags=sleeping)
            self._asleep -= set(sleeping)

    @property
    def _llm(self) -> LLM:
        assert self._engine_llm is not None, "the engine is closed"
        return self._engine_llm

    def close(self) -> None:
        """Collective, like the constructor. The trainer's own process groups stay."""
        if self._engine_llm is not None:
            llm, self._engine_llm = self._engine_llm, None
            stop_engine(llm)


def _spare_work_on_requests(llm: LLM) -> None:
    """Leave out a fifth of vLLM's work on a request: it looks the end of text up in the tokenizer, and adds a random
    number to the request's name. Ours are unique."""
    processor = llm.llm_engine.input_processor
    end = processor.renderer.get_eos_token_id()
    processor.renderer.get_eos_token_id = lambda: end

    def keep_name(request: EngineCoreRequest) -> None:
        request.external_req_id = request.request_id

    processor.assign_request_id = keep_name


def _draft_counts(answer: CompletionOutput) -> tuple[int, int]:
    """How many tokens were drafted for a response, and how many of them are part of it."""
    counts = answer.spec_decode_metrics
    if counts is None:
        return 0, 0
    return counts.num_draft_tokens, sum(accepted * steps for accepted, steps in enumerate(counts.histogram))
