"""An engine in the trainer's process leaves no trace there."""

from __future__ import annotations

import gc
import os
import random
import signal
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_srpo.rollout.vllm.preload import preload_links
from megatron_srpo.rollout.vllm.process_state import preserved_generators, preserved_settings
from megatron_srpo.rollout.vllm.server_process import server_environment
from tests.tiny_engines import SAMPLED, VOCAB, tiny_engine, tiny_requests
from tests.tiny_models import make_tiny_model


def draw():
    return random.random(), np.random.rand(), torch.rand(()).item()


def seed(number):
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


@pytest.mark.parametrize("fails", [False, True])
def test_random_generators_continue_where_they_were(fails):
    seed(3)
    expected = [draw(), draw()]
    seed(3)
    found = [draw()]
    try:
        with preserved_generators("cpu"):
            seed(99)
            draw()
            if fails:
                raise ValueError
    except ValueError:
        pass
    assert [*found, draw()] == expected


@pytest.mark.parametrize("fails", [False, True])
def test_torch_settings_signal_handlers_and_preload_are_put_back(fails, monkeypatch):
    def settings():
        return (
            torch.set_num_threads, torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),
            torch.get_float32_matmul_precision(), signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM),
            os.environ.get("LD_PRELOAD"),
        )  # fmt: skip

    before = settings()
    try:
        with preserved_settings():
            torch.set_num_threads(before[1] + 1)
            torch.set_num_threads = lambda threads: None  # as vLLM's CPU worker does
            torch.set_default_dtype(torch.bfloat16)
            torch.set_float32_matmul_precision("medium")
            torch.set_grad_enabled(False)
            monkeypatch.setenv("LD_PRELOAD", "engine.so")
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
            assert all(now != then for now, then in zip(settings(), before, strict=True))
            if fails:
                raise ValueError
    except ValueError:
        pass
    assert settings() == before


def test_libraries_in_a_folder_with_a_space_are_preloaded_by_links_without_one(tmp_path, monkeypatch):
    """The real torch's library under such a path: ld.so loads it in a child and says nothing."""
    packages, temporary = tmp_path / "site packages", tmp_path / "temporary"
    for folder in (packages / "torch" / "lib", packages / "vllm" / "libs", temporary):
        folder.mkdir(parents=True)
    library = next((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    (packages / "torch" / "lib" / library.name).symlink_to(library)
    (packages / "vllm" / "libs" / "libtcmalloc_minimal.so.4").symlink_to(library)
    assert preload_links() is None  # this environment's path has no space: vLLM's own value works
    monkeypatch.setattr(torch, "__file__", str(packages / "torch" / "__init__.py"))
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    for _ in range(2):  # a second engine of the process finds the links
        with preserved_settings():
            assert "libgomp" in os.environ["LD_PRELOAD"] and "libtcmalloc" in os.environ["LD_PRELOAD"]
            shown = subprocess.run(["cat", "/proc/self/maps"], capture_output=True, text=True)
        assert shown.stderr == "" and str(library.resolve()) in shown.stdout
    assert "LD_PRELOAD" not in os.environ
    environment = server_environment("token", None, 1)
    assert " " not in environment["LD_PRELOAD"] and server_environment("token", "0", None).get("LD_PRELOAD") is None


@pytest.fixture
def world(monkeypatch):
    """A trainer's world of one rank, as under torchrun; afterwards vLLM's clean-up is its own again."""
    from vllm.v1.engine import core

    monkeypatch.setattr(core, "cleanup_dist_env_and_memory", core.cleanup_dist_env_and_memory)
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_engines_come_and_go_and_the_trainers_world_and_groups_stay(world, tmp_path):
    folder, group = make_tiny_model(tmp_path, vocab=VOCAB), dist.new_group([0])
    before = torch.get_num_threads(), torch.random.initial_seed()
    found = []
    for _ in range(2):
        with tiny_engine(folder) as engine:
            found.append(engine.generate(tiny_requests(2), SAMPLED))
        del engine
        gc.collect()  # vLLM cleans up once more when an engine is garbage
        assert dist.is_initialized() and dist.group.WORLD is world
        for members in (world, group):
            ones = torch.ones(3)
            dist.all_reduce(ones, group=members)
            assert ones.tolist() == [1, 1, 1]
    assert found[0] == found[1]
    assert (torch.get_num_threads(), torch.random.initial_seed()) == before
