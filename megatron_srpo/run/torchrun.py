"""torchrun with the same arguments that prints no report of its own and ends with the exit code of the ranks.

    python -m megatron_srpo.torchrun --nproc-per-node 2 -m megatron_srpo train CONFIG.toml

The original torchrun ends a refused or stopped run with two dozen lines of its own and always with exit code 1, and it
kills ranks that need more than 30 s for a clean stop. This one waits SHUTDOWN_SECONDS. It passes SIGUSR1 on to the
ranks, which then save a checkpoint and exit with exit_codes.REQUEUE. It does the same with SIGHUP (the ssh connection
is gone), after which they exit with exit_codes.STOPPED. With --max-restarts N it starts all ranks again when one was
lost, and they continue from the last checkpoint; it never does so after a rank refused its configuration or stopped on
request. On one node its store listens on the loopback interface only.
"""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_srpo.core import loopback
from megatron_srpo.core.exit_codes import FINAL, TOLD
from megatron_srpo.core.own_names import remove_leftovers, shared_memory_name
from megatron_srpo.run import stopping
from megatron_srpo.run.open_files import raise_limit

if TYPE_CHECKING:
    from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

SHUTDOWN_SECONDS = 3600
# Without this variable restarted ranks read the addresses of the lost ranks from the launcher's store and connect to
# nobody.
NEW_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
# torch's own handler of SIGHUP kills the ranks when the signal comes twice, and takes effect even under nohup.
HANDLED = "TORCHELASTIC_SIGNALS_TO_HANDLE"
LOGGERS = ("torch.distributed.elastic", "torch.distributed.run", "torch.distributed.launcher")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run torchrun in this process; returns the exit code."""
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_SECONDS))
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    _own_temporary_folder()
    _silence_launcher()
    _restart_only_after_a_fault()
    stopping.hold_requeue()
    os.environ.setdefault(HANDLED, "SIGTERM,SIGINT,SIGQUIT")
    passed_on = {stopping.REQUEUE} | stopping.hold_hangup()
    threading.Thread(target=_pass_on, args=[passed_on], daemon=True).start()
    try:
        options = run.parse_args(sys.argv[1:] if arguments is None else arguments)
        if options.standalone or options.nnodes in ("1", "1:1"):
            loopback.confine_stores()
            options.local_addr = options.local_addr or loopback.ADDRESS  # not the host name, which may not resolve
        raise_limit()  # the first node's launcher has several connections of every rank
        if options.max_restarts:
            os.environ[NEW_STORE] = "1"
        run.run(options)
    except ChildFailedError as failed:
        return _ended(failed)
    except SignalException as stopped:
        return 128 + stopped.sigval
    except KeyboardInterrupt:
        return 130
    except RuntimeError as error:
        if "EADDRINUSE" not in str(error):
            raise
        _say("the port of the rendezvous is in use: choose another, --master-port N, or have one found, --standalone")
        return 2
    return 0


def _own_temporary_folder() -> None:
    """Have torch put its temporary folder, which it never removes, into one that goes with this process or with the
    next start. The ranks keep the user's."""
    place = Path(tempfile.gettempdir())
    remove_leftovers(place)
    folder = place / f"{shared_memory_name(os.getpid())}-torchrun"
    with suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        tempfile.tempdir = str(folder)
        atexit.register(shutil.rmtree, folder, ignore_errors=True)


def _pass_on(signals: set[signal.Signals]) -> None:
    """Send every one of these signals of this process to the ranks."""
    import psutil

    while True:
        received = signal.sigwait(signals)
        for rank in psutil.Process().children():
            with suppress(psutil.NoSuchProcess):
                rank.send_signal(received)


def _restart_only_after_a_fault() -> None:
    """Have torchrun's agent restart ranks only when one was lost, not when one refused or stopped on request."""
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

    monitor = LocalElasticAgent._monitor_workers

    def monitor_workers(agent: LocalElasticAgent, group: WorkerGroup) -> RunResult:
        result = monitor(agent, group)
        if any(failure.exitcode in FINAL for failure in result.failures.values()):
            agent._remaining_restarts = 0
        return result

    LocalElasticAgent._monitor_workers = monitor_workers  # type: ignore[method-assign]


def _silence_launcher() -> None:
    """Raise the level of all loggers of torch's launcher: each module has its own logger with its own handler."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(LOGGERS):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def _ended(failed: ChildFailedError) -> int:
    """The exit code of the rank that failed first. Prints one line if that rank could not print a message itself."""
    rank, failure = failed.get_first_failure()
    if failure.exitcode in TOLD:
        return failure.exitcode
    if failure.exitcode < 0:
        name = failure.signal_name()
        _say(f"rank {rank} was ended by {name}" + (", maybe because memory ran out" if name == "SIGKILL" else ""))
        return 128 - failure.exitcode
    _say(f"rank {rank} ended with exit code {failure.exitcode}; its traceback is above")
    return failure.exitcode


def _say(text: str) -> None:
    with suppress(OSError):  # standard error may be a file on a full disk
        print(f"error: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
