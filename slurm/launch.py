"""The batch script's program: python slurm/launch.py CONFIG [--model NAME] [--benchmark NAME] [--method NAME]
[--dry-run] [--rollout-nodes K] [--section.key VALUE …].

--model, --benchmark and --method add the keys of configs/model/NAME.toml, configs/benchmark/NAME.toml and
configs/method/NAME.toml, in this order.

In a job it checks the configuration and the nodes, trains, and ends as docs/slurm.md says. With --dry-run, or
DRY_RUN=1, it prints the commands of every node; --nodes N then says for how many.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # started by its path
    sys.path.insert(0, str(ROOT))

from megatron_srpo.core import streams  # noqa: E402
from megatron_srpo.core.exit_codes import DONE, MISTAKE  # noqa: E402
from slurm import commands  # noqa: E402
from slurm.job import BrokenJob, Job, Options, job_from, parse  # noqa: E402
from slurm.supervisor import Supervisor  # noqa: E402


def main(arguments: Sequence[str]) -> int:
    environment = dict(os.environ)
    if not {"-h", "--help"}.isdisjoint(arguments):
        print(__doc__.strip())
        return DONE
    try:
        options = parse(arguments)
        if environment.get("DRY_RUN", "0") not in ("", "0"):
            options = Options(**{**vars(options), "dry_run": True})
        job = job_from(options, environment)
        if not options.dry_run:
            return Supervisor(job).run()
        print("\n".join(dry_run(job)))
    except BrokenJob as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return MISTAKE
    return DONE


def dry_run(job: Job) -> list[str]:
    """Every command of the job, in order."""
    planned = plan(job)  # refuses what the lines below could not read
    exports = [f"export {name}={shlex.quote(value)}" for name, value in sorted(commands.environment(job).items())]
    health = commands.health_step(job, device="auto", output="OUTPUT_DIR")
    size = engine_ranks(job) if job.rollout_nodes else 1
    engines = [commands.serve_step(job, size)] if job.rollout_nodes else []
    train = commands.train_step(job, size)
    steps = [commands.check_step(job), health, *engines, train]
    head = f"# {len(job.nodes)} × {job.ranks_per_node} GPUs, {job.world_size} ranks train {' + '.join(job.files)}"
    shown = [line for step in steps for line in ("", *commands.shown(step))]
    return [head, *site(job.environment), *exports, *shown, "", *(f"# {line}" for line in planned)]


def site(environment: Mapping[str, str]) -> list[str]:
    """What sbatch is asked for, and what the site has set: the script's header, then the variables that win over it."""
    script = Path(environment.get("SCRIPT") or "absent")
    header = (
        [line for line in script.read_text().splitlines() if line.startswith("#SBATCH")] if script.is_file() else []
    )
    given = {name: value for name, value in environment.items() if name.startswith(("SRPO_", "SBATCH_")) and value}
    return [*header, *(f"# the site sets {name}={shlex.quote(value)}" for name, value in sorted(given.items()))]


def plan(job: Job) -> list[str]:
    """What the planner says, where the job's Python and the project's environment are at hand. BrokenJob if the
    trainer would refuse the configuration."""
    sizes = (len(job.nodes), job.rollout_nodes, job.ranks_per_node)
    command = [*job.python, "-m", "slurm.plan", job.gpu, *map(str, sizes), *job.files, *job.overrides]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return [f"no plan: {job.python[0]} cannot be started here ({error.strerror})"]
    said = (found.stdout or found.stderr).strip()
    if found.returncode == MISTAKE:
        raise BrokenJob(said)
    return said.splitlines()[-20:]


def engine_ranks(job: Job) -> int:
    """rollout.tensor_parallel_size, by a reader that needs no packages and no Python of today: a login node may have
    neither. The job itself asks the project's own reader."""
    given = dict(part.removeprefix("--").split("=", 1) for part in joined(job.overrides))
    from_file = "1"
    for file in job.files:  # keys of later files win
        section = ""
        for line in Path(file).read_text().splitlines():
            header = re.match(r"\s*\[([\w.]+)\]", line)
            setting = re.match(r"\s*([\w.]+)\s*=\s*(\d+)", line)
            if header:
                section = header[1] + "."
            elif setting and section + setting[1] == "rollout.tensor_parallel_size":
                from_file = setting[2]
    return int(given.get("rollout.tensor_parallel_size", from_file))


def joined(overrides: Sequence[str]) -> list[str]:
    """Every override as --section.key=VALUE."""
    parts: list[str] = []
    for part in overrides:
        if parts and "=" not in parts[-1]:
            parts[-1] += f"={part}"
        else:
            parts.append(part)
    return [part for part in parts if "=" in part]


if __name__ == "__main__":
    streams.guard()
    sys.exit(main(sys.argv[1:]))
