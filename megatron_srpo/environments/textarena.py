"""The environment "textarena": single-player text games of the library textarena (pinned in the extra of that name).

The library has many dependencies. It may live in a virtual environment of its own, whose Python
`environment.interpreter` names. The game's seed is that of the group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import validate_call

from megatron_srpo.core.errors import UserError
from megatron_srpo.core.text import after_thinking, clause
from megatron_srpo.environments.base import Environment, Message, Step, Task


class TextArena(Environment):
    """One game. `game`: its name in the library, for example "GuessTheNumber-v0"; a row's field "game" wins over it.
    `options`: further arguments of textarena.make."""

    @validate_call
    def __init__(self, game: str = "", options: dict[str, Any] | None = None) -> None:
        self._name, self._options = game, options or {}
        self._seen = ""

    @classmethod
    def prepare(cls, **arguments: Any) -> None:
        """Import the library, which takes seconds."""
        try:
            import textarena  # noqa: F401
        except ImportError as error:
            raise UserError(
                f"environment textarena needs a package: {clause(error)}. Install it: pip install textarena==0.7.4, or "
                "name the Python of a virtual environment that has it: environment.interpreter"
            ) from error

    async def start(self, task: Task) -> Sequence[Message]:
        import textarena

        name = str(task.metadata.get("game") or self._name)
        try:
            self._game = textarena.make(name, **self._options)
        except Exception as error:  # the library raises what it likes
            raise UserError(
                f"textarena cannot make the game {name!r}: {type(error).__name__}: {clause(error)}. Name one of its "
                'games in the row\'s field "game" or the argument "game"'
            ) from error
        self._game.reset(num_players=1, seed=task.seed % 2**32)
        first = task.messages[:-1] if task.messages[0]["role"] == "system" else ()
        return [*first, {"role": "user", "content": self._observe()}]

    async def step(self, reply: str) -> Step:
        done, _ = self._game.step(after_thinking(reply).strip())
        if not done:
            return Step([{"role": "user", "content": self._observe()}])
        rewards, info = self._game.close()
        why = info.get(0, {}).get("reason") if isinstance(info, dict) else None
        return Step(done=True, reward=float((rewards or {}).get(0, 0.0)), feedback=why and str(why))

    def _observe(self) -> str:
        """What is new: games repeat everything that was said, and the conversation has it already."""
        _, observation = self._game.get_observation()
        text = observation if isinstance(observation, str) else "\n".join(str(part[1]) for part in observation)
        new = text.removeprefix(self._seen).strip()
        self._seen = text
        return new or "Go on."
