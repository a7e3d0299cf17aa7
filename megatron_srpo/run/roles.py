"""The two roles of a rank. Rank 0, the driver, has the prompts and the log; the others follow it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol, cast

from megatron_srpo.algorithms.history import Histories, NoHistories, PromptHistories
from megatron_srpo.batching.handover import Handover
from megatron_srpo.batching.source import DriverSource, FollowerSource, Generator
from megatron_srpo.config import Config
from megatron_srpo.core.protocols import Log, RoleControl, Scorer, Source, State
from megatron_srpo.core.records import Padding, Prompt
from megatron_srpo.core.text import visible
from megatron_srpo.observe import Observer, SilentLog
from megatron_srpo.rollout import PartialPool, Prefetcher, RolloutEngine, SamplingSettings, under_way
from megatron_srpo.run.evaluation import taught_prompts
from megatron_srpo.run.generation import GroupGenerator, Requests, replay_mode, training_sampling
from megatron_srpo.run.partial import PartialFollower, PartialGenerator

if TYPE_CHECKING:
    from megatron_srpo.data import PromptLoader
    from megatron_srpo.rollout.prefetcher import AsyncEngine

RestoreData = Callable[["Restorable", State], None]


class Restorable(Protocol):
    """What can go on where a checkpoint was taken."""

    def load_state_dict(self, state: State) -> None: ...


class Role(Protocol):
    """What differs between rank 0 and the others."""

    log: Log

    def kinds(self) -> set[str]:
        """The reward kinds of all prompts, on rank 0."""

    def prompts(self, split: str) -> list[Prompt]:
        """The prompts of a split, on rank 0."""

    def taught_prompts(self, split: str) -> list[Prompt]:
        """Those with a solution, as the self-teacher reads them, on rank 0."""

    def chat_options(self) -> Mapping[str, object]:
        """The arguments of the chat template, on rank 0."""

    def opening(self) -> str:
        """What the chat template writes of every response: "<think>" or nothing; on rank 0."""

    def restore_data(self, restore: RestoreData, state: State) -> None:
        """Go on with the data where a checkpoint was taken."""

    def open_log(self, start: int, state: State) -> None:
        """Open the log, which continues at iteration `start` with the `state` that it had there."""

    def source(
        self, control: RoleControl, engine: RolloutEngine, scorer: Scorer, *, start: int, dp_size: int,
        padding: Padding, handover: Handover,
    ) -> Source:  # fmt: skip
        """Where iterations from `start` on come from. The trainer tells `handover` what it sees."""

    def close(self) -> None:
        """Close the log."""


class Driver:
    """Rank 0."""

    def __init__(self, config: Config, *, splits: tuple[str, ...], trains: bool = True) -> None:
        from megatron_srpo.run.prompting import Prompting

        self._config = config
        self.log: Log = _ConsoleLog()
        self._prompting = Prompting(config, trains=trains)
        self._prompts = {split: self._prompting.prompts(split, self.log.message) for split in splits}
        self._loaders = [self._loader(prompts) for split, prompts in self._prompts.items() if split == "train"]
        self._histories: Histories = PromptHistories() if config.algorithm.needs.history else NoHistories()

    def _loader(self, prompts: list[Prompt]) -> PromptLoader | PartialPool:
        from megatron_srpo.data import PromptLoader

        config, rollout = self._config, self._config.rollout
        batch = 1 if rollout.partial_tokens else rollout.rollout_batch_size
        loader = PromptLoader(prompts, batch, seed=config.run.seed, shuffle=config.data.shuffle)
        if not rollout.partial_tokens:
            return loader
        requests = _requests(config)

        def seeds(prompt: Prompt, iteration: int, again: int) -> list[int]:
            return [request.seed for request in requests.of_prompt(prompt, iteration, 0, 0, again)]

        return PartialPool(loader, seeds, rollout, total=config.run.iterations)

    def kinds(self) -> set[str]:
        return {prompt.kind for prompts in self._prompts.values() for prompt in prompts}

    def prompts(self, split: str) -> list[Prompt]:
        return self._prompts.get(split, [])

    def taught_prompts(self, split: str) -> list[Prompt]:
        build = self._prompting.teacher_prompt
        prompts, lines = taught_prompts(self.prompts(split), build, self._decode_prompt, split)
        for line in lines:
            self.log.message(line)
        return prompts

    def chat_options(self) -> Mapping[str, object]:
        return self._prompting.chat_options

    def opening(self) -> str:
        return self._prompting.opening

    def restore_data(self, restore: RestoreData, state: State) -> None:
        for loader in self._loaders:
            restore(loader, state)
            if under_way(state) and not isinstance(loader, PartialPool):
                self.log.warn(
                    f"{under_way(state)} groups were under way when the checkpoint was taken; they are not trained, "
                    "because rollout.partial_tokens is now 0"
                )
        self._histories.load_state_dict(cast(State, state.get("histories", {})))

    def open_log(self, start: int, state: State) -> None:
        observer = Observer(self._config, start_step=start, decode=self._decode_prompt)
        observer.load_state_dict(state)
        self.log = observer

    def decode(self, ids: list[int]) -> str:
        """A response's text."""
        return self._prompting.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _decode_prompt(self, ids: Sequence[int]) -> str:
        """The text of a prompt, with the special tokens that mark its turns."""
        return self._prompting.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)

    def source(
        self, control: RoleControl, engine: RolloutEngine, scorer: Scorer, *, start: int, dp_size: int,
        padding: Padding, handover: Handover,
    ) -> DriverSource:  # fmt: skip
        config, requests, sampling = self._config, _requests(self._config), _sampling(self._config)
        loader: PromptLoader | Prefetcher | PartialPool
        generate: Generator
        (loader,) = self._loaders
        if isinstance(loader, PartialPool):
            loader.iteration = start
            generate = PartialGenerator(engine, scorer, control, sampling, config.rollout.partial_tokens, loader)
            metrics = loader.metrics
        elif config.rollout.max_staleness:
            loader = Prefetcher(
                cast("AsyncEngine", engine), loader, requests, sampling, batches=config.rollout.max_staleness,
                start=start, total=config.run.iterations, on_rollout=scorer.read,
            )  # fmt: skip
            generate, metrics = GroupGenerator(loader, scorer, requests, sampling), loader.metrics
        else:
            generate, metrics = GroupGenerator(engine, scorer, requests, sampling), engine.metrics
        return DriverSource(
            config, control, generate, loader, self._prompting.teacher_prompt, self._histories, self.log,
            dp_size=dp_size, padding=padding, engine_metrics=metrics, experts=sampling.experts, handover=handover,
            prepare=self._prompting.teacher_prompt.prepare,
        )  # fmt: skip

    def close(self) -> None:
        self.log.close()


class Follower:
    """A rank other than 0."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self.log: Log = SilentLog()

    def kinds(self) -> set[str]:
        return set()

    def prompts(self, split: str) -> list[Prompt]:
        return []

    def taught_prompts(self, split: str) -> list[Prompt]:
        return []

    def chat_options(self) -> Mapping[str, object]:
        return {}

    def opening(self) -> str:
        return ""

    def restore_data(self, restore: RestoreData, state: State) -> None: ...

    def open_log(self, start: int, state: State) -> None: ...

    def source(
        self, control: RoleControl, engine: RolloutEngine, scorer: Scorer, *, start: int, dp_size: int,
        padding: Padding, handover: Handover,
    ) -> FollowerSource:  # fmt: skip
        sampling, tokens = _sampling(self._config), self._config.rollout.partial_tokens
        if tokens:
            return FollowerSource(control, PartialFollower(engine, scorer, control, sampling, tokens))
        return FollowerSource(control, GroupGenerator(engine, scorer, _requests(self._config), sampling))

    def close(self) -> None: ...


def _requests(config: Config) -> Requests:
    return Requests(config.run.seed, config.rollout.n_samples_per_prompt, config.environment.classes)


def _sampling(config: Config) -> SamplingSettings:
    return training_sampling(config, experts=replay_mode(config) == "rollout")


class _ConsoleLog(SilentLog):
    """Until the run's log is open, lines for the user go to standard output."""

    def message(self, text: str) -> None:
        with suppress(OSError):  # a full disk behind standard output; whatever else is written will tell
            print(visible(text), flush=True)

    def warn(self, text: str) -> None:
        self.message(f"warning: {text}")
