"""What a job is made of: its nodes, its arguments, and what the site has set."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

GPUS_PER_NODE = 8
FIRST_PORT, PORTS = 20000, 10000  # below the range from which systems give ports to whoever asks
SITE_SETTINGS = "slurm/site.env"
OVERLAYS = ("--model", "--benchmark", "--method")  # --benchmark NAME adds the keys of configs/benchmark/NAME.toml


class BrokenJob(Exception):
    """A mistake in the job's arguments or settings: str() is the whole message, for exit code 2."""


@dataclass(frozen=True)
class Job:
    """One job. Nodes are host names in Slurm's order; training has the first ones, engines the last `rollout_nodes`."""

    config: str
    overrides: tuple[str, ...]  # --section.key VALUE …, for the trainer
    nodes: tuple[str, ...]
    rollout_nodes: int = 0
    job_id: str = "0"
    restarts: int = 0
    ranks_per_node: int = GPUS_PER_NODE
    python: tuple[str, ...] = ("python3",)  # how the host starts Python, maybe through a container
    srun_options: tuple[str, ...] = ()
    address: str = "{node}"  # of a node, from its name
    interface: str = ""
    cpus_per_task: int = 0  # of a step's one task a node; 0 = Slurm's choice
    gpu: str = "h100"
    scratch: str = ""
    disk_gib: float = 0.0
    memory_gib: float = 0.0
    health_seconds: int = 600
    min_bandwidth: float = 5.0  # GB/s
    max_attempts: int = 3
    logs_folder: str = "logs"
    environment: Mapping[str, str] = field(default_factory=dict)
    overlays: tuple[str, ...] = ()  # further configuration files, whose keys replace those of `config`

    @property
    def files(self) -> tuple[str, ...]:
        """The configuration's files, in the trainer's order."""
        return (self.config, *self.overlays)

    @property
    def training_nodes(self) -> tuple[str, ...]:
        return self.nodes[: len(self.nodes) - self.rollout_nodes]

    @property
    def world_size(self) -> int:
        """Ranks that train."""
        return len(self.training_nodes) * self.ranks_per_node

    @property
    def rollout_hosts(self) -> tuple[str, ...]:
        """The names of the nodes that engines have."""
        return self.nodes[len(self.training_nodes) :]

    @property
    def inner_python(self) -> str:
        """Python for what already runs where `python` leads to, maybe in a container that cannot start another one."""
        return self.python[-1]

    def address_of(self, node: str) -> str:
        return self.address.replace("{node}", node)

    @property
    def port(self) -> int:
        """The first of the ports that this job uses on a node; other jobs, and the attempt before, have others."""
        return FIRST_PORT + (10 * int(self.job_id) + 5 * (self.restarts % 2)) % PORTS

    @property
    def slurm_id(self) -> str:
        """What Slurm's commands call this job. The job id of an array's element may stand for the whole array too."""
        array = self.environment.get("SLURM_ARRAY_JOB_ID")
        return f"{array}_{self.environment['SLURM_ARRAY_TASK_ID']}" if array else self.job_id

    @property
    def logs(self) -> Path:
        return Path(self.logs_folder) / self.job_id


@dataclass(frozen=True)
class Options:
    """The script's own arguments."""

    config: str
    overrides: tuple[str, ...]
    dry_run: bool = False
    nodes: int = 0  # of a dry run; 0 = the script's own number
    rollout_nodes: int = 0
    overlays: tuple[str, ...] = ()


def parse(arguments: Sequence[str]) -> Options:
    """CONFIG [--benchmark NAME] [--method NAME] [--dry-run] [--nodes N] [--rollout-nodes K] [--section.key VALUE …].
    Raises BrokenJob."""
    chosen: dict[str, str] = {}
    rest, overrides, numbers = list(arguments), [], {"--nodes": 0, "--rollout-nodes": 0}
    config, dry_run = "", False
    while rest:
        token = rest.pop(0)
        name, equals, value = token.partition("=")
        if name in numbers:
            value = value if equals else rest.pop(0) if rest else ""
            if not value.isdigit():
                raise BrokenJob(f'{name}: expected a number of nodes, got "{value}"')
            numbers[name] = int(value)
            if name == "--nodes" and not numbers[name]:
                raise BrokenJob("--nodes: expected at least 1")
        elif name in OVERLAYS:
            chosen[name] = _overlay(name, value if equals else rest.pop(0) if rest else "")
        elif token == "--dry-run":
            dry_run = True
        elif name.startswith("--") and "." in name:
            overrides.append(token)
            if not equals and rest and not rest[0].startswith("--"):
                overrides.append(rest.pop(0))
        elif re.fullmatch(r"\+{0,2}[a-z_]\w*(\.\w+)+=.*", token, re.DOTALL):  # Hydra's spelling, as for the commands
            overrides.append(f"--{token.lstrip('+')}")
        elif not config and not token.startswith("-"):
            config = token
        else:
            raise BrokenJob(
                f"{token}: no such argument. After the script come --model NAME, --benchmark NAME, --method NAME, "
                "--rollout-nodes K, --dry-run, and keys of the configuration, --section.key VALUE; sbatch's own "
                "options stand before the script"
            )
    if not config:
        raise BrokenJob("no configuration: expected the path of a TOML file as the first argument")
    if not Path(config).is_file():
        raise BrokenJob(f"{config}: no such file (looked from {Path.cwd()}); submit from the checkout")
    overlays = tuple(chosen[name] for name in OVERLAYS if name in chosen)
    return Options(config, tuple(overrides), dry_run, numbers["--nodes"], numbers["--rollout-nodes"], overlays)


def _overlay(option: str, name: str) -> str:
    """The file that --model, --benchmark or --method names. Raises BrokenJob."""
    folder = Path("configs") / option.lstrip("-")
    names = sorted(path.stem for path in folder.glob("*.toml"))
    if name not in names:
        where = ", ".join(names) or f"the files of {folder}, which is not in {Path.cwd()}; submit from the checkout"
        raise BrokenJob(f'{option}: expected one of {where}, got "{name}"')
    return str(folder / f"{name}.toml")


def files_and_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split CONFIG… [--section.key VALUE …]: the files stand first."""
    count = next((i for i, part in enumerate(arguments) if part.startswith("--")), len(arguments))
    return list(arguments[:count]), list(arguments[count:])


def job_from(options: Options, environment: Mapping[str, str]) -> Job:
    """The job that Slurm's variables and the site's settings describe. Raises BrokenJob."""
    nodes = _nodes(options, environment)
    if not 0 <= options.rollout_nodes < len(nodes):
        raise BrokenJob(
            f"--rollout-nodes {options.rollout_nodes}: the job has {_count(len(nodes), 'node')}, and training needs at "
            "least one of them; ask for more: sbatch --nodes N"
        )
    gpus = int(environment.get("SLURM_GPUS_ON_NODE") or GPUS_PER_NODE)
    return Job(
        config=options.config,
        overlays=options.overlays,
        overrides=options.overrides,
        nodes=nodes,
        rollout_nodes=options.rollout_nodes,
        job_id=environment.get("SLURM_JOB_ID", "0"),
        restarts=int(environment.get("SLURM_RESTART_COUNT", "0")),
        ranks_per_node=_number(environment, "SRPO_RANKS_PER_NODE", int, gpus),
        python=_python(environment),
        srun_options=_words(environment, "SRPO_SRUN_OPTIONS"),
        cpus_per_task=_number(environment, "SRPO_CPUS_PER_TASK", int, _smallest_node(environment)),
        address=environment.get("SRPO_ADDRESS") or "{node}",
        gpu=environment.get("SRPO_GPU") or "h100",
        interface=environment.get("SRPO_INTERFACE", ""),
        scratch=environment.get("SRPO_SCRATCH", ""),
        disk_gib=_number(environment, "SRPO_MIN_DISK_GIB", float, 50.0),
        memory_gib=_number(environment, "SRPO_MIN_MEMORY_GIB", float, 0.0),
        health_seconds=_number(environment, "SRPO_HEALTH_SECONDS", int, 600),
        min_bandwidth=_number(environment, "SRPO_MIN_BANDWIDTH", float, 5.0),
        max_attempts=_number(environment, "SRPO_MAX_ATTEMPTS", int, 3),
        logs_folder=environment.get("SRPO_LOGS") or "logs",
        environment=environment,
    )


def _nodes(options: Options, environment: Mapping[str, str]) -> tuple[str, ...]:
    names = environment.get("SLURM_JOB_NODELIST")
    if names:
        if options.nodes:
            raise BrokenJob(f"--nodes {options.nodes} stands after the script; it is sbatch's: sbatch --nodes N SCRIPT")
        found = subprocess.run(["scontrol", "show", "hostnames", names], capture_output=True, text=True, check=True)
        return tuple(found.stdout.split())
    if not options.dry_run:
        raise BrokenJob("this is not a Slurm job: submit it with sbatch, or look at its commands with DRY_RUN=1")
    count = options.nodes or int(environment.get("SCRIPT_NODES") or 1)  # common.sh: what the script asks sbatch for
    return tuple(f"node{number}" for number in range(count))


def _python(environment: Mapping[str, str]) -> tuple[str, ...]:
    words = _words(environment, "SRPO_PYTHON")
    if not words:
        return (".venv/bin/python" if os.access(".venv/bin/python", os.X_OK) else "python3",)
    if words[-1].startswith("-"):
        raise BrokenJob(
            f'SRPO_PYTHON = "{environment["SRPO_PYTHON"]}" (see {SITE_SETTINGS}.example): expected Python as its last '
            f'word, got the option "{words[-1]}"'
        )
    return words


def _words(environment: Mapping[str, str], name: str) -> tuple[str, ...]:
    """The words of a setting, as a shell would read them."""
    text = environment.get(name, "")
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise BrokenJob(f"{name} = {text} (see {SITE_SETTINGS}.example): {error}; quote it as for a shell") from error


def _smallest_node(environment: Mapping[str, str]) -> int:
    """The fewest CPUs that Slurm gives the job on one of its nodes, as in "96(x3),64"; 0 where it does not say."""
    counts = re.findall(r"(?:^|,)(\d+)", environment.get("SLURM_JOB_CPUS_PER_NODE", ""))
    return min(map(int, counts), default=0)


def _number(environment: Mapping[str, str], name: str, kind: type, default: float) -> float:
    text = environment.get(name, "")
    try:
        value = kind(text) if text else default
    except ValueError:
        value = -1
    if value < 0:
        raise BrokenJob(f'{name} = "{text}" (see {SITE_SETTINGS}.example): expected a number ≥ 0')
    return value


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
