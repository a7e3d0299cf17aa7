"""The task of a node: its exit code, its record, its temporary folder. And the checks before a run, on one rank."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from examples.tiny.launch import free_port
from megatron_srpo.core import exit_codes
from slurm import health, node
from tests.tiny_models import make_tiny_model

ROOT = Path(__file__).parents[2]


def run(*arguments: str, **environment: str) -> int:
    command = [sys.executable, "-m", "slurm.node", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, "SLURM_NODEID": "3", **environment}, timeout=60, check=False
    ).returncode


@pytest.mark.parametrize(
    ("ends", "recorded", "code"),
    [("exit 0", 0, 0), ("exit 2", 2, 0), ("exit 75", 75, 0), ("exit 1", 1, 1), ("kill -9 $$", 137, 137)],
)
def test_an_end_that_was_explained_is_a_good_one_to_slurm_and_any_is_recorded(tmp_path, ends, recorded, code):
    assert run(f"--record={tmp_path}/train-{{node}}.exit", "--", "bash", "-c", ends) == code
    assert (tmp_path / "train-3.exit").read_text() == f"{recorded}\n"


def test_the_command_learns_its_node_and_a_signal_to_the_whole_step_ends_neither(tmp_path):
    program = f"echo {{node}} > {tmp_path}/said; kill -USR1 $PPID $$; kill -TERM $PPID; sleep 0.1; exit 75"
    assert run(f"--record={tmp_path}/x", "--", "bash", "-c", program) == 0
    assert (tmp_path / "said").read_text() == "3\n" and (tmp_path / "x").read_text() == "75\n"


@pytest.mark.parametrize("given", ["scratch", "absent/scratch"])
def test_only_the_temporary_folder_that_was_made_is_removed(tmp_path, given):
    """Whatever TMPDIR was before: Slurm names /tmp where a job's own folder is not there."""
    precious = tmp_path / "precious"
    (precious / "inner").mkdir(parents=True)
    scratch = tmp_path / given
    keep = f'mkdir -p {scratch}/keep; echo "$TMPDIR" > {tmp_path}/used; touch "$TMPDIR/temporary"'
    for tmpdir in (str(precious), str(tmp_path / "nowhere"), ""):
        assert run(f"--record={tmp_path}/x", f"--scratch={scratch}", "--", "bash", "-c", keep, TMPDIR=tmpdir) == 0
        used = Path((tmp_path / "used").read_text().strip())
        assert used.parent == scratch and not used.exists()
    assert (
        (precious / "inner").is_dir() and (scratch / "keep").is_dir() and list(scratch.iterdir()) == [scratch / "keep"]
    )


def test_without_scratch_nothing_is_made_and_nothing_removed(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_NODEID", "0")
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    handler = signal.getsignal(signal.SIGTERM)
    try:
        code = node.main([f"--record={tmp_path}/x", "--", "bash", "-c", f'echo "$TMPDIR" > {tmp_path}/used'])
    finally:
        signal.signal(signal.SIGTERM, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert code == 0 and (tmp_path / "used").read_text().strip() == os.environ.get("TMPDIR", "")


def test_an_engine_over_several_nodes_finds_each_at_the_address_of_its_interface(tmp_path):
    say = f'echo "$VLLM_HOST_IP" > {tmp_path}/said; echo "$GLOO_SOCKET_IFNAME" > {tmp_path}/gloo'
    given = (f"--record={tmp_path}/x", "--interface=nowhere,lo")
    assert run(*given, "--", "bash", "-c", say, VLLM_HOST_IP="10.0.0.7") == 0
    assert (tmp_path / "said").read_text() == "10.0.0.7\n"  # what the site has set stays
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_HOST_IP"}
    command = [sys.executable, "-m", "slurm.node", *given, "--", "bash", "-c", say]
    subprocess.run(command, cwd=ROOT, env={**environment, "SLURM_NODEID": "0"}, timeout=60, check=True)
    assert (tmp_path / "said").read_text() == "127.0.0.1\n"
    assert (tmp_path / "gloo").read_text() == "lo\n"  # of "nowhere,lo", a list that gloo does not know


def test_an_interface_is_a_name_or_its_beginning_and_must_have_an_address(monkeypatch):
    def entry(family, address):
        return SimpleNamespace(family=family, address=address)

    v4, v6 = socket.AF_INET, socket.AF_INET6
    found = {
        "ib0": [entry(v6, "fe80::1%ib0"), entry(v4, "10.1.0.3")], "ib01": [entry(v4, "10.1.0.4")],
        "eth1": [entry(v6, "fe80::2%eth1"), entry(v6, "fd00::5")], "down": [],
    }  # fmt: skip
    monkeypatch.setattr(node.psutil, "net_if_addrs", lambda: found)
    names = ("ib0", "ib", "=ib01", "down,eth", "eth1,ib0", "down", "wlan")
    first, second, other, none = ("ib0", "10.1.0.3"), ("ib01", "10.1.0.4"), ("eth1", "fd00::5"), ("", "")
    assert [node.interface_of(name) for name in names] == [first, first, second, other, other, none, none]


def test_a_node_without_the_interface_is_not_healthy(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("VLLM_HOST_IP", raising=False)
    options = node._parse([f"--record={tmp_path}/x", "--interface=ib7"])
    assert node._run(options, ["false"]) == exit_codes.UNHEALTHY
    assert "SRPO_INTERFACE = ib7: no such interface has an address; the node has " in capsys.readouterr().err


def test_a_node_without_its_scratch_is_not_healthy_and_leaves_its_code(tmp_path, capfd):
    (tmp_path / "file").write_text("")
    scratch = tmp_path / "file/scratch"
    code = run(f"--record={tmp_path}/x", f"--scratch={scratch}", "--", "true", SLURMD_NODENAME="nodex")
    assert code == 0 and (tmp_path / "x").read_text() == f"{exit_codes.UNHEALTHY}\n"
    told = capfd.readouterr().err
    assert f"nodex: SRPO_SCRATCH = {scratch}: nothing can be written there (Not a directory)" in told


@pytest.fixture
def alone(monkeypatch):
    """A world of one rank."""
    world = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in (world | {"MASTER_PORT": str(free_port()), "SLURMD_NODENAME": "nodex"}).items():
        monkeypatch.setenv(name, value)
    yield
    if health.dist.is_initialized():
        health.dist.destroy_process_group()


def test_a_healthy_node_says_what_it_has(alone, tmp_path, capsys):
    assert health.main(["--device=cpu", "--gpus=8", f"--disk={tmp_path}/absent/run", "--seconds=30"]) == exit_codes.DONE
    assert "health of nodex:" in capsys.readouterr().out


def test_everything_that_a_node_lacks_is_named(alone, tmp_path, capsys):
    wanted = ["--device=cpu", "--memory-gib=1e6", "--disk-gib=1e9", f"--disk={tmp_path}", "--seconds=30"]
    assert health.main(wanted) == exit_codes.UNHEALTHY
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and all(line.startswith("health: nodex: ") for line in told)
    assert "SRPO_MIN_MEMORY_GIB = 1e+06" in told[0] and f"free in {tmp_path}, SRPO_MIN_DISK_GIB = 1e+09" in told[1]


@pytest.mark.skipif(health.torch.cuda.is_available(), reason="this machine has a GPU")
def test_gpus_that_are_not_there_are_counted(alone, capsys, monkeypatch):
    monkeypatch.setattr(health.torch.cuda, "device_count", lambda: 0)  # other tests have put the shim for CPUs there
    assert health.main(["--device=cuda", "--gpus=8", "--seconds=30"]) == exit_codes.UNHEALTHY
    assert "nodex: 0 GPUs are visible, 8 were expected" in capsys.readouterr().err


def test_a_broken_gpu_and_a_lost_mount_are_problems_of_their_node_and_no_crash(alone, capsys, monkeypatch):
    def broken(index):
        if index == 1:
            raise RuntimeError("CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be …")
        return 8, 8

    def gone(folder):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.mem_get_info", broken)
    monkeypatch.setattr("shutil.disk_usage", gone)
    assert health.main(["--device=cuda", "--gpus=2", "--disk=/scratch"]) == exit_codes.UNHEALTHY
    told = capsys.readouterr().err
    assert "GPU 1: CUDA error: uncorrectable ECC error encountered\n" in told and "GPU 0" not in told
    assert "/scratch cannot be used: Stale file handle" in told


def test_a_sum_that_comes_out_wrong_is_a_problem_of_the_network(alone, capsys, monkeypatch):
    monkeypatch.setattr(health.dist, "all_reduce", lambda tensor, group: tensor[5:7].zero_())
    assert health.main(["--device=cpu", "--seconds=30"]) == exit_codes.UNHEALTHY
    assert "the all-reduce failed (2 of 1048576 sums are wrong)" in capsys.readouterr().err


def test_the_time_that_ranks_take_to_connect_is_no_part_of_the_bandwidth(alone, capsys, monkeypatch):
    clock = iter([0.0, *(now for number in range(5) for now in (200.0 + number, 200.001 + number))])
    monkeypatch.setattr(health.time, "perf_counter", lambda: next(clock))
    assert health.main(["--device=cpu", "--seconds=30"]) == exit_codes.DONE
    assert "all-reduce over 1 ranks 4.19 GB/s" in capsys.readouterr().out  # 4 MiB in a millisecond


def test_a_bandwidth_that_only_tcp_has_is_a_problem_on_gpus():
    assert "reached 2.50 GB/s, SRPO_MIN_BANDWIDTH = 5: NCCL may have fallen back" in health.too_slow(2.5, "cuda", 5.0)
    assert health.too_slow(5.0, "cuda", 5.0) == health.too_slow(0.1, "cpu", 5.0) == ""


def settings(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "slurm.settings", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def test_the_batch_host_learns_output_folder_and_device_from_a_sound_configuration(tmp_path):
    make_tiny_model(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "answer": "b", "kind": "exact"}\n')
    (tmp_path / "c.toml").write_text(
        f'[model]\npath = "{tmp_path}/model"\n[data]\ntrain = "{tmp_path}/data.jsonl"\nmax_prompt_length = 32\n'
        "[rollout]\nmax_response_length = 8\n[algorithm]\ndistillation_topk = 20\n"
    )
    found = settings("2", f"{tmp_path}/c.toml", "--run.output_dir", f"{tmp_path}/out", "--run.device", "cpu")
    assert json.loads(found.stdout) == {
        "output": f"{tmp_path}/out", "device": "cpu", "engine_ranks": 1
    }, found.stderr  # fmt: skip
    refused = settings("3", f"{tmp_path}/c.toml", "--parallel.tensor_model_parallel_size", "2")
    assert refused.returncode == exit_codes.MISTAKE and refused.stdout == ""
    assert refused.stderr.startswith("error: ") and "3 ranks were started" in refused.stderr
