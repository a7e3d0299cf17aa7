"""The routes of a vLLM server, and what counts as an answer of it."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from megatron_srpo.core.records import Rollout
from megatron_srpo.families import ModelShape
from megatron_srpo.rollout.engine import GenerateRequest, SamplingSettings
from megatron_srpo.rollout.http import BadAnswer, HttpClient, UnacceptableRequest
from megatron_srpo.rollout.vllm.answers import ROUTE, unpack_answer
from megatron_srpo.rollout.vllm.expert_records import decode_rows, expert_record

MODEL_NAME = "policy"  # the name under which a server serves its model
READ_HERE_BYTES = 2**14  # longer answers are read and decoded in threads, so that requests and other answers go on
NOT_FINITE = -9999.0  # what vLLM's server puts in place of a log-prob that JSON cannot carry
UNPUBLISHED = "default"  # vLLM's version of weights that came from a folder
NO_EXPERTS = (
    "the rollout server does not return the experts of tokens, which rollout.routing_replay needs. Start it with "
    'this run\'s configuration (python -m megatron_srpo serve), or set rollout.routing_replay = "old" or "off"'
)


class VllmClient(HttpClient):
    """HTTP to one vLLM server. `shape` is its model's; requests for the experts of tokens need it. `model` names what
    answers: the server's model, or its published adapters."""

    def __init__(
        self, url: str, token: str, *, request_timeout_s: float, control_timeout_s: float,
        shape: ModelShape | None = None, model: str = MODEL_NAME,
    ) -> None:  # fmt: skip
        super().__init__(url, token, request_timeout_s=request_timeout_s, control_timeout_s=control_timeout_s)
        self._shape, self._model = shape, model

    async def health(self, timeout: float) -> None:
        await self.call("GET", "/health", timeout=timeout)

    async def world_size(self, timeout: float) -> int:
        """The number of the engine's workers. It is the first call to a server, and shows that it is one."""
        found = await self.call("GET", "/get_world_size", timeout=timeout)
        if not isinstance(found, dict) or not isinstance(found.get("world_size"), int):
            raise BadAnswer(f"/get_world_size: expected a number, got {str(found)[:80]}")
        return found["world_size"]

    async def weight_version(self) -> int | None:
        """0 for the folder's weights, None for those of an earlier publish: they may be another run's."""
        found = await self.call("GET", "/weight_info")
        return 0 if isinstance(found, dict) and found.get("weight_version") == UNPUBLISHED else None

    async def generate(
        self, request: GenerateRequest, sampling: SamplingSettings, salt: str, decode: Callable[[list[int]], str]
    ) -> Rollout | None:
        """One response, or None when the server aborted it."""
        body = {
            "model": self._model,
            "token_ids": request.token_ids,
            "cache_salt": salt,
            "sampling_params": {
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k,
                "max_tokens": request.longest(sampling),
                "ignore_eos": sampling.ignore_eos,
                "seed": request.seed,
                "logprobs": 0,
                "detokenize": False,
            },
        }
        data = await self.fetch("POST", ROUTE, body=body, timeout=self._request_timeout)
        given = (data, request, sampling, decode, self._shape)
        return read_answer(*given) if len(data) < READ_HERE_BYTES else await asyncio.to_thread(read_answer, *given)


def read_answer(
    data: bytes, request: GenerateRequest, sampling: SamplingSettings, decode: Callable[[list[int]], str],
    shape: ModelShape | None = None,
) -> Rollout | None:  # fmt: skip
    """The rollout in a server's answer, or None for an aborted one. Raises BadAnswer when it is anything else, and
    UnacceptableRequest when the server does not return experts at all: none of its answers would have them."""
    try:
        header, ids, logprobs = unpack_answer(data)
        reason = header["finish_reason"]
        if reason == "abort":
            return None
        versions = _versions(header["weight_versions"], len(ids))
        if reason not in ("stop", "length") or not 0 < len(ids) <= request.longest(sampling):
            raise ValueError(f"{len(ids)} tokens, finish_reason {reason!r}")
        found = np.frombuffer(logprobs, dtype=np.float32)
        if found.min() <= NOT_FINITE:
            logprobs = array("f", np.where(found <= NOT_FINITE, np.nan, found).astype(np.float32).tobytes())
        drafted, accepted = int(header.get("drafted", 0)), int(header.get("accepted", 0))
        text, experts = decode(ids.tolist()), None
        if sampling.experts:
            assert shape is not None, "the experts of tokens need the model's shape"
            rows = decode_rows(header.get("routed_experts"))
            if rows is None:
                raise UnacceptableRequest(NO_EXPERTS)
            experts = expert_record(rows, len(request.token_ids) + len(ids), shape)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, IndexError) as error:
        raise BadAnswer(f"not an answer to what was asked ({error}): {data[:200]!r}") from error
    several = versions if len(set(versions)) > 1 else None
    return Rollout(
        request.prompt, request.sample, ids, logprobs, text, reason, min(versions), token_versions=several,
        experts=experts, drafted=drafted, accepted=accepted,
    )  # fmt: skip


def _versions(spans: Sequence[Mapping[str, Any]], tokens: int) -> list[int]:
    """The weight version of each token."""
    versions: list[int] = []
    for span in spans:
        label = span["version"]
        if span["start"] != len(versions):
            raise ValueError("weight versions with a gap")
        versions += [0 if label == UNPUBLISHED else int(label)] * (span["end"] - span["start"])
    if len(versions) != tokens:
        raise ValueError(f"weight versions of {len(versions)} of {tokens} tokens")
    return versions
