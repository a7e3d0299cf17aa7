"""torchrun that adds nothing to what the ranks have said: the same arguments, a short ending, the ranks' exit code.

    python -m megatron_srpo.torchrun --nproc-per-node 2 -m megatron_srpo train CONFIG.toml

torchrun itself ends a refused or stopped run with two dozen lines of its own, always with exit code 1, and kills ranks
that need more than 30 s for a clean stop; this one waits for SHUTDOWN_SECONDS. SIGUSR1 is passed on to the ranks, which
then stop with a checkpoint and exit_codes.REQUEUE. With --max-restarts N all ranks are started again when one was lost,
and go on from the last checkpoint; never after a refusal, or a stop that was asked for.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from megatron_srpo.core.exit_codes import FINAL, TOLD
from megatron_srpo.run import stopping

SHUTDOWN_SECONDS = 3600
# Without it, restarted ranks find the addresses of the lost ones in the launcher's store, and connect to nobody.
NEW_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
LOGGERS = ("torch.distributed.elastic", "torch.distributed.run", "torch.distributed.launcher")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run torchrun in this process; returns the exit code."""
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_SECONDS))
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    _silence_launcher()
    _restart_only_after_a_fault()
    stopping.hold_requeue()
    threading.Thread(target=_pass_requeue_on, daemon=True).start()
    try:
        options = run.parse_args(sys.argv[1:] if arguments is None else arguments)
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


def _pass_requeue_on() -> None:
    import psutil

    while True:
        signal.sigwait({stopping.REQUEUE})
        for rank in psutil.Process().children():
            with suppress(psutil.NoSuchProcess):
                rank.send_signal(stopping.REQUEUE)


def _restart_only_after_a_fault() -> None:
    """--max-restarts N is for ranks that were lost: a rank that refused, or stopped as it was asked to, has ended."""
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

    monitor = LocalElasticAgent._monitor_workers

    def monitored(agent: Any, group: Any) -> Any:
        result = monitor(agent, group)
        if any(failure.exitcode in FINAL for failure in result.failures.values()):
            agent._remaining_restarts = 0
        return result

    LocalElasticAgent._monitor_workers = monitored


def _silence_launcher() -> None:
    """Every module of torch's launcher has a logger with a handler of its own."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(LOGGERS):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def _ended(failed: BaseException) -> int:
    """The exit code of the rank that failed first; one line if that rank could not say anything."""
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
    print(f"error: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
