"""Responses that go on in the next iteration (rollout.partial_tokens), so that the longest one does not decide how long
an iteration takes. Rank 0 keeps the groups under way in a pool:

    iteration             k                  k + 1                 k + 2
    a short group         ▒▒▒▒ trained
    a long group          ▒▒▒▒▒▒▒▒▒▒ ┆       ▒▒▒▒▒▒▒▒▒▒ ┆          ▒▒▒ trained: its first tokens are two publishes old
    started in k + 1                         ▒▒▒▒▒▒▒ trained

An iteration starts groups until rollout_batch_size + partial_groups are under way. Its rounds give every unfinished
response up to partial_tokens tokens. They end when rollout_batch_size groups are complete, among them all that may wait
no longer; these groups are trained. Nothing is thrown away. Rounds count tokens, not seconds, so that a repeated or
resumed run makes the same choices.
"""

from __future__ import annotations

import base64
import io
import math
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from typing import Any, NamedTuple, NotRequired, Protocol, TypedDict, cast

import numpy as np

from megatron_srpo.config import RolloutConfig
from megatron_srpo.core.errors import UserError
from megatron_srpo.core.protocols import State
from megatron_srpo.core.records import Attempt, Experts, Group, Prompt, Reward, Rollout
from megatron_srpo.rollout.engine import experts_of_turns


class Part(NamedTuple):
    """What one response is to be continued from."""

    prompt: int  # index among the prompts of the pool
    sample: int
    seed: int
    begun: array[int]  # the response so far


class OneByOne(Protocol):
    """Draws prompts, one at a time."""

    @property
    def prompts(self) -> Sequence[Prompt]: ...

    @property
    def epoch(self) -> int: ...

    def next_batch(self) -> list[Prompt]: ...

    def state_dict(self) -> State: ...

    def load_state_dict(self, state: State) -> None: ...


@dataclass
class _UnderWay:
    """A group, from its draw until it is trained."""

    prompt: Prompt
    seeds: dict[int, int]  # sample → seed, of the responses that are not complete
    version: int | None = None  # of the weights that sampled its first tokens; None: it has none yet
    begun: dict[int, Rollout] = field(default_factory=dict)  # by sample: the responses so far that are not complete
    complete: list[Rollout] = field(default_factory=list)  # not scored yet
    attempts: list[Attempt] = field(default_factory=list)  # complete and scored

    def add(self, rollout: Rollout) -> None:
        """The next part of a response."""
        whole = joined(self.begun.pop(rollout.sample, None), rollout)
        if rollout.finish_reason == "part":
            self.begun[rollout.sample] = whole
        else:
            self.complete.append(whole)
            del self.seeds[rollout.sample]

    @property
    def tokens(self) -> int:
        """Of all its responses so far."""
        rollouts = [*self.begun.values(), *(attempt.rollout for attempt in self.attempts)]
        return sum(len(rollout.token_ids) for rollout in rollouts)


class PartialPool:
    """The groups under way, the oldest first. It replaces the prompt loader, which it wraps.

    `seeds` is (prompt, iteration, again) → the seeds of its samples, for the iteration that would draw the prompt
    without partial rollouts, and that has drawn it `again` times before. Set `iteration` to that of the run, from
    0, before the first draw. No group is started that iteration `total` or a later one would train.
    """

    def __init__(
        self, loader: OneByOne, seeds: Callable[[Prompt, int, int], list[int]], rollout: RolloutConfig, *, total: int
    ) -> None:  # fmt: skip
        self._loader, self._seeds, self._settings, self._total = loader, seeds, rollout, total
        self._batch, self._size = rollout.rollout_batch_size, rollout.rollout_batch_size + rollout.extra_groups
        self._groups: list[_UnderWay] = []
        self._drawn = 0  # groups so far
        self._seen: Counter[str] = Counter()  # by uid, of the batch that is being drawn
        self._rounds = 0  # of this iteration
        self._metrics: dict[str, float] = {}
        self.iteration = 0

    # ---- the loader ----

    @property
    def epoch(self) -> int:
        return self._loader.epoch

    def next_batch(self) -> list[Prompt]:
        """The prompts of all groups under way, those that this iteration starts included."""
        self._rounds = 0
        self._drawn = max(self._drawn, self.iteration * self._batch)  # of a run that went on without a pool
        while len(self._groups) < min(self._size, (self._total - self.iteration) * self._batch):
            (prompt,) = self._loader.next_batch()
            if self._drawn % self._batch == 0:
                self._seen.clear()
            seeds = self._seeds(prompt, self._drawn // self._batch, self._seen[prompt.uid])
            self._seen[prompt.uid] += 1
            self._groups.append(_UnderWay(prompt, dict(enumerate(seeds))))
            self._drawn += 1
        return [group.prompt for group in self._groups]

    # ---- rounds ----

    def next_round(self, rollouts: Sequence[Rollout]) -> list[Part]:
        """Take the answers to the last round, and say what to ask in the next one; [] ends the iteration's rounds."""
        for rollout in rollouts:
            self._groups[rollout.prompt].add(rollout)
        done = [not group.seeds for group in self._groups]
        if sum(done) >= min(self._batch, len(done)) and all(done[: self._due()]):
            return []
        self._rounds += 1
        parts = []
        for place, group in enumerate(self._groups):
            if group.version is None:
                group.version = self.iteration
            for sample, seed in group.seeds.items():
                begun = group.begun[sample].token_ids if sample in group.begun else array("i")
                parts.append(Part(place, sample, seed, begun))
        return parts

    def _due(self) -> int:
        """How many groups, the oldest ones, must be trained now. A group that may wait for n more iterations leaves
        room for n batches before it. Those that do not fit there are due, so that never more than a batch is."""
        crowded = (
            place + 1 - self._batch * max(0, self._settings.max_staleness - self._age(group))
            for place, group in enumerate(self._groups)
        )
        return max(0, min(self._batch, max(crowded, default=0)))

    def _age(self, group: _UnderWay) -> int:
        return 0 if group.version is None else self.iteration - group.version

    @property
    def complete(self) -> list[Rollout]:
        """Responses that were completed and not scored yet."""
        return [rollout for group in self._groups for rollout in group.complete]

    def take(self, scored: Sequence[Group]) -> list[Group]:
        """End the iteration: the groups to train, the oldest complete ones. `scored`: the attempts of `complete`, in
        one group for each prompt of the pool."""
        for mine, theirs in zip(self._groups, scored, strict=True):
            mine.attempts += theirs.attempts
            mine.complete = []
        trained = [group for group in self._groups if not group.seeds][: self._batch]
        chosen = {id(group) for group in trained}
        self._groups = [group for group in self._groups if id(group) not in chosen]
        found = [Group(group.prompt, sorted(group.attempts, key=lambda a: a.rollout.sample)) for group in trained]
        for place, group in enumerate(found):
            for attempt in group.attempts:
                rollout = attempt.rollout
                rollout.prompt = place
                # Only after a resume with another bound.
                rollout.stale = self.iteration - rollout.weight_version > self._settings.max_staleness
        self._measure([attempt.rollout for group in found for attempt in group.attempts])
        self.iteration += 1
        return found

    def _measure(self, rollouts: Sequence[Rollout]) -> None:
        ages = [self.iteration - rollout.weight_version for rollout in rollouts]
        tokens = sum(len(rollout.token_ids) for rollout in rollouts)
        fresh = sum(versions_of(rollout).count(self.iteration) for rollout in rollouts)
        self._metrics = {
            "rollout/staleness_mean": math.fsum(ages) / max(1, len(ages)),
            "rollout/staleness_max": max(ages, default=0),
            "rollout/older_token_fraction": 1 - fresh / max(1, tokens),
            "rollout/rounds": self._rounds,
            "rollout/groups_under_way": len(self._groups),
            "rollout/carried_tokens": sum(group.tokens for group in self._groups),
        }

    def metrics(self) -> dict[str, float]:
        """Of the last iteration."""
        return self._metrics

    # ---- checkpoints ----

    def state_dict(self) -> State:
        """The loader's state, and the groups under way: about 11 bytes of JSON for a token, and 1.3 for each byte of
        its experts."""
        groups = [_saved(group) for group in self._groups]
        return {
            **self._loader.state_dict(),
            UNDER_WAY: {"drawn": self._drawn, "seen": dict(self._seen), "groups": groups},
        }

    def load_state_dict(self, state: State) -> None:
        """Go on where `state` was taken; without a pool in it, start with an empty one."""
        self._loader.load_state_dict(state)
        self._groups, self._drawn, self._seen = [], 0, Counter()
        if UNDER_WAY in state:
            saved = cast("_SavedPool", state[UNDER_WAY])
            self._drawn, self._seen = saved["drawn"], Counter(saved.get("seen", {}))
            prompts = {prompt.uid: prompt for prompt in self._loader.prompts}
            self._groups = [self._restored(group, prompts[group["uid"]]) for group in saved["groups"]]

    def _restored(self, saved: _SavedGroup, prompt: Prompt) -> _UnderWay:
        begun = {part["sample"]: _loaded_rollout(part) for part in saved["begun"]}
        longest, limit = max((len(part.token_ids) for part in begun.values()), default=0), self._settings
        if longest >= limit.max_response_length:
            raise UserError(
                f"rollout.max_response_length = {limit.max_response_length}: the checkpoint has a response under way "
                f"of {longest} tokens; set it to more than that"
            )
        attempts = [_loaded_attempt(attempt) for attempt in saved["attempts"]]
        return _UnderWay(prompt, dict(saved["open"]), saved["version"], begun, attempts=attempts)


def under_way(state: State) -> int:
    """How many groups a loader's state has under way."""
    return len(cast("_SavedPool", state[UNDER_WAY])["groups"]) if UNDER_WAY in state else 0


def joined(begun: Rollout | None, part: Rollout) -> Rollout:
    """A response with its next part, whose `text` is that of the whole."""
    if begun is None:
        return part
    versions = versions_of(begun) + versions_of(part)
    return replace(
        part, token_ids=begun.token_ids + part.token_ids, logprobs=begun.logprobs + part.logprobs,
        weight_version=begun.weight_version, token_versions=versions if versions[0] != versions[-1] else None,
        trained=np.zeros(0, dtype=bool), drafted=begun.drafted + part.drafted, accepted=begun.accepted + part.accepted,
        experts=None if part.experts is None or begun.experts is None  # rollout.routing_replay was changed meanwhile
        else experts_of_turns([_experts(begun), _experts(part)]),
    )  # fmt: skip


def _experts(rollout: Rollout) -> Experts:
    assert isinstance(rollout.experts, np.ndarray), "one sequence, and the engine was asked for its experts"
    return rollout.experts


def versions_of(rollout: Rollout) -> list[int]:
    """[len(token_ids)] the publish behind each token."""
    return rollout.token_versions or [rollout.weight_version] * len(rollout.token_ids)


# ---- as JSON: token ids and log-probs are base64 of 4 bytes a value, so that a log-prob keeps its bits ---------------

UNDER_WAY = "under_way"


class _SavedRollout(TypedDict):
    sample: int
    token_ids: str
    logprobs: str
    versions: list[tuple[int, int]]  # a version, and how many tokens in a row have it
    text: str
    finish_reason: str
    experts: str | None  # base64 of a .npy file


class _SavedAttempt(TypedDict):
    rollout: _SavedRollout
    reward: dict[str, Any]  # of Reward
    correct: bool


class _SavedGroup(TypedDict):
    uid: str
    version: int | None
    open: list[tuple[int, int]]  # sample and seed of those that are not complete
    begun: list[_SavedRollout]
    attempts: list[_SavedAttempt]


class _SavedPool(TypedDict):
    drawn: int
    seen: NotRequired[dict[str, int]]
    groups: list[_SavedGroup]


def _saved(group: _UnderWay) -> _SavedGroup:
    assert not group.complete, "a checkpoint is taken between iterations, when everything complete is scored"
    return {
        "uid": group.prompt.uid,
        "version": group.version,
        "open": list(group.seeds.items()),
        "begun": [_saved_rollout(rollout) for rollout in group.begun.values()],
        "attempts": [
            {"rollout": _saved_rollout(attempt.rollout), "reward": asdict(attempt.reward), "correct": attempt.correct}
            for attempt in group.attempts
        ],
    }


def _saved_rollout(rollout: Rollout) -> _SavedRollout:
    return {
        "sample": rollout.sample,
        "token_ids": base64.b64encode(rollout.token_ids.tobytes()).decode(),
        "logprobs": base64.b64encode(rollout.logprobs.tobytes()).decode(),
        "versions": [(version, len(list(run))) for version, run in groupby(versions_of(rollout))]
        or [(rollout.weight_version, 0)],
        "text": rollout.text,
        "finish_reason": rollout.finish_reason,
        "experts": None if rollout.experts is None else _packed(_experts(rollout)),
    }


def _packed(values: Experts) -> str:
    file = io.BytesIO()
    np.save(file, values, allow_pickle=False)
    return base64.b64encode(file.getvalue()).decode()


def _unpacked(text: str) -> Experts:
    return cast("Experts", np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False))


def _loaded_rollout(saved: _SavedRollout) -> Rollout:
    runs = saved["versions"]
    versions = [version for version, count in runs for _ in range(count)]
    return Rollout(
        0, saved["sample"], array("i", base64.b64decode(saved["token_ids"])),
        array("f", base64.b64decode(saved["logprobs"])), saved["text"], saved["finish_reason"], runs[0][0],
        token_versions=versions if len(runs) > 1 else None,
        experts=None if saved["experts"] is None else _unpacked(saved["experts"]),
    )  # fmt: skip


def _loaded_attempt(saved: _SavedAttempt) -> Attempt:
    return Attempt(_loaded_rollout(saved["rollout"]), Reward(**saved["reward"]), saved["correct"])
