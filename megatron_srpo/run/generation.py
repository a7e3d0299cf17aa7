"""Prompts → scored groups, with engine and scorer together; and the held-out evaluation. Every rank takes part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Literal

from megatron_srpo.config import Config, read_model_folder
from megatron_srpo.core.output_log import printed_where
from megatron_srpo.core.protocols import Scorer, Timer
from megatron_srpo.core.records import Group, Prompt
from megatron_srpo.core.text import causes
from megatron_srpo.families import expert_count
from megatron_srpo.rollout import GenerateRequest, Prefetcher, RolloutEngine, SamplingSettings, request_seed
from megatron_srpo.run.evaluation import accuracy_metrics

EVALUATION = -1  # the iteration of its seeds: the same at every evaluation, so that curves differ by the weights alone


class Requests:
    """The requests of a batch: all samples of all prompts. A prompt that comes again, in a refill or in the same batch
    (where an epoch ends, or with less data than a batch), gets new seeds. Prompts of the kinds in `episodes` are talked
    about with an environment."""

    def __init__(self, seed: int, samples: int, episodes: Collection[str] = ()) -> None:
        self._seed, self._samples, self._episodes = seed, samples, episodes

    def __call__(self, prompts: list[Prompt], iteration: int, refill: int) -> list[GenerateRequest]:
        seen: Counter[str] = Counter()
        requests = []
        for index, prompt in enumerate(prompts):
            requests += self.of_prompt(prompt, iteration, refill, index, seen[prompt.uid])
            seen[prompt.uid] += 1
        return requests

    def of_prompt(
        self, prompt: Prompt, iteration: int, refill: int, index: int, again: int
    ) -> list[GenerateRequest]:  # fmt: skip
        """Those of prompt number `index`, which is in the batch `again` times before it."""
        name = f"{prompt.uid} again {again}" if again else prompt.uid
        return [
            GenerateRequest(
                prompt=index,
                sample=sample,
                token_ids=prompt.token_ids,
                seed=request_seed(self._seed, iteration, name, refill * self._samples + sample),
                row=prompt if prompt.kind in self._episodes else None,
                group_seed=request_seed(self._seed, iteration, name, -1 - refill),
            )
            for sample in range(self._samples)
        ]


class GroupGenerator:
    """Answers prompts and scores the answers. `taught`: teachers may be shown them."""

    def __init__(
        self, engine: RolloutEngine | Prefetcher, scorer: Scorer, requests: Requests, sampling: SamplingSettings, *,
        taught: bool = True,
    ) -> None:  # fmt: skip
        self._engine, self._scorer, self._requests, self._sampling = engine, scorer, requests, sampling
        self._taught = taught

    def __call__(self, prompts: list[Prompt], iteration: int, refill: int, timer: Timer) -> list[Group]:
        """The groups on rank 0, by prompt; [] on the other ranks."""
        with timer.phase("gen"):
            requests = self._requests(prompts, iteration, refill)
            score = self._scorer.start(prompts, taught=self._taught)
            rollouts = self._engine.generate(requests, self._sampling, score)
        with timer.phase("reward"):
            return self._scorer.finish(rollouts)


def training_sampling(config: Config, *, experts: bool = False) -> SamplingSettings:
    """How an iteration's responses are sampled. `experts`: the trainer uses the engine's (`replay_mode`)."""
    rollout = config.rollout
    return SamplingSettings(
        temperature=rollout.temperature, top_p=rollout.top_p, max_tokens=rollout.max_response_length, experts=experts
    )  # fmt: skip


def replay_mode(config: Config) -> Literal["off", "rollout", "old"]:
    """rollout.routing_replay, resolved for the model in model.path."""
    return config.rollout.replay(expert_count(read_model_folder(config.model.path)))


class Evaluator:
    """Samples k answers to every held-out prompt and scores them. `prompts` is the same on every rank. `keep` gets the
    scored groups on rank 0.

    With `stop`, which is collective, the prompts come in batches of up to `requests` responses, and between two
    batches it is asked whether to stop: then nothing is evaluated, and `say` tells it.
    """

    def __init__(
        self, config: Config, engine: RolloutEngine, prompts: list[Prompt], scorer: Scorer,
        keep: Callable[[list[Group]], None] = lambda groups: None, *,
        stop: Callable[[], bool] | None = None, requests: int = 0, say: Callable[[str], None] = print,
    ) -> None:  # fmt: skip
        settings = config.eval
        sampling = replace(training_sampling(config), temperature=settings.temperature, top_p=settings.top_p)
        asked = Requests(config.run.seed, settings.n_samples, config.environment.classes)
        self._generate = GroupGenerator(engine, scorer, asked, sampling, taught=False)
        self._same = scorer.same_answers
        self._prompts, self._keep = prompts, keep
        self._output_dir = config.run.output_dir
        self._samples = settings.n_samples
        self._stop, self._say = stop, say
        self._batch = max(1, requests // settings.n_samples) if stop else max(1, len(self._prompts))

    def __call__(self, timer: Timer) -> dict[str, float]:
        """Metrics on rank 0, {} on the other ranks, and {} where it was stopped."""
        groups: list[Group] = []
        for start in range(0, len(self._prompts), self._batch):
            if start and self._stop is not None and self._stop():
                self._say(
                    f"the run was asked to stop: its evaluation ends after {start} of {len(self._prompts)} prompts, "
                    "without a result"
                )
                return {}
            groups += self._generate(self._prompts[start : start + self._batch], EVALUATION, 0, timer)
        if not groups:
            return {}
        self._keep(groups)
        errors = [attempt.reward.error for group in groups for attempt in group.attempts if attempt.reward.error]
        if errors:
            self._say(
                f"warning: evaluation: {len(errors)} of {sum(len(group.attempts) for group in groups)} rewards failed, "
                f"and count as reward.failure_score: {causes(errors)}{printed_where(self._output_dir)}"
            )
        return accuracy_metrics(groups, k=self._samples, same=self._same)
