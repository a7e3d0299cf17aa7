"""What is set before vLLM is imported, what killed runs leave behind, and what is refused before an engine starts."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch

from megatron_srpo.config import RolloutConfig
from megatron_srpo.rollout import ColocatedEngine, RolloutError, prepare_environment
from megatron_srpo.rollout.vllm import environment
from megatron_srpo.rollout.vllm.environment import (
    COMMON,
    CPU,
    SOCKETS,
    remove_leftovers,
    shared_memory_name,
    unlink_blocks,
)
from megatron_srpo.rollout.vllm.settings import check_model
from tests.tiny_engines import GREEDY, VOCAB, tiny_engine, tiny_requests
from tests.tiny_models import make_tiny_model

ROOT = Path(__file__).parents[2]


@pytest.fixture
def clean(monkeypatch, tmp_path):
    """None of the variables is set, leftovers are sought in an empty folder, and torch's threads are put back."""
    for name in (*COMMON, *CPU, SOCKETS, "OMP_NUM_THREADS", "LOCAL_WORLD_SIZE", "TMPDIR", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(name, "")  # so that monkeypatch puts back what a test sets
        monkeypatch.delenv(name)
    monkeypatch.setattr(environment, "remove_leftovers", lambda folder=tmp_path: remove_leftovers(folder))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    threads = torch.get_num_threads()
    yield monkeypatch
    torch.set_num_threads(threads)


def test_every_variable_is_set_for_a_cpu_and_only_the_common_ones_for_a_gpu(clean):
    prepare_environment("cuda")
    assert {name: os.environ.get(name) for name in COMMON | CPU} == COMMON | dict.fromkeys(CPU)
    assert "OMP_NUM_THREADS" not in os.environ
    prepare_environment("cpu")
    assert {name: os.environ[name] for name in COMMON | CPU} == COMMON | CPU


def test_what_the_user_has_set_stays(clean):
    mine = {"VLLM_LOGGING_LEVEL": "INFO", "TORCHDYNAMO_DISABLE": "0", "OMP_NUM_THREADS": "5"}
    for name, value in mine.items():
        clean.setenv(name, value)
    prepare_environment("cpu")
    assert {name: os.environ[name] for name in mine} == mine


@pytest.mark.parametrize(("cores", "ranks", "threads"), [(8, "2", "4"), (7, "2", "3"), (2, "4", "1"), (3, None, "3")])
def test_the_ranks_of_a_machine_share_its_cores(clean, cores, ranks, threads):
    clean.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    if ranks:
        clean.setenv("LOCAL_WORLD_SIZE", ranks)
    prepare_environment("cpu")
    assert os.environ["OMP_NUM_THREADS"] == threads
    assert torch.get_num_threads() == int(threads)


def test_preparing_imports_no_vllm():
    code = (
        "import sys; from megatron_srpo.rollout import prepare_environment as p; p('cpu'); print('vllm' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.fixture
def dead():
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def blocks(folder, *names):
    for name in names:
        (folder / name).touch()
    return folder


def left(folder):
    return {path.name for path in folder.iterdir()}


def test_blocks_of_our_dead_processes_are_removed_and_no_others(tmp_path, dead):
    gone, alive = shared_memory_name(dead), shared_memory_name(os.getpid())
    others = {f"{alive}-tp:0", "-tp:0", "psm_1234", f"other{gone}-tp:0", f"{gone.replace('msrpo', 'someone')}-tp:0"}
    blocks(tmp_path, f"{gone}-tp:0", f"-{gone}-world:1", *others)
    assert sorted(remove_leftovers(tmp_path)) == sorted([f"{gone}-tp:0", f"-{gone}-world:1"])
    assert left(tmp_path) == others


def test_blocks_of_another_host_or_user_are_left_alone(tmp_path, dead, monkeypatch):
    name = f"{shared_memory_name(dead)}-tp:0"
    blocks(tmp_path, name)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(socket, "gethostname", lambda: "another-host")
        assert remove_leftovers(tmp_path) == []
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(os, "getuid", lambda: (tmp_path / name).stat().st_uid + 1)
        assert remove_leftovers(tmp_path) == []
    assert remove_leftovers(tmp_path) == [name]


def test_a_machine_without_shared_memory_has_no_leftovers(tmp_path):
    assert remove_leftovers(tmp_path / "none") == []


def test_preparing_a_cpu_removes_leftovers(clean, tmp_path, dead):
    blocks(tmp_path, name := f"{shared_memory_name(dead)}-tp:0")
    prepare_environment("cuda")
    assert name in left(tmp_path)
    prepare_environment("cpu")
    assert name not in left(tmp_path)


@pytest.mark.parametrize("long", [False, True], ids=["short", "long"])
def test_vllms_sockets_are_in_a_folder_that_goes_with_the_process_or_with_the_next_start(tmp_path, long):
    """And that leaves room for a socket's name, whatever the temporary folder is."""
    (tmp_path / ("x" * 60)).mkdir()
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        temporary, expected = (tmp_path / ("x" * 60), Path("/tmp")) if long else (Path(short), Path(short))
        program = (
            "import os, socket, tempfile; from megatron_srpo.rollout.vllm.environment import *;"
            f"tempfile.tempdir = {str(temporary)!r}; prepare_environment('cuda');"
            "socket.socket(socket.AF_UNIX).bind(os.path.join(os.environ[SOCKETS], 36 * 's'));"
            "print(os.environ[SOCKETS], flush=True);"
        )
        environment = {name: value for name, value in os.environ.items() if name != SOCKETS}
        run = partial(subprocess.run, capture_output=True, text=True, env=environment, cwd=ROOT)
        ended = run([sys.executable, "-c", program], check=True).stdout.strip()
        assert Path(ended).parent == expected and not Path(ended).exists()
        killed = run([sys.executable, "-c", program + "os.kill(os.getpid(), 9)"]).stdout.strip()
        assert Path(killed, 36 * "s").exists()
        run([sys.executable, "-c", program], check=True)
        assert not Path(killed).exists()


@pytest.mark.slow
def test_everything_temporary_is_in_a_folder_that_goes_with_the_process_or_with_the_next_start():
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        program = (
            "import os, subprocess, sys, tempfile;"
            "from megatron_srpo.rollout.vllm.environment import prepare_environment; prepare_environment('cuda');"
            "subprocess.run([sys.executable, '-c', 'import tempfile; tempfile.mkdtemp()'], check=True);"
            "print(tempfile.mkdtemp(), flush=True);"
        )
        run = partial(subprocess.run, capture_output=True, text=True, env={**os.environ, "TMPDIR": short}, cwd=ROOT)
        run([sys.executable, "-c", program], check=True)
        assert left(Path(short)) == set()
        killed = Path(run([sys.executable, "-c", program + "os.kill(os.getpid(), 9)"]).stdout.strip())
        assert killed.is_dir() and killed.parent.parent == Path(short) and len(left(killed.parent)) == 2
        run([sys.executable, "-c", program], check=True)
        assert left(Path(short)) == set()


def test_unlinking_takes_the_blocks_of_one_engine_alone(tmp_path):
    blocks(tmp_path, "msrpo.a-1.17-tp:0", "-msrpo.a-1.17-world:0", "msrpo.a-1.170-tp:0", "msrpo.b-1.17-tp:0")
    unlink_blocks("msrpo.a-1.17", tmp_path)
    assert left(tmp_path) == {"msrpo.a-1.170-tp:0", "msrpo.b-1.17-tp:0"}


@pytest.fixture
def model(tmp_path):
    """A function that writes a config.json with the given changes, and checks it."""

    def check(tensor_parallel_size=1, max_model_len=64, device="cpu", **changes):
        config = {"num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 32, "hidden_size": 384}
        config |= {"num_hidden_layers": 2, "vocab_size": 100}
        config |= {"intermediate_size": 120, "max_position_embeddings": 128} | changes
        (tmp_path / "config.json").write_text(json.dumps(config))
        check_model(str(tmp_path), RolloutConfig(tensor_parallel_size=tensor_parallel_size), max_model_len, device)

    return check


def test_a_model_that_fits_is_taken(model):
    model()
    model(head_dim=None)  # 384 / 12 = 32
    model(max_model_len=128)
    model(tensor_parallel_size=4)
    model(tensor_parallel_size=12)  # more ranks than key-value heads: 3 on each
    model(device="cuda", head_dim=48)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 48}, "head_dim 48: on a CPU, vLLM takes 32, 64, .*Use another model, or a GPU"),
        ({"head_dim": None, "hidden_size": 120}, "head_dim 10: "),
        ({"tensor_parallel_size": 5}, "tensor_parallel_size = 5 does not fit .* the 12 attention heads"),
        ({"tensor_parallel_size": 6}, "tensor_parallel_size = 6 does not fit .* the 4 key-value heads"),
        ({"tensor_parallel_size": 2, "intermediate_size": 121}, r"intermediate_size \(121\)"),
        ({"max_model_len": 129}, "129 tokens long, .* ends at 128 .*max_prompt_length or rollout.max_response_length"),
    ],
)
def test_a_model_that_vllm_would_refuse_is_refused_at_once(model, changes, message):
    with pytest.raises(RolloutError, match=message):
        model(**changes)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(RolloutError, match=r"has no config.json: expected a Hugging Face model folder"):
        check_model(str(tmp_path), RolloutConfig(), 64, "cpu")


def test_a_start_that_vllm_refuses_is_one_message_and_leaves_the_process_fit_for_another(tmp_path):
    folder = make_tiny_model(tmp_path, vocab=VOCAB)
    with (
        pytest.raises(RolloutError, match=r"vLLM did not start on .*\(cpu\): .*Change rollout.cpu_kv_cache_gib"),
        tiny_engine(folder, cpu_kv_cache_gib=1e-5),
    ):
        pass
    assert not torch.distributed.is_initialized()
    with tiny_engine(folder) as engine:
        assert engine.generate(tiny_requests(1), GREEDY)


def test_an_engine_of_more_ranks_than_there_are_is_refused(tmp_path):
    rollout = RolloutConfig(tensor_parallel_size=2)
    with pytest.raises(RolloutError, match=r"tensor_parallel_size = 2 does not divide the 1 rank\(s\)"):
        ColocatedEngine(hf_dir=str(tmp_path), dtype="float32", rollout=rollout, max_model_len=64, seed=0)
