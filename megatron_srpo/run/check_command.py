"""`check CONFIG`: what a run would train on, before any rank or GPU is used. It loads the data, shows prompts, calls
the rewards on made-up responses, and predicts the memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_srpo.algorithms.base import SelfTeaching
from megatron_srpo.config import Config, listed, read_model_folder
from megatron_srpo.core.environment import unset_variables
from megatron_srpo.core.errors import ConfigError
from megatron_srpo.core.records import Prompt, Reward
from megatron_srpo.core.text import causes, visible
from megatron_srpo.rewards import RewardPool, RewardTask
from megatron_srpo.rewards.made_up import forms
from megatron_srpo.rewards.registry import unknown

if TYPE_CHECKING:
    from megatron_srpo.algorithms.base import SourceName
    from megatron_srpo.run.check_environments import Reading
    from megatron_srpo.run.prompting import Prompting

MOST = 32  # prompts of a kind whose rewards are called
PATIENCE = 20.0  # seconds that the rewards of one made-up form may take; fewer prompts are tried of a slow function
SAME_ANSWER = "not tried, because these rows all have the same answer; check data.answer_key"
SHOWN = 2000  # characters of a prompt that are shown
RULE = "-" * 60
GIB = 2**30
Say = Callable[[str], None]


@dataclass
class KindReport:
    """What the reward of one kind gives to made-up responses."""

    kind: str
    form: str  # of the responses that have the answer
    tried: int
    right: int  # responses with the answer itself that are correct
    empty: Reward
    wrong: list[tuple[Reward, bool]]  # of responses with another row's answer; whether it counts as correct
    error: str  # why rewards failed, or ""
    seconds: float  # of one reward

    def problems(self) -> Iterator[str]:
        """A line for everything that would spoil the training."""
        function = f"reward.functions.{self.kind}"
        if self.right == 0:
            yield (
                f'kind "{self.kind}": a response that is the reference answer itself is not correct in any of '
                f"{self.tried} rows (tried: {self.form}). Check data.answer_key, {function} and "
                "algorithm.success_reward_threshold" + (f"; the function failed: {self.error}" if self.error else "")
            )
        failed = [reward.error for reward in (self.empty, *(reward for reward, _ in self.wrong)) if reward.error]
        if self.right and failed:
            yield (
                f'kind "{self.kind}": {function} failed for {len(failed)} of {1 + len(self.wrong)} wrong responses, '
                f"the first time with {failed[0]}. Such a response gets reward.failure_score; return a reward for it"
            )
        if self.wrong and all(correct for _, correct in self.wrong):
            yield (
                f'kind "{self.kind}": a response with the answer of another row is correct in all of {len(self.wrong)} '
                f"rows; {function} must tell answers apart"
            )

    def __str__(self) -> str:
        wrong = sum(correct for _, correct in self.wrong)
        others = f"correct in {wrong} of {len(self.wrong)} rows" + (
            f"; the first: {_reward(self.wrong[0][0])}" if self.wrong else ""
        )
        lines = [
            f"  the answer itself, as {self.form}: correct in {self.right} of {self.tried} rows",
            f"  an empty response: {_reward(self.empty)}",
            f"  the answer of another row: {others if self.wrong else SAME_ANSWER}",
            f"  one reward takes {1000 * self.seconds:.1f} ms",
        ]
        return "\n".join(lines)


def check(config: Config, *, gpus: int, gpu: str, say: Say = print) -> int:
    """Print everything; returns 0. ConfigError if a run of this configuration could not learn."""
    from megatron_srpo.run.prompting import Prompting

    problems: list[str] = []
    if config.lora.path:
        from megatron_srpo.bridge.peft_folder import check_adapter

        check_adapter(config.lora.path, read_model_folder(config.model.path), config.lora)
    prompting = Prompting(config)
    prompts = prompting.prompts("train", say)
    _say_lengths(config, prompts, say)
    if config.data.test:
        prompting.prompts("test", say)
    kinds: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        kinds.setdefault(prompt.kind, []).append(prompt)
    readings: dict[str, Reading] = {}
    if config.environment.classes:
        from megatron_srpo.run.check_environments import first_readings

        readings, found = first_readings(
            config, prompting.tokenizer, prompting.chat_options, prompts, prompting.teacher_prompt, say
        )
        problems += found
    for line in unset_variables("reward.environment", config.reward.environment):
        say(f"\nwarning: {line}")
    reward = config.reward.model_copy(update={"workers": 1})
    with RewardPool(reward, {kind for kind in kinds if unknown(kind, config.reward.functions) is None}) as pool:
        for kind, group in kinds.items():
            say(f'\nkind "{kind}": {len(group)} train prompts')
            _show_prompt(config, prompting, group[0], say)
            if kind in readings:
                reading = readings[kind]
                say(f"what an episode with its environment begins with ({len(reading.first)} tokens):")
                _show(prompting.tokenizer.decode(reading.first), say)
                if reading.teacher:
                    say("what its teacher reads before turn 2, if a reward gives feedback on both turns:")
                    _show(prompting.tokenizer.decode(reading.teacher), say)
            if unknown(kind, config.reward.functions):
                failed = "its environment has failed, so its rewards could not be looked at; the reason is below"
                say("its environment gives the rewards" if kind in readings else failed)
                continue
            report = examine(pool, group, own=kind in config.reward.functions, threshold=threshold(config), say=say)
            say(str(report))
            if kind not in config.reward.functions and (unasked := _unasked(kind, group, prompting)):
                say(f"  warning: {unasked}")
            problems += report.problems()
            if report.empty.error is None and report.empty.score >= threshold(config):
                problems.append(f'kind "{kind}": an empty response is correct; the reward must look at the response')
    for line in memory_lines(config, prompts, gpus, gpu):
        say(line)
    if problems:
        raise ConfigError(listed("this run", problems))
    say("\nno problem found")
    return 0


def threshold(config: Config) -> float:
    """The reward from which a response counts as correct."""
    return config.algorithm.success_reward_threshold


def examine(
    pool: RewardPool, prompts: Sequence[Prompt], *, own: bool, threshold: float, say: Say = print
) -> KindReport:
    """Call the reward of these prompts, which are of one kind, on made-up responses."""
    chosen, tries = _spread(prompts, MOST), forms(prompts[0].kind, own=own)
    for _ in range(2):  # a first call may load something, so only the second one shows that the function is slow
        started = time.perf_counter()
        (empty,) = pool.score([_task(chosen[0], "")])
        first = time.perf_counter() - started
        if first <= 1:
            break
    if first > 1:
        chosen = _spread(prompts, max(2, min(MOST, int(PATIENCE / first))))
        longest = first * len(chosen) * (len(tries) + 1)
        say(f"  one reward takes {first:.0f} s, so {len(chosen)} rows are tried, for up to {longest:.0f} s")
    tried = []
    for name, form in tries:
        started = time.perf_counter()
        rewards = pool.score([_task(prompt, form(prompt.answer)) for prompt in chosen])
        seconds = (time.perf_counter() - started) / len(chosen)
        right = sum(reward.error is None and reward.score >= threshold for reward in rewards)
        tried.append((right, name, form, rewards, seconds))
        if right == len(chosen):
            break
    right, name, form, rewards, seconds = max(tried, key=lambda one: one[0])
    wrong = pool.score([_task(prompt, form(other)) for prompt, other in _others(chosen)])
    return KindReport(
        kind=chosen[0].kind,
        form=name if right else ", ".join(one[1] for one in tried),
        tried=len(chosen),
        right=right,
        empty=empty,
        wrong=[(reward, reward.error is None and reward.score >= threshold) for reward in wrong],
        error=causes(reward.error for reward in rewards if reward.error),
        seconds=seconds,
    )


def _spread(prompts: Sequence[Prompt], most: int) -> Sequence[Prompt]:
    """Up to this number of prompts, taken at equal distances."""
    return prompts[:: max(1, len(prompts) // most)][:most]


def _unasked(kind: str, prompts: Sequence[Prompt], prompting: Prompting) -> str | None:
    """A warning if no prompt says how the reward reads the answer: verl's GSM8K asks for `#### 72` and DAPO for
    `Answer: 72`, so that a model that does as it is told would get no reward."""
    from megatron_srpo.run.prompting import MARKS

    mark = MARKS.get(kind.replace("-", "_"), ("",))[0]
    texts = (prompting.tokenizer.decode(list(prompt.token_ids)) for prompt in prompts[:MOST])
    if not mark or any(mark in text for text in texts):
        return None
    return (
        f"the reward looks for {mark}, which no prompt of this kind mentions. If the model does not write it by "
        'itself, say so in the prompts or in the system message: data.system_key, or prepare-data convert --system "…"'
    )


def _others(prompts: Sequence[Prompt]) -> Iterator[tuple[Prompt, object]]:
    """Each prompt with the answer of the next row that has another one."""
    for number, prompt in enumerate(prompts):
        rest = [*prompts[number + 1 :], *prompts[:number]]
        other = next((one.answer for one in rest if one.answer != prompt.answer), None)
        if other is not None:
            yield prompt, other


def _task(prompt: Prompt, response: str) -> RewardTask:
    return RewardTask(prompt.kind, response, prompt.answer, prompt.metadata)


def _reward(reward: Reward) -> str:
    if reward.error:
        return f"failed ({reward.error})"
    return f"reward {reward.score:g}" + (f", feedback {reward.feedback[:200]!r}" if reward.feedback else "")


def _say_lengths(config: Config, prompts: Sequence[Prompt], say: Say) -> None:
    lengths = [len(prompt.token_ids) for prompt in prompts]
    say(
        f"a prompt has {min(lengths)} to {max(lengths)} tokens, the median {statistics.median(lengths):g}; "
        f"data.max_prompt_length = {config.data.max_prompt_length}, rollout.max_response_length = "
        f"{config.rollout.max_response_length}, a row has room for {config.row_budget}"
    )


def _show_prompt(config: Config, prompting: Prompting, prompt: Prompt, say: Say) -> None:
    say(f"the first prompt, {prompt.source}, as the model reads it ({len(prompt.token_ids)} tokens):")
    _show(prompting.tokenizer.decode(list(prompt.token_ids)), say)
    say(f"its reference answer: {prompt.answer!r:.300}")
    if not config.algorithm.needs.teacher:
        return
    _, form = forms(prompt.kind, own=prompt.kind in config.reward.functions)[0]
    made_up = f"(a made-up response) {form(prompt.answer)}"
    # Of each source: its condition, the solution and the feedback that the teacher reads.
    sources: dict[SourceName, tuple[str, str | None, str | None]] = {
        "sibling": ("if a sibling is correct", made_up, None),
        "solution": ("with the row's reference solution", prompt.solution or None, None),
        "memory": ("if an earlier response was correct", made_up, None),
        "feedback": ("if the reward gives feedback", None, "(made-up feedback)"),
        "none": ("which is the prompt itself", None, None),
    }
    algorithm = config.algorithm
    assert isinstance(algorithm, SelfTeaching), "only these need a teacher"
    first = next((name for name in algorithm.sources if name != "solution" or prompt.solution), None)
    if first is None:
        say("the first row has no reference solution, and no other teacher is configured")
        return
    condition, solution, feedback = sources[first]
    if first == "none":
        say(f"what its teacher reads, {condition}")
        return
    shown, limit = prompting.teacher_prompt(prompt, solution, feedback), prompting.teacher_prompt.limit
    if shown is None:
        say(f"no teacher prompt fits: the limit is {limit} tokens")
        return
    say(f"what its teacher reads, {condition} ({len(shown.ids)} of {limit} tokens):")
    _show(prompting.tokenizer.decode(list(shown.ids)), say)


def _show(text: str, say: Say) -> None:
    cut = len(text) - SHOWN
    middle = f"\n[… {cut} characters …]\n" if cut > 0 else ""
    say(f"{RULE}\n{visible(text[: SHOWN // 2] + middle + text[-SHOWN // 2 :] if cut > 0 else text)}\n{RULE}")


def memory_lines(config: Config, prompts: Sequence[Prompt], gpus: int, gpu: str) -> Iterator[str]:
    """What the planner predicts for this configuration, a line each."""
    from megatron_srpo.plan import Architecture, machine_of
    from megatron_srpo.plan.configuration import layout_of, own_engine_gpus, workload_of
    from megatron_srpo.plan.duration import rows_of
    from megatron_srpo.plan.memory import training_memory

    arch = Architecture.from_hf(read_model_folder(config.model.path))
    mean = round(statistics.fmean(len(prompt.token_ids) for prompt in prompts))
    rollout = config.rollout
    own = own_engine_gpus(config)
    layout = layout_of(config, gpus + own, own)
    workload = workload_of(config, prompt_mean=mean, response_mean=rollout.max_response_length)
    rows = rows_of(workload, layout, workload.student_tokens)
    plan = training_memory(
        arch, layout, workload, machine_of(gpu), rows=rows, logits_mib=config.train.logits_memory_mib
    )  # fmt: skip
    assumed = " (an assumption: run.device is cpu; --gpu names another)" if config.run.device == "cpu" else ""
    yield f"\nmemory of the fullest of {gpus} {gpu} GPUs{assumed}, predicted, in GiB ({layout.name()}):"
    for name, size in plan.lines.items():
        if size >= GIB / 100:
            yield f"  {name}: {size / GIB:.2f}"
    verdict = "it fits" if plan.fits else "IT DOES NOT FIT; python -m megatron_srpo plan finds layouts that do"
    yield f"  in all {plan.total / GIB:.1f} of {plan.limit / GIB:.1f}: {verdict}"
    yield from (f"  {note}" for note in plan.notes)
