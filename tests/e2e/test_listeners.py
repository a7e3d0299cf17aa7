"""A run on one machine listens on the loopback interface only: launcher, ranks, engines, and their helpers."""

from __future__ import annotations

import threading

import psutil
import pytest

from tests import tiny_run

PLACEMENTS = {
    "colocated": ["--parallel.tensor_model_parallel_size", "2", "--rollout.tensor_parallel_size", "2"],
    "servers": ["--rollout.placement", "servers", "--rollout.tensor_parallel_size", "2"],
}


def listeners(launcher: int) -> set[tuple[str, str]]:
    """(address, process) of every socket on which the run accepts connections or packets now."""
    found = set()
    try:
        family = [psutil.Process(launcher), *psutil.Process(launcher).children(recursive=True)]
    except psutil.NoSuchProcess:
        return found
    for process in family:
        try:
            sockets = process.net_connections(kind="inet")
            found |= {(s.laddr.ip, process.name()) for s in sockets if s.status in ("LISTEN", "NONE") and not s.raddr}
        except psutil.Error:
            continue  # it has just ended
    return found


@pytest.mark.slow
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_run_on_one_machine_listens_on_loopback_only(tmp_path, placement):
    config = tiny_run.make_run(tmp_path)
    overrides = ["--rollout.num_servers", "1", "--train.max_tokens_per_gpu", "128", *PLACEMENTS[placement]]
    run = tiny_run.start(config, *overrides, ranks=2)
    found: set[tuple[str, str]] = set()
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.2):
            found.update(listeners(run.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    code, output = tiny_run.finish(run)
    ended.set()
    watcher.join()
    assert code == 0, output[-3000:]
    assert len(found) > 1 and {address for address, _ in found} <= {"127.0.0.1", "::1"}, found
