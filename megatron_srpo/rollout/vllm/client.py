"""The routes of a vLLM server, and what counts as an answer of it."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_srpo.core.records import Rollout
from megatron_srpo.rollout.engine import GenerateRequest, SamplingSettings
from megatron_srpo.rollout.http import BadAnswer, HttpClient

MODEL_NAME = "policy"  # the name under which a server serves its model
NOT_FINITE = -9999.0  # what vLLM's server puts in place of a log-prob that JSON cannot carry
UNPUBLISHED = "default"  # vLLM's version of weights that came from a folder


class VllmClient(HttpClient):
    """HTTP to one vLLM server."""

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
            "model": MODEL_NAME,
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
        answer = await self.call("POST", "/inference/v1/generate", body=body, timeout=self._request_timeout)
        return read_answer(answer, request, sampling, decode)


def read_answer(
    answer: Mapping[str, Any], request: GenerateRequest, sampling: SamplingSettings, decode: Callable[[list[int]], str]
) -> Rollout | None:
    """The rollout in a server's JSON, or None for an aborted one. Raises BadAnswer when the JSON is anything else."""
    try:
        (choice,) = answer["choices"]
        ids, reason = choice["token_ids"], choice["finish_reason"]
        if reason == "abort":
            return None
        content = choice["logprobs"]["content"]
        if [entry["token_id"] for entry in content] != ids:
            raise ValueError("the log-probs are of other tokens")
        logprobs = [math.nan if entry["logprob"] <= NOT_FINITE else float(entry["logprob"]) for entry in content]
        versions = _versions(choice["weight_versions"], len(ids))
        if reason not in ("stop", "length") or not 0 < len(ids) <= request.longest(sampling):
            raise ValueError(f"{len(ids)} tokens, finish_reason {reason!r}")
        text = decode(ids)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, IndexError) as error:
        raise BadAnswer(f"not an answer to what was asked ({error}): {str(answer)[:200]}") from error
    return Rollout(
        request.prompt, request.sample, array("i", ids), array("f", logprobs), text, reason, min(versions),
        token_versions=versions,
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
