"""The commands of a job's steps. `{node}` in a command stands for the node's number in its step."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

from slurm.job import BrokenJob, Job

NODE = "{node}"
MEMORY = "rollout.gpu_memory_utilization"
ENGINE_MEMORY = "0.9"  # of a GPU that only generates; the configuration's own share leaves room for the trainer
TOKEN = "MEGATRON_SRPO_ENGINE_TOKEN"  # TOKEN_VARIABLE of rollout: a server with it takes weights from us alone
CLOSING_SECONDS = 600  # from the first node's planned end to the last one's


@dataclass(frozen=True)
class Step:
    """A job step: `command` runs once on each of `nodes`; output goes to the batch log, or to a file a node."""

    title: str
    nodes: tuple[str, ...]
    command: tuple[str, ...]
    srun: tuple[str, ...]

    @property
    def argv(self) -> list[str]:
        return [*self.srun, *self.command]


def check_step(job: Job) -> Step:
    """The configuration's own checks, with the number of ranks that will train; prints a line of JSON.

    How many ranks an engine has is not known before: here each engine node has one.
    """
    overrides = (*job.overrides, *_placement(job, job.ranks_per_node))
    command = (*job.python, "-m", "slurm.settings", str(job.world_size), *job.files, *overrides)
    return _step(job, "check of the configuration", job.nodes[:1], command, ())


def health_step(job: Job, *, device: str, output: str) -> Step:
    """Every rank's look at its node, and an all-reduce over all of them."""
    transfer = max(20, job.health_seconds // 3)  # the rest of the time is for the ranks' start
    wanted = [
        f"--device={device}", f"--gpus={job.ranks_per_node}", f"--memory-gib={job.memory_gib:g}",
        f"--disk-gib={job.disk_gib:g}", f"--disk={output}", f"--seconds={transfer}",
        f"--meet-seconds={max(20, job.health_seconds - transfer)}",
    ]  # fmt: skip
    if len(job.nodes) > 1:
        wanted.append(f"--min-bandwidth={job.min_bandwidth:g}")
    if job.scratch:
        wanted.append(f"--disk={job.scratch}")
    command = _torchrun(job, job.nodes, job.port, "slurm.health", *wanted)
    return _step(job, "health of the nodes", job.nodes, _on_node(job, "health", command), ())


def serve_step(job: Job, engine_ranks: int) -> Step:
    """Engine servers on the last nodes, for as long as training runs."""
    hosts = ",".join(map(job.address_of, job.rollout_hosts))
    where = (f"--hosts={hosts}", f"--port={job.port + 2}", f"--gpus={job.ranks_per_node}", f"--size={engine_ranks}")
    server = (job.inner_python, "-m", "megatron_srpo", "serve", *job.files)
    serve = (job.inner_python, "-m", "slurm.serve", *where, f"--logs={job.logs}", "--")
    memory = () if any(MEMORY in part for part in job.overrides) else (f"--{MEMORY}", ENGINE_MEMORY)
    command = (*serve, *server, *job.overrides, *memory)
    return _step(job, "engine servers", job.rollout_hosts, _on_node(job, "serve", command), ())


def server_urls(job: Job, engine_ranks: int) -> list[str]:
    """The addresses of all servers, as slurm.serve chooses them. Raises BrokenJob for an engine larger than a node."""
    count = job.ranks_per_node // engine_ranks
    if job.rollout_nodes and count == 0:
        raise BrokenJob(
            f"rollout.tensor_parallel_size = {engine_ranks}: an engine server lives on one node, which has "
            f"{job.ranks_per_node} ranks; lower it, or leave --rollout-nodes out"
        )
    hosts = enumerate(map(job.address_of, job.rollout_hosts))
    return [f"http://{host}:{job.port + 2 + node * count + i}" for node, host in hosts for i in range(count)]


def train_step(job: Job, engine_ranks: int) -> Step:
    overrides = (*job.overrides, *_placement(job, engine_ranks))
    port = job.port + 1
    command = _torchrun(job, job.training_nodes, port, "megatron_srpo", "train", *job.files, *overrides)
    logged = (f"--output={job.logs}/node-%n.log", "--open-mode=append")
    return _step(job, "training", job.training_nodes, _on_node(job, "train", command), logged)


def _placement(job: Job, engine_ranks: int) -> tuple[str, ...]:
    if not job.rollout_nodes:
        return ()
    return ("--rollout.placement", "servers", "--rollout.servers", json.dumps(server_urls(job, engine_ranks)))


def record(job: Job, kind: str, node: int | str) -> Path:
    """The file in which a node leaves the exit code of its command."""
    return job.logs / f"{kind}-{node}.exit"


def environment(job: Job) -> dict[str, str]:
    """What the steps get on top of the job's own variables."""
    added = {}
    if job.interface:
        added["NCCL_SOCKET_IFNAME"] = job.interface  # slurm/node.py finds the name for gloo
    if job.scratch:
        caches = Path(job.scratch) / "srpo-cache"
        added |= {
            "TRITON_CACHE_DIR": str(caches / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
            "VLLM_CACHE_ROOT": str(caches / "vllm"),
        }
    return {name: value for name, value in added.items() if name not in job.environment}


def shown(step: Step) -> list[str]:
    """A dry run's lines: the step's command, then what each node runs by it."""
    lines = [f"# {step.title}", shlex.join(step.argv)]
    if any(NODE in part for part in step.command):
        inner = step.command[step.command.index("--") + 1 :]
        for number, name in enumerate(step.nodes):
            lines += [f"#   on {name}:", "    " + shlex.join(part.replace(NODE, str(number)) for part in inner)]
    return lines


def _torchrun(job: Job, nodes: tuple[str, ...], port: int, module: str, *arguments: str) -> tuple[str, ...]:
    """Static rendezvous: every launcher knows its number and the first node's address."""
    return (
        job.inner_python, "-m", "megatron_srpo.torchrun", f"--nnodes={len(nodes)}", f"--node-rank={NODE}",
        f"--nproc-per-node={job.ranks_per_node}", f"--master-addr={job.address_of(nodes[0])}",
        f"--master-port={port}", "-m", module, *arguments,
    )  # fmt: skip


def _on_node(job: Job, kind: str, command: tuple[str, ...]) -> tuple[str, ...]:
    # "^lo" excludes interfaces, as NCCL reads it, and names none.
    interface = job.interface if not job.interface.startswith("^") else ""
    given = {"--scratch": job.scratch, "--interface": interface}
    options = [f"{option}={value}" for option, value in given.items() if value]
    return (*job.python, "-m", "slurm.node", f"--record={record(job, kind, NODE)}", *options, "--", *command)


def _step(job: Job, title: str, nodes: tuple[str, ...], command: tuple[str, ...], options: tuple[str, ...]) -> Step:
    where = (f"--nodes={len(nodes)}", f"--ntasks={len(nodes)}", "--ntasks-per-node=1", f"--nodelist={','.join(nodes)}")
    # Since Slurm 22.05 a step does not inherit sbatch's --cpus-per-task, and one CPU a task would be its share.
    cpus = (f"--cpus-per-task={job.cpus_per_task}",) if job.cpus_per_task else ()
    ends = ("--kill-on-bad-exit=1", f"--wait={CLOSING_SECONDS}")
    # A job of `sbatch --export=NONE` gets its settings from site.env; its steps would inherit none of them.
    shared = ("--export=ALL", "--mpi=none", "--cpu-bind=none")  # torchrun's rendezvous needs no MPI
    ours = (*shared, *cpus, *ends, *options)
    return Step(title, nodes, command, ("srun", *where, *ours, *job.srun_options))
