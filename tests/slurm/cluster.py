"""A real Slurm of several pretend nodes on this machine: munged, slurmctld and a slurmd a node, all in one folder, all
on loopback, all children of this process. No systemd, no accounting, no cgroups."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo")
PLACES = "/usr/sbin:/usr/local/sbin:/sbin"  # where daemons lie, which a user's PATH may not name
START_SECONDS = 60

CONFIGURATION = """\
ClusterName=pretend
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=10
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmctldPort={port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000,sched_interval=2,bf_interval=1
JobRequeue=1
ReturnToService=2
EnforcePartLimits=ALL
KillWait=5
MinJobAge=600
InactiveLimit=0
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
GresTypes=gpu
"""


def why_not() -> str:
    """Why no Slurm can be started here, or ""."""
    missing = [name for name in PROGRAMS if _program(name) is None]
    if missing:
        return f"Slurm is not installed ({', '.join(missing)}): make test-slurm installs Debian's packages"
    return ""


def _program(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path=PLACES)


def _free_ports(count: int) -> list[int]:
    """Ports on loopback that were free a moment ago."""
    with contextlib.ExitStack() as opened:
        probes = [opened.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


class Cluster:
    """A running cluster; commands reach it through `environment`."""

    def __init__(self, folder: Path, nodes: Sequence[str] = ("nodea", "nodeb"), *, cpus: int = 2, gpus: int = 8):
        self.folder, self.nodes = folder, tuple(nodes)
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen] = []
        self._configure(cpus, gpus)

    def _configure(self, cpus: int, gpus: int) -> None:
        host, user = socket.gethostname().split(".")[0], getpass.getuser()
        self.folder.chmod(0o755)
        (self.folder / "munge").mkdir(mode=0o755)
        key = self.folder / "munge/key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        (self.folder / "state").mkdir()
        controller, *ports = _free_ports(1 + len(self.nodes))
        text = CONFIGURATION.format(host=host, user=user, folder=self.folder, port=controller)
        for name, port in zip(self.nodes, ports, strict=True):
            text += (
                f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} RealMemory=4096 "
                f"Gres=gpu:{gpus} State=UNKNOWN\n"
            )
        text += f"PartitionName=batch Nodes={','.join(self.nodes)} Default=YES MaxTime=INFINITE State=UP\n"
        (self.folder / "slurm.conf").write_text(text)
        for number in range(gpus):  # slurmd wants a device a GPU
            (self.folder / f"gpu{number}").symlink_to("/dev/null")
        devices = f"NodeName={','.join(self.nodes)} Name=gpu File={self.folder}/gpu[0-{gpus - 1}]\n"
        (self.folder / "gres.conf").write_text(devices)

    def start(self) -> None:
        """Start the daemons and wait for the nodes. Raises RuntimeError with the logs' ends."""
        munge = self.folder / "munge"
        self._daemon(
            "munged", "--foreground", "--force", f"--key-file={munge}/key", f"--socket={munge}/socket",
            f"--pid-file={munge}/pid", f"--log-file={munge}/log", f"--seed-file={munge}/seed", "--num-threads=2",
        )  # fmt: skip
        self._wait((munge / "socket").exists)
        self._daemon("slurmctld", "-D", "-c")
        for name in self.nodes:
            self._daemon("slurmd", "-D", "-N", name)
        self._wait(lambda: self.run("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").split() == sorted(self.nodes))

    def _daemon(self, name: str, *options: str) -> None:
        command = [_program(name), *options]
        with (self.folder / f"{name}.out").open("ab") as out:
            self._daemons.append(
                subprocess.Popen(
                    command, env=self.environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=self.folder
                )
            )

    def _wait(self, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not ready():
            if time.monotonic() > deadline or any(daemon.poll() is not None for daemon in self._daemons):
                logs = [f"{log}:\n{log.read_text()[-2000:]}" for log in sorted(self.folder.glob("*.log"))]
                raise RuntimeError("the pretend cluster did not start, or not stop\n" + "\n".join(logs))
            time.sleep(0.1)

    def run(self, *command: str, cwd: Path | None = None) -> str:
        """A Slurm command's standard output, "" where it failed."""
        return subprocess.run(
            command, env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=60, check=False
        ).stdout

    def stop(self) -> None:
        """End all jobs, then the daemons, newest first; waits for each."""
        if len(self._daemons) > 1:
            self.run("scancel", "--user", getpass.getuser())
            with contextlib.suppress(RuntimeError):
                self._wait(lambda: not self.run("squeue", "-h").strip())
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(timeout=15)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons = []


@contextlib.contextmanager
def running(folder: Path) -> Iterator[Cluster]:
    """A cluster in `folder`, whose path must be short: the munge socket lies in it."""
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
