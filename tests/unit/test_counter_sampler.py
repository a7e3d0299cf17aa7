"""Draws by counter: exact in distribution, and a function of seed and position alone."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_srpo.rollout import prepare_environment

prepare_environment("cpu")

from vllm.v1.outputs import LogprobsTensors  # noqa: E402
from vllm.v1.sample.logits_processor import LogitsProcessors  # noqa: E402
from vllm.v1.sample.metadata import SamplingMetadata  # noqa: E402
from vllm.v1.sample.sampler import Sampler  # noqa: E402

from megatron_srpo.rollout.vllm.counter_sampler import BLOCK, CounterSampler, draw, uniforms  # noqa: E402
from tests.sampling_reference import chi_square, kept  # noqa: E402

FROZEN = [0.6524484863740321, 0.24696520214533768, 0.46003540141503607]
VOCABULARIES = [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 5000]


def made_logits(vocabulary: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(vocabulary, generator=torch.Generator().manual_seed(seed))


def sampler(positions: list[int] | np.ndarray) -> CounterSampler:
    """As installed in a model runner whose rows have these lengths."""
    runner = SimpleNamespace(
        sampler=Sampler("processed_logprobs"), seq_lens=torch.tensor(np.asarray(positions), dtype=torch.int32)
    )
    return CounterSampler(runner)


def asked(
    seeds: list[int], temperature: list[float], top_k: int = 0, top_p: float = 1.0, logprobs: int | None = 0
) -> SamplingMetadata:
    """What vLLM's V1 model runner hands to its sampler."""
    rows, temperatures = len(seeds), torch.tensor(temperature)
    none = torch.zeros(rows)
    return SamplingMetadata(
        temperature=temperatures,
        all_greedy=bool((temperatures == 0).all()),
        all_random=bool((temperatures > 0).all()),
        top_p=torch.full((rows,), top_p) if top_p < 1 else None,
        top_k=torch.full((rows,), top_k) if top_k else None,
        generators={row: torch.Generator().manual_seed(seed) for row, seed in enumerate(seeds)},
        max_num_logprobs=logprobs,
        no_penalties=True,
        prompt_token_ids=None,
        frequency_penalties=none,
        presence_penalties=none,
        repetition_penalties=none,
        output_token_ids=[[] for _ in seeds],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors(),
    )


def told(tensors: LogprobsTensors | None) -> torch.Tensor:
    assert tensors is not None
    return tensors.logprobs[:, 0]


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_a_fine_grid_of_numbers_is_shared_out_as_the_probabilities_say(vocabulary):
    probs = kept(made_logits(vocabulary), 1.0, 0, 1.0)
    points = 20_000
    grid = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    tokens = torch.cat([draw(probs.float().expand(len(part), -1).contiguous(), part) for part in grid.split(2000)])
    counts = torch.bincount(tokens, minlength=vocabulary).double()
    assert (counts / points - probs).abs().max() <= 1.5 / points


@pytest.mark.parametrize("vocabulary", [5, BLOCK + 3, 2000])
@pytest.mark.parametrize("number", [0.0, 0.3, 1 - 2.0**-52])
def test_tokens_without_probability_are_never_drawn(vocabulary, number):
    alone = torch.zeros(vocabulary, vocabulary).fill_diagonal_(0.25)
    assert draw(alone, torch.full((vocabulary,), number, dtype=torch.float64)).tolist() == list(range(vocabulary))


def test_tokens_too_rare_for_a_running_sum_in_float32_are_drawn():
    """100,000 tokens of 1e-9 have 1e-4 of the mass together; one is 0.9999."""
    probs = torch.full((1, 100_001), 1e-9)
    probs[0, 0] = 1 - 1e-4
    numbers = 1 - 1e-4 * (torch.arange(500, dtype=torch.float64) + 0.5) / 500
    tokens = torch.cat([draw(probs, number[None]) for number in numbers])
    assert tokens.unique().numel() == 500 and (tokens[:-1] > tokens[1:]).all()


def test_probabilities_that_are_not_numbers_end_nothing():
    assert 0 <= int(draw(torch.full((1, 100), math.nan), torch.tensor([0.5], dtype=torch.float64))) < 100


def test_numbers_are_uniform_and_unrelated_over_seeds_and_positions():
    seeds, positions = np.meshgrid(np.arange(300), np.arange(1000), indexing="ij")
    numbers = uniforms(seeds.ravel(), positions.ravel()).view(300, 1000)
    assert numbers.unique().numel() == numbers.numel()
    assert abs(chi_square(torch.histc(numbers.float(), 100, 0, 1), torch.full((100,), 0.01))) < 4
    standard = (numbers - 0.5) * math.sqrt(12)
    for first, second in ((standard[:-1], standard[1:]), (standard[:, :-1], standard[:, 1:])):
        assert abs((first * second).mean().item()) < 4 / math.sqrt(first.numel())


def test_numbers_are_those_of_every_machine():
    """Frozen: a resumed run, on another machine too, must draw the same responses."""
    found = uniforms(np.array([0, 1, 2**63 - 1]), np.array([0, 7, 4000]))
    assert found.tolist() == FROZEN


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1, 0, 1), (0.6, 0, 1), (1.7, 12, 1), (1, 0, 0.8), (1, 9, 0.7)]
)
def test_samples_have_the_distribution_that_vllm_filters(temperature, top_k, top_p):
    logits, rows, steps = made_logits(300, seed=3), 500, 60
    probs, counts = kept(logits, temperature, top_k, top_p), torch.zeros(300)
    settings = asked(list(range(rows)), [float(temperature)] * rows, top_k, top_p)
    for step in range(steps):
        output = sampler([5 + step] * rows)(logits.repeat(rows, 1), settings)
        tokens = output.sampled_token_ids[:, 0]
        counts += torch.bincount(tokens, minlength=300)
        torch.testing.assert_close(told(output.logprobs_tensors), probs[tokens].log().float(), rtol=0, atol=2e-6)
    assert counts[probs == 0].sum() == 0
    assert abs(chi_square(counts, probs)) < 4


def test_a_draw_depends_on_neither_the_other_rows_nor_their_order():
    logits = torch.stack([made_logits(200, seed) for seed in range(40)])
    seeds, positions = list(range(100, 140)), np.arange(40) + 3
    whole = sampler(positions)(logits.clone(), asked(seeds, [1.0] * 40))
    for some in (range(39, -1, -1), range(7, 20), [31]):
        rows = list(some)
        part = sampler(positions[rows])(logits[rows], asked([seeds[row] for row in rows], [1.0] * len(rows)))
        assert torch.equal(part.sampled_token_ids, whole.sampled_token_ids[rows])
        assert torch.equal(told(part.logprobs_tensors), told(whole.logprobs_tensors)[rows])


def test_greedy_rows_among_others_take_the_likeliest_token_and_change_no_other():
    logits = torch.stack([made_logits(200, seed) for seed in range(8)])
    seeds, positions = list(range(8)), [9] * 8
    random = sampler(positions)(logits.clone(), asked(seeds, [1.0] * 8)).sampled_token_ids
    mixed = sampler(positions)(logits.clone(), asked(seeds, [1.0, 0.0] * 4))
    assert torch.equal(mixed.sampled_token_ids[::2], random[::2])
    assert torch.equal(mixed.sampled_token_ids[1::2, 0].long(), logits[1::2].argmax(1))
    greedy = sampler(positions)(logits.clone(), asked(seeds, [0.0] * 8))
    torch.testing.assert_close(told(greedy.logprobs_tensors)[1::2], told(mixed.logprobs_tensors)[1::2])


@pytest.mark.parametrize("logprobs", [None, 2, -1])
def test_other_requests_for_log_probs_are_answered_as_vllm_answers_them(logprobs):
    logits = torch.stack([made_logits(50, seed) for seed in range(6)])
    usual = sampler([4] * 6)(logits.clone(), asked(list(range(6)), [1.0] * 6))
    other = sampler([4] * 6)(logits.clone(), asked(list(range(6)), [1.0] * 6, logprobs=logprobs))
    assert torch.equal(other.sampled_token_ids, usual.sampled_token_ids)
    if logprobs is None:
        assert other.logprobs_tensors is None
    elif logprobs == 2:
        torch.testing.assert_close(told(other.logprobs_tensors), told(usual.logprobs_tensors))
        assert other.logprobs_tensors.logprobs.shape == (6, 3)
    else:
        torch.testing.assert_close(other.logprobs_tensors.logprobs, logits.log_softmax(-1))


def test_a_row_without_a_seed_is_random_and_the_others_keep_their_draws():
    logits = torch.zeros(2, 500)  # all tokens are as likely, so that chance cannot make 20 draws alike
    settings = asked([7, 8], [1.0, 1.0])
    seeded = sampler([4, 4])(logits.clone(), settings).sampled_token_ids[0]
    del settings.generators[1]
    found = [sampler([4, 4])(logits.clone(), settings).sampled_token_ids for _ in range(20)]
    assert all(torch.equal(tokens[0], seeded) for tokens in found)
    assert len({int(tokens[1]) for tokens in found}) > 3
