"""The fixed cost of an iteration: a whole training job with a model of almost no size, on one rank.

    python -m benchmarks.iteration [--iterations 100] [--profile]

4 prompts, 4 samples of up to 4 tokens, SRPO with two optimizer steps, TensorBoard on, no checkpoints. Prints the least
and the median time between two lines of the log, of this process's processors and of the clock, the first 10 left out.
With --profile also where the processors' time goes, which the profiler inflates.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import statistics
import tempfile
import time
from pathlib import Path

from megatron_srpo.core.loopback import ADDRESS
from megatron_srpo.rollout.vllm.server_process import free_port
from tests.tiny_run import make_run

WARM_UP = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--profile", action="store_true")
    given = parser.parse_args()
    os.environ |= {
        "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": ADDRESS, "MASTER_PORT": str(free_port(ADDRESS)),
    }  # fmt: skip
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from megatron_srpo.observe import Observer
    from megatron_srpo.run.cli import main as command

    marks: list[tuple[float, float]] = []
    profiler, log = cProfile.Profile(time.process_time), Observer.log

    def marked(observer, step, metrics):
        marks.append((time.process_time(), time.perf_counter()))
        if given.profile and step == WARM_UP:
            profiler.enable()
        log(observer, step, metrics)

    Observer.log = marked
    with tempfile.TemporaryDirectory() as folder:
        settings = [f"run.iterations={WARM_UP + given.iterations}", "checkpoint.every=0", "observe.tensorboard=true"]
        command(["train", str(make_run(Path(folder))), *settings])
    profiler.disable()
    pairs = list(zip(marks[WARM_UP:], marks[WARM_UP + 1 :], strict=False))
    for clock, name in enumerate(("CPU", "clock")):
        taken = [1000 * (after[clock] - before[clock]) for before, after in pairs]
        print(f"RESULT {name}: least {min(taken):.1f} ms, median {statistics.median(taken):.1f} ms")
    if given.profile:
        pstats.Stats(profiler).sort_stats("cumtime").print_stats(60)


if __name__ == "__main__":
    main()
