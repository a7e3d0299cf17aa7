"""Tokens per second of episodes with tools that take 0 to 500 ms, against one-turn generation of the same tokens.

    python -m benchmarks.episodes [--episodes 64] [--turns 4] [--hidden 256] [--layers 4] [--repeat 3]

A random model ends its turns by itself. The one-turn generation samples, for each episode, as many tokens as this had
sampled in all its turns. The ideal time with tools that wait is the larger of the one-turn time, and of the time of the
longest episode alone, its waits included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import psutil

from megatron_srpo.rollout import SamplingSettings
from megatron_srpo.run.generation import Requests
from tests.tiny_engines import tiny_engine
from tests.tiny_episodes import episode_engine, make_config, make_model, make_prompts, talk

WAITS = (0.0, 0.1, 0.5)  # seconds of a tool
ENVIRONMENT = '''
import asyncio
from megatron_srpo.environments import Environment, Step


class Waits(Environment):
    """A tool that takes `wait` seconds, in each turn but the last."""

    def __init__(self, turns, wait):
        self.left, self.wait = turns, wait

    async def step(self, reply):
        self.left -= 1
        if self.left and self.wait:
            await asyncio.sleep(self.wait)
        return Step([{"role": "user", "content": "next"}], self.left == 0, 1.0)
'''


def timed(function, *arguments, **options):
    """Seconds of the clock and of this process's processors, and what the call returns."""
    began, used = time.perf_counter(), time.process_time()
    result = function(*arguments, **options)
    return time.perf_counter() - began, time.process_time() - used, result


def used_by_environments(engine) -> float:
    """Seconds of processors that an engine's environments have used so far."""
    times = psutil.Process(engine._runner.pool._process.pid).cpu_times()
    return times.user + times.system + times.children_user + times.children_system


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("episodes", 64), ("turns", 4), ("hidden", 256), ("layers", 4), ("repeat", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = make_model(Path(place) / "model", hidden=given.hidden, layers=given.layers, ffn=3 * given.hidden)
        (folder / "environments.py").write_text(ENVIRONMENT)
        prompts = make_prompts(folder, given.episodes)
        with tiny_engine(folder, max_model_len=900, cpu_kv_cache_gib=1.0, max_num_seqs=256) as engine:
            rows = measure(engine, folder, prompts, given)
    print(json.dumps(rows, indent=1))


def measure(engine, folder, prompts, given) -> list[dict[str, float]]:
    """Runs of each kind in turns, because a machine's load changes; the quickest of each counts."""
    configs = {}
    for wait in WAITS:
        settings = {"arguments": {"talk": {"turns": given.turns, "wait": wait}}}
        configs[wait] = make_config(folder, "Waits", settings=settings, rollout={"max_response_length": 800})
    with ExitStack() as closing:
        talking = {wait: closing.enter_context(episode_engine(engine, config)) for wait, config in configs.items()}
        rollouts = talk(talking[0.0], configs[0.0], prompts, samples=1)
        same = [
            replace(request, max_tokens=rollout.response_length, row=None)
            for request, rollout in zip(Requests(0, 1)(prompts, 0, 0), rollouts, strict=True)
        ]
        sampling = SamplingSettings(max_tokens=800, ignore_eos=True)
        longest = prompts[max(rollouts, key=lambda rollout: rollout.response_length).prompt]
        one_turn, alone = [], {wait: [] for wait in WAITS}
        runs = {wait: [] for wait in WAITS}
        outside = dict.fromkeys(WAITS, 0.0)
        for _ in range(given.repeat):
            one_turn.append(timed(engine.generate, same, sampling)[:2])
            for wait in WAITS:
                outside[wait] -= used_by_environments(talking[wait])
                runs[wait].append(timed(talk, talking[wait], configs[wait], prompts, samples=1)[:2])
                outside[wait] += used_by_environments(talking[wait])
                alone[wait].append(timed(talk, talking[wait], configs[wait], [longest], samples=1)[0])
    tokens = sum(rollout.response_length for rollout in rollouts)
    base, base_used = (min(values) for values in zip(*one_turn, strict=True))
    quickest = {wait: tuple(min(values) for values in zip(*runs[wait], strict=True)) for wait in WAITS}
    return [
        {
            "tool_ms": 1000 * wait,
            "sampled_tokens": tokens,
            "turns": round(statistics.fmean(len(rollout.episode.turns) for rollout in rollouts), 2),
            "seconds": round(quickest[wait][0], 3),
            "tokens_per_second": round(tokens / quickest[wait][0]),
            "one_turn_seconds": round(base, 3),
            "share_of_one_turn": round(base / quickest[wait][0], 3),
            "longest_episode_alone": round(min(alone[wait]), 3),
            "share_of_ideal": round(max(base, min(alone[wait])) / quickest[wait][0], 3),
            "cpu_seconds": round(quickest[wait][1], 3),
            "one_turn_cpu_seconds": round(base_used, 3),
            "cpu_share_of_one_turn": round(base_used / quickest[wait][1], 3),
            "cpu_seconds_of_environments": round(outside[wait] / given.repeat, 3),
        }
        for wait in WAITS
    ]


if __name__ == "__main__":
    main()
