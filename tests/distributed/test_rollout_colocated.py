"""Engines inside two training ranks: one a rank, or one over both; published to from a tensor-parallel trainer."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_srpo.bridge import Exporter, load_hf_weights, read_config
from megatron_srpo.core.records import Rollout
from megatron_srpo.rollout.vllm.environment import SHARED_MEMORY, shared_memory_name
from tests.distributed_harness import run_distributed
from tests.tiny_engines import SAMPLED, VOCAB, largest_error, tiny_engine, tiny_requests
from tests.tiny_models import make_tiny_model
from tests.tiny_shards import empty_shards

RANKS = 2


def _export(folder: str) -> Exporter:
    """Of a trainer with the folder's weights, split over all ranks, its vocabulary padded."""
    place = {"tp_rank": dist.get_rank(), "tp_size": RANKS, "tp_group": dist.group.WORLD}
    shards = empty_shards(read_config(folder), **place, pad_to=16)
    load_hf_weights(shards, folder)
    return Exporter(shards, read_config(folder), bucket_bytes=20_000)


def _error(function: Any, *arguments: Any) -> str:
    """What the call raises, as text."""
    try:
        function(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def _refused(engine: Any, exporter: Exporter) -> dict[str, str]:
    """What this rank hears of a publish with a wrong tensor, and of generating after it; then a good publish."""
    items = ((name, tensor[1:] if "norm" in name else tensor) for name, tensor in list(exporter.items()))
    heard = {"publish": _error(engine.publish, items, 3), "generate": _error(engine.generate, [], SAMPLED)}
    engine.publish(exporter.items(), 4)
    return heard


def _failed(engine: Any, size: int) -> str:
    """What this rank hears when the last rank's engine fails. The other ranks of an engine over several would wait for
    it inside vLLM: they are not asked."""
    last = dist.get_rank() == RANKS - 1
    run = engine._run
    if last:
        engine._run = lambda *arguments: 1 / 0
    heard = _error(engine.generate, tiny_requests(), SAMPLED) if last or size == 1 else "nothing"
    engine._run = run
    return heard


def _leftovers() -> list[str]:
    """Shared memory of the engines of either rank."""
    names: list[Any] = [None] * RANKS
    dist.all_gather_object(names, shared_memory_name(os.getpid()))
    return [path.name for path in SHARED_MEMORY.iterdir() if any(name in path.name for name in names)]


def _rounds(folders: dict[str, tuple[str, str]], cases: list[tuple[str, int]]) -> dict[tuple[str, int], dict]:
    """For every (model, engine's size): a publish of the new weights, and what came back on this rank."""
    found = {}
    for model, size in cases:
        old, new = folders[model]
        exporter = _export(new)
        with tiny_engine(old, tensor_parallel_size=size) as engine:
            seen = found[model, size] = {"leftovers": _leftovers()}
            seen["before"] = engine.generate(tiny_requests(), SAMPLED)
            engine.publish(exporter.items(), 1)
            seen["after"] = engine.generate(tiny_requests(), SAMPLED)
            seen["few"] = engine.generate(tiny_requests()[:1], SAMPLED)  # the other rank's engine has nothing to do
            seen["refused"] = _refused(engine, exporter)
            seen["failed"] = _failed(engine, size)
            seen["again"] = engine.generate(tiny_requests(), SAMPLED)
        if (model, size) == DRAFTING:
            with tiny_engine(new, tensor_parallel_size=size, speculative_tokens=4) as engine:
                seen["drafts"] = engine.generate(tiny_requests(), SAMPLED)
        total = torch.ones(())
        dist.all_reduce(total)  # the trainer's world outlives the engine
        seen["world"] = total.item()
    return found


CASES = [("tied", 1), ("tied", 2), ("untied", 2)]
DRAFTING = "tied", 2


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    make = tmp_path_factory.mktemp
    return {
        name: tuple(
            str(make_tiny_model(make(name), family, tied=name == "tied", vocab=VOCAB, seed=seed)) for seed in (1, 2)
        )
        for name, family in (("tied", "qwen3"), ("untied", "llama"))
    }


@pytest.fixture(scope="module")
def ranks(folders):
    """What every rank saw."""
    return run_distributed(_rounds, RANKS, folders, CASES, fresh=True)


cases = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-tp{case[1]}")


def error(folder: str, rollouts: list[Rollout]) -> float:
    return largest_error(Path(folder), rollouts)


@cases
def test_rank_0_gets_every_rollout_in_order_and_the_others_none(ranks, case):
    asked = [(request.prompt, request.sample) for request in tiny_requests()]
    first, second = (rank[case] for rank in ranks)
    for when, version in (("before", 0), ("after", 1)):
        assert [(rollout.prompt, rollout.sample) for rollout in first[when]] == asked
        assert {rollout.weight_version for rollout in first[when]} == {version}
        assert second[when] == []
    assert [rollout.token_ids for rollout in first["few"]] == [first["after"][0].token_ids]
    assert second["few"] == []


@cases
def test_log_probs_are_those_of_transformers_before_and_after_a_publish_from_a_sharded_trainer(ranks, folders, case):
    old, new = folders[case[0]]
    first = ranks[0][case]
    assert error(old, first["before"]) < 1e-4
    assert error(new, first["after"]) < 1e-4
    assert error(old, first["after"]) > 0.1  # or the test could not fail


def test_the_number_of_engines_changes_no_response(ranks):
    one_each, one_over_both = ranks[0]["tied", 1]["after"], ranks[0]["tied", 2]["after"]
    assert [rollout.token_ids for rollout in one_each] == [rollout.token_ids for rollout in one_over_both]
    assert [rollout.text for rollout in one_each] == [rollout.text for rollout in one_over_both]


def test_an_engine_over_several_ranks_that_drafts_gives_the_same_responses(ranks):
    found, plain = ranks[0][DRAFTING]["drafts"], ranks[0][DRAFTING]["after"]
    assert found == [replace(rollout, weight_version=0) for rollout in plain]
    assert 0 < sum(rollout.accepted for rollout in found) < sum(rollout.drafted for rollout in found)


@cases
def test_an_engine_leaves_no_shared_memory_behind_and_the_trainers_world_alone(ranks, case):
    for rank in ranks:
        assert rank[case]["leftovers"] == []
        assert rank[case]["world"] == RANKS


@cases
def test_every_rank_refuses_a_publish_that_does_not_fit_and_takes_the_next(ranks, case):
    for rank in ranks:
        heard = rank[case]["refused"]
        assert heard["publish"].startswith("BridgeError: 'model.layers.0.input_layernorm.weight' was published with")
        assert heard["generate"].startswith("RuntimeError: the last publish failed")
    again, after = ranks[0][case]["again"], ranks[0][case]["after"]
    assert again == [replace(rollout, weight_version=4) for rollout in after]


def test_a_failure_on_one_rank_is_heard_on_rank_0_and_keeps_no_one_waiting(ranks):
    first, second = (rank["tied", 1]["failed"] for rank in ranks)
    assert first == "RuntimeError: generation failed on rank 1: ZeroDivisionError('division by zero')"
    assert second == "ZeroDivisionError: division by zero"


def test_a_failure_inside_an_engine_over_several_ranks_ends_its_rank_at_once(ranks):
    """It asks no other rank: they wait for it inside vLLM, and torchrun ends them when it is gone."""
    assert ranks[1]["tied", 2]["failed"] == "ZeroDivisionError: division by zero"
