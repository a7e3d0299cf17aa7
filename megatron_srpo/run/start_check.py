"""Whether trainer and engine are the same model, before the first iteration.

Both read a model folder by rules of their own. The engine answers a few of the run's prompts, the trainer scores the
same tokens with the weights that the engine should have, and their log-probs must agree.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import torch

from megatron_srpo.batching.rows import pack_rows, predicting_positions
from megatron_srpo.config import Config
from megatron_srpo.core.errors import UserError
from megatron_srpo.core.protocols import Control, Objective, Policy
from megatron_srpo.core.records import Prompt, Rollout, Row, Sample, Stream
from megatron_srpo.families import HfConfig, ModelShape, expert_count
from megatron_srpo.rollout import GenerateRequest, RolloutEngine, SamplingSettings, request_seed

TOKENS, LONGEST, MOST = 256, 32, 64  # tokens in all, of one response, and the number of responses
START = -2  # the iteration of its seeds: no iteration and no evaluation has it
# Largest mean |Δ log-prob| of a token, in nats, by model.dtype and with 8-bit products.
LIMITS = {"float32": 0.01, "bfloat16": 0.15, "fp8": 0.3}


def start_limit(config: Config) -> float:
    """rollout.start_mismatch_limit, or that of the dtype."""
    usual = LIMITS[config.model.dtype if config.model.fp8 == "off" else "fp8"]
    return config.rollout.start_mismatch_limit or usual


def probes(config: Config, prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts of the check: spread over the data set, again from its beginning where it is small."""
    count = min(MOST, -(-TOKENS // _length(config)))
    step = max(1, len(prompts) // count)
    return [prompts[number * step % len(prompts)] for number in range(count)]


def _length(config: Config) -> int:
    return min(LONGEST, config.rollout.max_response_length)


def check_start(
    config: Config, control: Control, engine: RolloutEngine, policy: Policy, objective: Objective,
    prompts: Sequence[Prompt], *, experts: bool = False,
) -> str:  # fmt: skip
    """Raise UserError on every rank if trainer and engine differ by more than the limit; returns a line for the user.

    Collective; `prompts` are `probes` on every rank. With `experts` the trainer uses the engine's, as in the training.
    It draws from no random generator of the run, and leaves the engine asleep if rollout.sleep_while_training says so.
    """
    found = _generate(config, engine, policy, prompts, experts=experts)
    rollouts = control.share(lambda: found)
    samples = [_sample(prompts[rollout.prompt], rollout) for rollout in rollouts]
    mean = _mean_difference(policy, objective, samples)
    limit, tokens = start_limit(config), sum(sample.length for sample in samples)
    if not mean <= limit:  # NaN is wrong too
        raise UserError(_refusal(config, mean, limit, tokens))
    return f"trainer and engine agree on {tokens} tokens: their log-probs differ by {mean:.2g} nats on average"


def routing_note(config: Config, hf: HfConfig) -> str | None:
    """A line for the user about the choice of experts; None for a dense model."""
    shape = ModelShape.from_hf(hf) if expert_count(hf) else None
    if shape is None:
        return None
    if config.rollout.replay(shape.experts) == "rollout":
        return (
            'the trainer uses the experts that the rollout engine chose (rollout.routing_replay = "rollout"): '
            f"{shape.expert_bytes} bytes per token travel with the responses. rollout_corr/experts_differ is the share "
            "of tokens for which the trainer alone would choose others"
        )
    later = ", except that later optimizer steps use the experts of the old log-prob pass"
    return (
        f'note: rollout.routing_replay = "{config.rollout.routing_replay}": the model has experts, and trainer and '
        "rollout engine choose them independently"
        f"{later if config.rollout.routing_replay == 'old' else ''}. A token near the border between two experts may "
        "go to different ones, above all in bfloat16, and training may diverge. rollout_corr/logprob_diff_mean and "
        'rollout_corr/logprob_diff_max show how far they differ; rollout.routing_replay = "rollout" avoids it'
    )


def _generate(
    config: Config, engine: RolloutEngine, policy: Policy, prompts: Sequence[Prompt], *, experts: bool
) -> list[Rollout]:
    rollout = config.rollout
    sampling = SamplingSettings(
        temperature=rollout.temperature, max_tokens=_length(config), ignore_eos=True, experts=experts
    )  # fmt: skip
    requests = [
        GenerateRequest(number, 0, prompt.token_ids, request_seed(config.run.seed, START, prompt.uid, number))
        for number, prompt in enumerate(prompts)
    ]
    with policy.on_host() if config.train.offload_while_generating else nullcontext():
        found = engine.generate(requests, sampling)
        if rollout.sleep_while_training:
            engine.sleep()
    return found


def _sample(prompt: Prompt, rollout: Rollout) -> Sample:
    stream = Stream(array("i", prompt.token_ids), rollout.token_ids, rollout.trained)
    return Sample(
        prompt.uid,
        rollout.prompt,
        stream,
        rollout.trained_logprobs,
        0.0,
        {"policy": 1.0},
        experts=rollout.experts_of(0),
    )


def _mean_difference(policy: Policy, objective: Objective, samples: list[Sample]) -> float:
    """Mean |log π_trainer − log π_engine| of all tokens, on every rank. Every data-parallel rank scores all samples, so
    that each of them is compared."""
    rows = [Row((number,), sample.student_length) for number, sample in enumerate(samples)]
    rows += [Row((), 0)] * (-len(rows) % policy.padding.rows)
    with policy.weights("student"):
        packed = pack_rows(rows, samples, padding=policy.padding, experts=[sample.experts for sample in samples])
        results = policy.score(packed, objective.check_pass().score)
    sums = torch.zeros(2, dtype=torch.float64)
    for row, result in zip(rows, results, strict=False):  # no results before the last pipeline stage
        for number, at in predicting_positions(row, samples, padding=policy.padding):
            ours = result["logprob"].cpu()[at].double().numpy()
            gap = np.abs(ours - samples[number].rollout_logprobs)
            sums += torch.tensor([gap.sum(), float(len(gap))])
    total, count = policy.sum_over_data(sums).tolist()
    return total / count if count else math.nan


def _refusal(config: Config, mean: float, limit: float, tokens: int) -> str:
    return (
        f"trainer and rollout engine are not the same model: on {tokens} tokens their log-probs differ by {mean:.3g} "
        f"nats on average, and the limit for model.dtype = {config.model.dtype!r} is {limit:g} "
        "(rollout.start_mismatch_limit). Likely causes: a rotary embedding that they read differently (rope_theta, "
        "rope_scaling), a tied head (tie_word_embeddings, lm_head.weight), a weight file of another version of the "
        "model, or another dtype or quantization in the engine. This shows the first layer that differs: "
        f"python -m megatron_srpo compare-logits --hf {config.model.path} --dtype {config.model.dtype} "
        "--token-ids 1,2,3"
    )
