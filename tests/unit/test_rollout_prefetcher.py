"""Batches ahead of the training: what is asked when, and where a resumed run goes on."""

from __future__ import annotations

from concurrent.futures import Future

from megatron_srpo.rollout import GenerateRequest, SamplingSettings
from megatron_srpo.rollout.prefetcher import Prefetcher

SAMPLING = SamplingSettings()


class Loader:
    """Prompts 0, 1, 2 …, one a batch."""

    epoch = 3

    def __init__(self) -> None:
        self.position = 0

    def next_batch(self) -> list[int]:
        self.position += 1
        return [self.position - 1]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}


class Engine:
    """Writes down what it is asked; its answers are the requests' prompts."""

    weight_version = 0

    def __init__(self) -> None:
        self.log: list[tuple] = []

    def submit(self, requests: list[GenerateRequest], sampling: SamplingSettings, on_rollout=None) -> Future:
        for request in requests if on_rollout else ():
            on_rollout(request.prompt)
        self.log.append(("submit", requests[0].prompt, self.weight_version))
        answers: Future = Future()
        answers.set_result([request.prompt for request in requests])
        return answers

    def collect(self, answers: Future) -> list[int]:
        self.log.append(("collect", *answers.result()))
        return answers.result()

    def generate(self, requests, sampling, on_rollout) -> list[int]:
        self.log.append(("generate", requests[0].prompt))
        return [request.prompt for request in requests]

    def metrics(self) -> dict[str, float]:
        return {"rollout/staleness_max": 1.0}


def requests(prompts: list[int], iteration: int, refill: int) -> list[GenerateRequest]:
    return [GenerateRequest(prompt, refill, [1], seed=iteration) for prompt in prompts]


def run(batches: int, total: int, *, start: int = 0, evaluate: bool = False) -> tuple[list[tuple], list[dict]]:
    """The engine's log of a whole run, and the loader's states at the checkpoints after each iteration."""
    engine = Engine()
    ahead = Prefetcher(engine, Loader(), requests, SAMPLING, batches=batches, start=start, total=total)
    states = []
    for iteration in range(start, total):
        prompts = ahead.next_batch()
        assert ahead.generate(requests(prompts, iteration, 0), SAMPLING, None) == prompts == [iteration - start]
        engine.weight_version += 1  # trained and published
        if evaluate:
            assert ahead.generate(requests([99], -1, 0), SAMPLING, None) == [99]
        states.append(ahead.state_dict())
    return engine.log, states


def test_one_batch_is_under_way_while_another_trains():
    log, _ = run(1, 3)
    assert log == [
        ("submit", 0, 0), ("submit", 1, 0), ("collect", 0), ("submit", 2, 1), ("collect", 1), ("collect", 2),
    ]  # fmt: skip


def test_no_batch_is_older_than_the_bound_when_it_trains():
    for batches in (1, 2, 3):
        log, _ = run(batches, 8)
        submitted = {entry[1]: entry[2] for entry in log if entry[0] == "submit"}
        assert sorted(submitted) == list(range(8))  # each once, none for an iteration that does not come
        assert max(iteration - version for iteration, version in submitted.items()) == batches


def test_an_evaluation_in_between_is_passed_on():
    log, _ = run(1, 2, evaluate=True)
    assert [entry[0] for entry in log] == ["submit", "submit", "collect", "generate", "collect", "generate"]


def test_a_resumed_run_draws_what_was_under_way_again():
    _, states = run(2, 5)
    assert states == [{"position": i} for i in (1, 2, 3, 4, 5)]
    log, _ = run(1, 5, start=3)
    assert [entry[1] for entry in log if entry[0] == "submit"] == [0, 1]


def test_the_rest_is_the_engines_and_the_loaders_own():
    ahead = Prefetcher(Engine(), Loader(), requests, SAMPLING, batches=1, start=0, total=2)
    assert ahead.weight_version == 0 and ahead.epoch == 3
    prompts = ahead.next_batch()
    assert ahead.next_batch() == prompts  # until it is generated
    ahead.generate(requests(prompts, 0, 0), SAMPLING)
    metrics = ahead.metrics()
    assert metrics["rollout/staleness_max"] == 1 and 0 <= metrics["rollout/overlap_fraction"] <= 1
    assert metrics["rollout/generation_seconds"] > 0


def test_the_epoch_is_that_of_the_batch_that_trains():
    loader = Loader()
    ahead = Prefetcher(Engine(), loader, requests, SAMPLING, batches=2, start=0, total=9)
    for iteration in range(4):
        prompts = ahead.next_batch()
        loader.epoch = 10 * (iteration + 3)  # of the batch that is begun now, two iterations before it trains
        ahead.generate(requests(prompts, iteration, 0), SAMPLING)
        assert ahead.epoch == (3 if iteration == 0 else 30 if iteration < 3 else 40)


def test_a_response_that_comes_early_is_handed_on_at_once():
    early: list[int] = []
    ahead = Prefetcher(
        Engine(), Loader(), requests, SAMPLING, batches=1, start=0, total=3, on_rollout=early.append
    )  # fmt: skip
    ahead.generate(requests(ahead.next_batch(), 0, 0), SAMPLING)
    assert early == [0, 1]
