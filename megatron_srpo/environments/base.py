"""What an environment is: a class with two methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Message = dict[str, str]  # {"role": "user" or "tool", "content": text}


@dataclass(frozen=True)
class Task:
    """What an episode is about: one row of the data.

    Example: Task(({"role": "user", "content": "What is 17 * 25?"},), "425", {"level": 2}, seed=811, sample=3)
    """

    messages: tuple[Message, ...]
    answer: object
    metadata: Mapping[str, object]
    seed: int  # the same for all episodes of a group, which therefore begin alike
    sample: int  # which episode of the group it is


@dataclass
class Step:
    """What an environment answers to a turn of the model."""

    messages: Sequence[Message] = ()  # for the model's next turn; ignored at the end
    done: bool = False
    reward: float | None = None
    """The reward of the episode so far: the last one counts. None: the reward function of the row's kind scores the
    last turn."""
    feedback: str | None = None  # what was wrong, in words that may be shown to the teacher; the last one counts
    tool_calls: int = 0  # in this turn
    tool_errors: int = 0  # of them, those that could not be read or carried out
    turn_feedback: str | None = None
    """What was wrong in this turn alone (teacher.feedback_at = "turn"). None: `feedback`, if this step gives one."""


class Environment:
    """One episode. It is made anew for each episode, in a process of its own, and may keep what it likes in itself.

    The process has no other task, so methods may block; a method that takes too long, raises or ends the process costs
    its own episode. The arguments of the constructor come from `environment.arguments`.

        class Guess(Environment):
            async def step(self, reply):
                if reply.strip() == str(self.task.answer):
                    return Step(done=True, reward=1.0)
                return Step([{"role": "user", "content": "No, try again."}], reward=0.0)
    """

    @classmethod
    def prepare(cls, **arguments: object) -> None:
        """Called once, before any episode begins, with the constructor's arguments: what episodes share is imported
        here. UserError if the arguments cannot be used."""

    task: Task
    tools: Sequence[Mapping[str, object]] = ()
    """JSON schemas of functions, which the chat template shows to the model. Read after `start`."""

    async def start(self, task: Task) -> Sequence[Message]:
        """The first messages: by default those of the row. The last of them must be the user's."""
        self.task = task
        return task.messages

    async def step(self, reply: str) -> Step:
        """The answer to a turn of the model. `reply` is its text, with special tokens but without the end of turn.
        A `<think>` that the chat template has written before the turn belongs to it."""
        raise NotImplementedError(type(self).__name__)

    async def close(self) -> None:
        """Called at the end of the episode, also after an exception, but not if a step took too long. It has ten
        seconds, and what it raises is in the log alone."""
