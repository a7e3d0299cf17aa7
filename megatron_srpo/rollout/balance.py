"""Splits requests among engines."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_srpo.rollout.engine import GenerateRequest


def split_requests(requests: Sequence[GenerateRequest], engines: int, max_tokens: int) -> list[list[GenerateRequest]]:
    """One list of requests for each engine, with about equal numbers of prompt plus response tokens.

    Requests are split in (prompt, sample) order, so that the samples of a prompt mostly share an engine and its prefix
    cache. The length of a response is not known beforehand, so it counts as `max_tokens`. The result depends on the
    arguments only: every rank computes the same.
    """
    ordered = sorted(requests, key=lambda request: (request.prompt, request.sample))
    costs = [request.length + max_tokens for request in ordered]
    share = sum(costs) / engines
    shares: list[list[GenerateRequest]] = [[] for _ in range(engines)]
    done = 0
    for request, cost in zip(ordered, costs, strict=True):
        middle = done + cost / 2  # the engine in whose share the request's middle lies
        shares[min(engines - 1, int(middle / share))].append(request)
        done += cost
    return shares
