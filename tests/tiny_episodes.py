"""Episodes of a tiny random model on a real engine: its letters, its chat templates, environments, and a judge."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_srpo.config import Config
from megatron_srpo.core.records import Prompt
from megatron_srpo.data import Chat
from megatron_srpo.environments.engine import EpisodeEngine
from megatron_srpo.environments.episodes import EpisodeRunner
from megatron_srpo.rollout import SamplingSettings
from megatron_srpo.run.generation import Requests
from tests.tiny_engines import Alone
from tests.tiny_models import make_tiny_model

LETTERS = 39  # tokens: three special ones, digits and small letters: one token in 39 ends a turn
# What was said stays as it was.
FAITHFUL = (
    "{% for t in tools or [] %}t{{ t.function.name }}<eos>{% endfor %}"
    "{% for m in messages %}{{ m.role[0] }}{{ m.content }}<eos>{% endfor %}{% if add_generation_prompt %}a{% endif %}"
)
# Of earlier turns of the model only what follows the last z stays, as templates drop what thinking models thought.
FORGETFUL = FAITHFUL.replace(
    "{{ m.content }}", "{{ m.content.split('z')[-1] if m.role == 'assistant' else m.content }}"
)

ENVIRONMENTS = '''
import asyncio, os, random, time
from megatron_srpo.environments import Environment, Step


class Turns(Environment):
    """Asks for another turn `turns` times, after a random wait; the reward is the share of digits in the replies."""

    def __init__(self, turns=3, wait=0.0, tools=False):
        self.left, self.wait, self.said = turns, wait, ""
        if tools:
            self.tools = [{"type": "function", "function": {"name": "count"}}]

    async def step(self, reply):
        await asyncio.sleep(random.random() * self.wait)
        self.left -= 1
        self.said += reply
        digits = sum(letter.isdigit() for letter in self.said) / max(1, len(self.said))
        more = [{"role": "user", "content": f"more{len(reply)}"}]
        return Step(more, self.left == 0, digits, f"only{digits:.2f}digits")


class Bad(Environment):
    """Fails at its second turn, in the way that the row names, in sample 1 of each group."""

    turn = 0

    async def start(self, task):
        if task.metadata["way"] == "start" and task.sample == 1:
            raise RuntimeError("cannot start")
        return await super().start(task)

    async def step(self, reply):
        self.turn += 1
        way = self.task.metadata["way"] if self.task.sample == 1 and self.turn == 2 else ""
        if way == "crash":
            os.kill(os.getpid(), 11)
        if way == "exit":
            os._exit(7)
        if way == "hang":
            time.sleep(1000)
        if way == "raise":
            raise KeyError("no such thing")
        if way == "print":
            for _ in range(16):
                print("x" * 2**24)
        if way == "flood":
            return Step([{"role": "user", "content": "x" * 2**24}])
        if way == "garbage":
            return "what?"
        if way == "silence":
            return Step()
        if way == "nan":
            return Step(done=True, reward=float("nan"))
        if way == "memory":
            self.hoard = bytearray(2**33)
        if way == "fork":
            if os.fork() == 0:
                time.sleep(1000)
        return Step([{"role": "user", "content": "next"}], done=self.turn == 3, reward=1.0)
'''


def make_model(folder: Path, template: str = FAITHFUL, **size: int) -> Path:
    """A model that ends a turn often, with this chat template."""
    make_tiny_model(folder, vocab=LETTERS, max_positions=1024, initializer_range=0.05, **size)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    (folder / "environments.py").write_text(ENVIRONMENTS)
    return folder


def make_config(folder: Path, environment: str = "Turns", **changes) -> Config:
    """Rows of kind "talk" meet this class of the environments above."""
    settings = {"classes": {"talk": f"{folder}/environments.py:{environment}"}, **changes.pop("settings", {})}
    rollout = {"max_response_length": 600, "cpu_kv_cache_gib": 0.2, "enforce_eager": True, **changes.pop("rollout", {})}
    return Config(
        model={"path": str(folder), "dtype": "float32"}, data={"train": "unused", "max_prompt_length": 100},
        rollout=rollout, environment=settings, **changes,
    )  # fmt: skip


def make_prompts(folder: Path, count: int = 4, **metadata) -> list[Prompt]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = []
    for number in range(count):
        messages = ({"role": "user", "content": f"say{number}"},)
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        prompts.append(Prompt(f"train:{number}", messages, ids, "", "talk", metadata))
    return prompts


class OneRank(Alone):
    """The control channel of one rank."""

    def gather(self, mine):
        return [mine]


@contextmanager
def episode_engine(engine, config: Config, said: list[str] | None = None):
    """Environments around an engine; the engine stays open."""
    chat = Chat(AutoTokenizer.from_pretrained(config.model.path), {}, config.environment.history)
    runner = EpisodeRunner(config, chat, set(), [].append if said is None else said.append)
    try:
        yield EpisodeEngine(engine, runner, OneRank())
    finally:
        runner.close()


def talk(engine, config: Config, prompts, samples: int = 3, iteration: int = 0):
    """The episodes of a batch."""
    requests = Requests(config.run.seed, samples, config.environment.classes)(prompts, iteration, 0)
    return engine.generate(requests, SamplingSettings(max_tokens=config.rollout.max_response_length))


@torch.no_grad()
def gaps_by_turn(folder: Path, prompts, rollouts) -> dict[int, float]:
    """Largest |engine's − transformers'| log-prob, by number of the turn, over every sequence of every episode."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found: dict[int, float] = {}
    for rollout in rollouts:
        lengths = iter(rollout.episode.turns)
        turn, left = 0, 0
        for context, begin, end in rollout.sequences:
            before = list(prompts[rollout.prompt].token_ids if context is None else context.token_ids)
            ids = torch.tensor([before + list(rollout.token_ids[begin:end])])
            logprobs = torch.log_softmax(model(ids).logits[0], dim=-1)
            for at in range(begin, end):
                if not rollout.trained[at]:
                    continue
                if left == 0:
                    turn, left = turn + 1, next(lengths)
                left -= 1
                place = len(before) + at - begin
                gap = abs(float(logprobs[place - 1, ids[0, place]]) - rollout.logprobs[at])
                found[turn] = max(found.get(turn, 0.0), gap)
        assert left == 0 and next(lengths, None) is None
    return found
