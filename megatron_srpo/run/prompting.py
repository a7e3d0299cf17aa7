"""The prompts of a run on rank 0: loaded, rendered, checked against the model and the rewards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from megatron_srpo.config import Config, read_model_folder
from megatron_srpo.config.check import teacher_prompt_limit
from megatron_srpo.core.errors import ConfigError, nearest
from megatron_srpo.core.restarts import begins_anew
from megatron_srpo.core.text import clause
from megatron_srpo.run.first_start import first_start

# What the rewards look for in a response's text, by kind; a user's own function may look for any of it.
MARKS = {
    "mcq": ("<answer>", "</answer>"),
    "reasoning_gym": ("<answer>", "</answer>"),
    "tooluse": ("Action:", "Action Input:", "</think>"),
    "math": ("\\boxed",),
}
OWN = ("<answer>", "</answer>", "<think>", "</think>", "<tool_call>", "</tool_call>", "\\boxed")


class Prompting:
    """Tokenizer, prompts and teacher prompts. `trains`: of a training run, which keeps the date of its first start for
    itself and for evaluations."""

    def __init__(self, config: Config, *, trains: bool = False) -> None:
        from megatron_srpo.data import TeacherPromptBuilder, load_tokenizer

        self._config = config
        self.tokenizer = load_tokenizer(config.model.tokenizer or config.model.path)
        self._data = config.data
        if "strftime_now" in str(self.tokenizer.chat_template):  # the template writes today's date
            folder = Path(config.run.output_dir)
            anew = trains and begins_anew(folder, resume=config.checkpoint.resume)
            day = first_start(folder, anew=anew, keep=trains)
            options = {"strftime_now": day.strftime, **config.data.chat_template_kwargs}
            self._data = config.data.model_copy(update={"chat_template_kwargs": options})
        self.teacher_prompt = TeacherPromptBuilder(self.tokenizer, config.teacher, self._data, 0)
        self.teacher_prompt.limit = teacher_prompt_limit(
            config, read_model_folder(config.model.path), self.teacher_prompt.words("solution", "feedback")
        )

    @property
    def chat_options(self) -> Mapping[str, object]:
        """The arguments of the chat template."""
        return self._data.chat_template_kwargs

    @property
    def opening(self) -> str:
        """ "<think>" if the chat template begins the model's thinking, else ""."""
        from megatron_srpo.data import DataError
        from megatron_srpo.data.prompts import opened_thinking, render_chat

        try:
            text = render_chat(self.tokenizer, [{"role": "user", "content": "a"}], self.chat_options, "a chat")
        except DataError:  # it wants something else than one message; rows that it refuses are told with their place
            return ""
        return opened_thinking(self.tokenizer, text)

    def prompts(self, split: str, say: Callable[[str], None]) -> list:
        """The prompts of one split, those over length dropped or refused."""
        from megatron_srpo.data import load_rows, render_prompts
        from megatron_srpo.data.prompt_cache import FOLDER

        files = self._config.data.train if split == "train" else self._config.data.test
        if not files:
            raise ConfigError(
                f"data.{split} is empty: name the file of the {split} split"
                + (", or evaluate the training data with --split train" if split == "test" else "")
            )
        examples, report = load_rows(files, self._config.data, self._problem)
        folder = Path(self._config.run.output_dir)
        cache = folder / FOLDER if folder.is_dir() else None  # `check` leaves nothing behind
        prompts, dropped = render_prompts(examples, self.tokenizer, self._data, split, cache)
        self._check_vocabulary(max(max(prompt.token_ids) for prompt in prompts))
        self._check_kinds(prompts)
        say(f"data: {len(prompts)} {split} prompts ({report}; {dropped} over length)")
        if split == "train":
            self._check_solutions(prompts)
            self._check_teacher_room(prompts)
        for warning in self._warnings(prompts, split):
            say(f"warning: {warning}")
        return prompts

    def without_teacher(self, prompts: list) -> list:
        """The prompts whose teacher can be shown nothing, because the question and the words of the templates fill the
        whole teacher prompt."""
        teaching = self._config.algorithm.teaching
        sources = set(teaching.sources) if teaching is not None else {"none"}
        if "none" in sources:  # a teacher that reads the question alone
            return []
        section = "feedback" if sources == {"feedback"} else "solution"
        longest = self.teacher_prompt.limit - self.teacher_prompt.words(section) - 1
        return [prompt for prompt in prompts if len(prompt.token_ids) > longest]

    def _check_solutions(self, prompts: list) -> None:
        key = self._config.data.solution_key
        if key and not any(prompt.solution for prompt in prompts):
            fields = sorted({name for prompt in prompts for name in prompt.metadata})
            raise ConfigError(
                f'data.solution_key = "{key}": no train row has a solution in this field, so the teacher source '
                f'"solution" would teach nobody. Other fields of the rows: {", ".join(fields)[:200] or "none"}'
            )

    def _check_teacher_room(self, prompts: list) -> None:
        if len(self.without_teacher(prompts)) == len(prompts):
            shortest = min(len(prompt.token_ids) for prompt in prompts)
            words, limit = self.teacher_prompt.words("solution"), self.teacher_prompt.limit
            key = "teacher.max_prompt_length" if self._config.teacher.max_prompt_length else "train.max_tokens_per_gpu"
            raise ConfigError(
                f"a teacher prompt may have {limit} tokens ({key}). The templates of [teacher] take {words} of them "
                f"and the shortest train prompt {shortest}, so no demonstration fits and nothing would be distilled. "
                f"Raise {key}, or shorten teacher.template, teacher.solution_section and teacher.instruction"
            )

    def _problem(self, kind: str, answer: object) -> str | None:
        """Why the reward cannot read a row's answer."""
        from megatron_srpo.rewards.answers import unreadable

        environment = self._config.environment.classes.get(kind)
        if environment == "python":
            from megatron_srpo.environments.code import read_tests

            try:
                read_tests(answer)
            except ValueError as error:
                return str(error)
        if environment is not None:
            return None
        return unreadable(kind, answer, self._config.reward.functions)

    def _check_kinds(self, prompts: list) -> None:
        from megatron_srpo.rewards.registry import RewardError, unknown

        for prompt in {prompt.kind: prompt for prompt in reversed(prompts)}.values():
            problem = unknown(prompt.kind, self._config.reward.functions)
            environment = self._config.environment.classes.get(prompt.kind)
            if problem and environment == "tools":
                raise RewardError(
                    f'{prompt.source}: the environment "tools" gives no reward, and {clause(problem)}. Name a function '
                    f"that scores the last turn: reward.functions.{prompt.kind}"
                )
            if problem and environment is None:  # others give the rewards themselves
                raise RewardError(f"{prompt.source}: {problem}")

    def _warnings(self, prompts: list, split: str) -> Iterator[str]:
        from megatron_srpo.data import hides_system

        batch = self._config.rollout.rollout_batch_size
        if split == "train" and len(prompts) < batch:
            yield (
                f"rollout.rollout_batch_size = {batch} is more than the {len(prompts)} train prompts: a batch has some "
                "of them more than once, as groups of their own"
            )
        kinds = sorted({prompt.kind for prompt in prompts})
        for kind in self._config.environment.classes if split == "train" else ():
            if kind not in kinds:
                yield (
                    f"environment.classes.{kind} is not used: no train row is of this kind, they are of "
                    f"{', '.join(kinds)}.{nearest(kind, kinds)}"
                )
        unfit = self.without_teacher(prompts) if split == "train" else []
        if unfit:
            yield (
                f"{len(unfit)} of {len(prompts)} train prompts cannot be distilled: the question and the words of the "
                f"templates fill the whole teacher prompt of {self.teacher_prompt.limit} tokens. The first of them is "
                f"{unfit[0].source}. Raise teacher.max_prompt_length and train.max_tokens_per_gpu"
            )
        instructed = [prompt for prompt in prompts if prompt.messages[0]["role"] == "system"]
        # One is enough: they share the template, and rendering all of a large data set again takes minutes.
        if instructed and hides_system(self.tokenizer, instructed[0], self._data):
            yield (
                f"the tokenizer's chat template leaves out the system message, which {len(instructed)} {split} prompts "
                f"have, the first of them {instructed[0].source}: the model will not see it"
            )

        yield from self._unseen_marks({prompt.kind for prompt in prompts})
        unknown = self.tokenizer.unk_token_id
        unread = [prompt for prompt in prompts if unknown is not None and unknown in prompt.token_ids]
        if unread:
            yield (
                f"{len(unread)} {split} prompts have characters that the tokenizer does not know, the first of them "
                f"{unread[0].source}: the model reads {self.tokenizer.unk_token} in their place"
            )

    def _unseen_marks(self, kinds: set[str]) -> Iterator[str]:
        """A warning where rewards look for a special token: their text is decoded without them."""
        special = set(self.tokenizer.all_special_tokens)
        for kind in sorted(kinds):
            own = kind in self._config.reward.functions
            unseen = sorted(special.intersection(OWN if own else MARKS.get(kind.replace("-", "_"), ())))
            if unseen:
                yield (
                    f"the tokenizer has {', '.join(unseen)} as special tokens, and rewards read responses without "
                    f'special tokens: the reward of kind "{kind}" will never see them. Set "special": false for them '
                    "in the tokenizer's tokenizer.json and tokenizer_config.json"
                )

    def _check_vocabulary(self, largest: int) -> None:
        """A tokenizer of another model gives ids that the model has no embedding for."""
        model = self._config.model
        size = read_model_folder(model.path)["vocab_size"]
        if largest >= size:
            raise ConfigError(
                f"the tokenizer in {model.tokenizer or model.path} gives token id {largest}, and the model in "
                f"{model.path} has vocab_size = {size}: use the model's own tokenizer (model.tokenizer)"
            )
