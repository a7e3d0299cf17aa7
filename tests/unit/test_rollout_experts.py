"""A real engine on a CPU returns the experts that each token used, whatever was cached, published or preempted."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_srpo.config import RolloutConfig
from megatron_srpo.rollout import GenerateRequest, RolloutError
from megatron_srpo.rollout.engine import experts_of_turns
from megatron_srpo.rollout.partial import joined
from megatron_srpo.rollout.vllm.expert_records import decode_rows, expert_record
from megatron_srpo.rollout.vllm.settings import (
    RECORDING_SCHEDULER,
    RECORDING_WORKER,
    EngineSettings,
    engine_arguments,
    model_shape,
)
from tests.routed_reference import FixedChoice, load
from tests.tiny_engines import LONG, PROMPTS, SAMPLED, VOCAB, tiny_engine, weights
from tests.tiny_models import make_tiny_model

ASKED = replace(SAMPLED, experts=True)
SHARED = [*PROMPTS, LONG, [*LONG, 7, 9], LONG[:129]]  # the long ones share a block of the prefix cache


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two models of one shape, with a dense layer."""
    folder = tmp_path_factory.mktemp("moe")
    return [
        make_tiny_model(
            folder / str(seed), "qwen3_moe", tied=False, vocab=VOCAB, layers=3, dense_layers=(1,), experts=6, seed=seed
        )
        for seed in range(2)
    ]


def chosen(folder, prompts, rollouts):
    """What transformers' routers choose for every token but the last of each sequence, in float64."""
    model = load(folder)
    choice, found = FixedChoice(model), []
    for rollout in rollouts:
        with torch.no_grad():
            model(torch.tensor([[*prompts[rollout.prompt], *rollout.token_ids]]))
        found.append(choice.made[:-1].numpy())
    return found


def check(folder, rollouts, prompts=SHARED):
    for rollout, expected in zip(rollouts, chosen(folder, prompts, rollouts), strict=True):
        assert rollout.experts.dtype == np.uint8 and rollout.experts.shape == expected.shape
        assert np.array_equal(np.sort(rollout.experts, -1), np.sort(expected, -1)), f"prompt {rollout.prompt}"


def requests(prompts, samples=3):
    return [GenerateRequest(p, s, ids, 100 * p + s) for p, ids in enumerate(prompts) for s in range(samples)]


def check_turns(engine, folder):
    """A second request that continues the first with tokens of an environment: the whole sequence has its experts."""
    (first,) = engine.generate(requests([LONG], 1), replace(ASKED, ignore_eos=True))
    behind = [*LONG, *first.token_ids, 4, 9, 17]
    (second,) = engine.generate(requests([behind], 1), ASKED)
    joined = experts_of_turns([first.experts, second.experts])
    assert len(joined) == len(behind) + len(second.token_ids) - 1
    check(folder, [replace(second, experts=joined)], [behind])
    return first, second


def check_parts(engine, folder):
    """A response in three rounds, the last one without the engine's cache, as in the next iteration."""
    request, sampling, whole = GenerateRequest(0, 0, LONG, 5, cut=True), replace(ASKED, max_tokens=4), None
    for goes_on in (False, True, False):
        asked = replace(request, begun=() if whole is None else whole.token_ids)
        (part,) = engine.generate([asked], replace(sampling, ignore_eos=True, goes_on=goes_on))
        whole = joined(whole, part)
    assert len(whole.token_ids) == 12
    check(folder, [whole], [LONG])


def vllms_own_record(engine):
    """vLLM's recorder, which needs no GPU by itself, beside ours: it gets what the routers of this engine choose."""
    from vllm.model_executor.layers.fused_moe.layer import MoERunner
    from vllm.model_executor.layers.fused_moe.routed_experts_capturer import RoutedExpertsCapturer

    llm = engine._llm.llm_engine
    capturer = RoutedExpertsCapturer(256, llm.vllm_config)
    (model,) = engine._llm.apply_model(lambda model: model)
    for layer in (module for module in model.modules() if isinstance(module, MoERunner)):
        ours = layer.router.capture_fn
        layer.router.set_capture_fn(
            lambda chosen, ours=ours, layer=layer.layer_id: (ours(chosen), capturer.capture(layer, chosen))
        )
    return capturer


def test_an_engine_returns_the_experts_of_every_token_also_of_cached_prompts_and_after_a_publish(folders):
    with tiny_engine(folders[0], max_model_len=200) as engine:
        found = engine.generate(requests(SHARED), ASKED)
        check(folders[0], found)
        assert any(not np.array_equal(rollout.experts[:2], found[0].experts[:2]) for rollout in found)
        plain = engine.generate(requests(SHARED), SAMPLED)
        assert plain == found and all(rollout.experts is None for rollout in plain)
        engine.publish(weights(folders[1]).items(), 1)
        check(folders[1], engine.generate(requests(SHARED), ASKED))
        check_parts(engine, folders[1])
        turns = check_turns(engine, folders[1])
        assert len(turns) == 2 and turns[1].experts.shape[0] > turns[0].experts.shape[0] + 3
        capturer = vllms_own_record(engine)
        (one,) = engine.generate(requests([LONG], 1), replace(ASKED, max_tokens=1))
        theirs = capturer.snapshot_routing_data(len(LONG)).numpy()
        assert np.array_equal(expert_record(theirs, len(LONG) + 1, model_shape(str(folders[1]))), one.experts)


def test_experts_are_those_of_the_tokens_that_are_kept_if_others_were_drafted(folders):
    with tiny_engine(folders[0], max_model_len=200, speculative_tokens=4) as engine:
        found = engine.generate(requests(SHARED), replace(ASKED, max_tokens=40))
        assert 0 < sum(rollout.accepted for rollout in found) < sum(rollout.drafted for rollout in found)
        check(folders[0], found)
        check_turns(engine, folders[0])


@pytest.mark.slow
def test_experts_of_preempted_requests_are_those_of_their_tokens(folders):
    """A cache of a few blocks: running requests give theirs up, and their tokens are computed again."""
    prompts = [[3 + (7 * i * k + i) % 17 for i in range(120)] for k in range(1, 9)]
    with tiny_engine(folders[0], cpu_kv_cache_gib=0.0011, max_model_len=300) as engine:
        scheduler = engine._llm.llm_engine.engine_core.engine_core.scheduler
        preempted, preempt = [], scheduler._preempt_request
        scheduler._preempt_request = lambda request, *more, **how: (
            preempted.append(request) or preempt(request, *more, **how)
        )
        asked = replace(ASKED, max_tokens=60, ignore_eos=True)
        check(folders[0], engine.generate(requests(prompts, 2), asked), prompts)
        assert preempted


@pytest.mark.slow
def test_an_engine_that_was_not_started_for_it_says_so(folders):
    from tests import tiny_engines

    plain = tiny_engines.RolloutConfig
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_engines, "RolloutConfig", lambda **given: plain(**given, routing_replay="off"))
        with tiny_engine(folders[0]) as engine, pytest.raises((RolloutError, ValueError), match="no experts came"):
            engine.generate(requests(PROMPTS[:1], 1), ASKED)


def test_the_recorders_names_are_those_of_its_classes():
    from vllm.utils.import_utils import resolve_obj_by_qualname
    from vllm.v1.core.sched.scheduler import Scheduler

    from megatron_srpo.rollout.vllm.cpu_worker import NamedWorker

    assert issubclass(resolve_obj_by_qualname(RECORDING_WORKER), NamedWorker)
    assert issubclass(resolve_obj_by_qualname(RECORDING_SCHEDULER), Scheduler)


def test_vllms_own_recording_takes_our_arguments_for_a_gpu(folders):
    """It has not run: there is no GPU. vLLM's own types read what we would start it with, and what it would send."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.serial_utils import numpy2base64

    settings = EngineSettings(str(folders[0]), str(folders[0]), "bfloat16", RolloutConfig(), 100, 0, "cuda")
    made = EngineArgs(**engine_arguments(settings))
    assert made.aux_output_config.enabled and made.enable_prefix_caching and made.pipeline_parallel_size == 1
    rows = np.random.default_rng(0).integers(0, 6, (9, 3, 2)).astype(np.uint8)
    assert np.array_equal(decode_rows(numpy2base64(rows)), rows)
