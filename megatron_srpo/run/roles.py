"""The two roles of a rank. Rank 0, the driver, has the prompts and the log; the others follow it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol, cast

from megatron_srpo.algorithms.history import Histories, NoHistories, PromptHistories
from megatron_srpo.batching.handover import Handover
from megatron_srpo.batching.source import DriverSource, FollowerSource
from megatron_srpo.config import Config
from megatron_srpo.core.protocols import Log, RoleControl, Scorer, Source, State
from megatron_srpo.core.records import Padding, Prompt
from megatron_srpo.core.text import visible
from megatron_srpo.observe import Observer, SilentLog
from megatron_srpo.rollout import Prefetcher, RolloutEngine, SamplingSettings
from megatron_srpo.run.generation import GroupGenerator, Requests, replay_mode, training_sampling

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

    def chat_options(self) -> Mapping[str, object]:
        """The arguments of the chat template, on rank 0."""

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

    def __init__(self, config: Config, *, splits: tuple[str, ...]) -> None:
        from megatron_srpo.data import PromptLoader
        from megatron_srpo.run.prompting import Prompting

        self._config = config
        self.log: Log = _ConsoleLog()
        self._prompting = Prompting(config)
        self._prompts = {split: self._prompting.prompts(split, self.log.message) for split in splits}
        self._loaders = [
            PromptLoader(prompts, config.rollout.rollout_batch_size, seed=config.run.seed, shuffle=config.data.shuffle)
            for split, prompts in self._prompts.items()
            if split == "train"
        ]

        self._histories: Histories = PromptHistories() if config.algorithm.needs.history else NoHistories()

    def kinds(self) -> set[str]:
        return {prompt.kind for prompts in self._prompts.values() for prompt in prompts}

    def prompts(self, split: str) -> list[Prompt]:
        return self._prompts.get(split, [])

    def chat_options(self) -> Mapping[str, object]:
        return self._prompting.chat_options

    def restore_data(self, restore: RestoreData, state: State) -> None:
        for loader in self._loaders:
            restore(loader, state)
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
        loader: PromptLoader | Prefetcher
        generating: RolloutEngine | Prefetcher = engine
        (loader,) = self._loaders
        if config.rollout.max_staleness:
            generating = loader = Prefetcher(
                cast("AsyncEngine", engine), loader, requests, sampling, batches=config.rollout.max_staleness,
                start=start, total=config.run.iterations,
            )  # fmt: skip
        return DriverSource(
            config, control, GroupGenerator(generating, scorer, requests, sampling), loader,
            self._prompting.teacher_prompt, self._histories, self.log, dp_size=dp_size, padding=padding,
            engine_metrics=generating.metrics, experts=sampling.experts, handover=handover,
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

    def chat_options(self) -> Mapping[str, object]:
        return {}

    def restore_data(self, restore: RestoreData, state: State) -> None: ...

    def open_log(self, start: int, state: State) -> None: ...

    def source(
        self, control: RoleControl, engine: RolloutEngine, scorer: Scorer, *, start: int, dp_size: int,
        padding: Padding, handover: Handover,
    ) -> FollowerSource:  # fmt: skip
        generate = GroupGenerator(engine, scorer, _requests(self._config), _sampling(self._config))
        return FollowerSource(control, generate)

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
