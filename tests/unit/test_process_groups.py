"""How many sockets a rank's process groups take, and the limit of open files."""

import resource
import sys

import pytest
import torch
import torch.distributed as dist

from megatron_srpo.mcore import cpu_shim

cpu_shim.install()

from megatron_srpo.config import ParallelConfig  # noqa: E402
from megatron_srpo.core.errors import UserError  # noqa: E402
from megatron_srpo.mcore import groups  # noqa: E402
from megatron_srpo.mcore.device import choose_device  # noqa: E402
from megatron_srpo.mcore.meta_model import META  # noqa: E402
from megatron_srpo.run import open_files  # noqa: E402

LAYOUTS = {
    "dense": {"tensor_model_parallel_size": 8, "sequence_parallel": True},
    "long": {"tensor_model_parallel_size": 4, "context_parallel_size": 4, "pipeline_model_parallel_size": 4},
    "experts": {
        "tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 2, "expert_model_parallel_size": 64,
        "sequence_parallel": True,
    },
}  # fmt: skip


def _groups_of(layout, rank, world_size, monkeypatch):
    """(backend, ranks) of every group that the rank asks torch for."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    asked, new_group = [], dist.new_group

    def record(ranks=None, *rest, backend=None, **options):
        asked.append((backend, list(range(world_size)) if ranks is None else list(ranks)))
        return new_group(ranks, *rest, backend="fake", **options)

    monkeypatch.setattr(dist, "new_group", record)
    excepthook = sys.excepthook
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        parallel = ParallelConfig(**LAYOUTS[layout])
        groups.initialize(parallel, META, seed=1, timeout_minutes=1, control_backend="gloo")
    finally:
        groups.shutdown()
        sys.excepthook = excepthook
    return asked


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rank_of_512_has_one_mesh_of_sockets_and_megatrons_groups_have_none(layout, monkeypatch):
    asked = _groups_of(layout, 5, 512, monkeypatch)
    mine = [(backend, ranks) for backend, ranks in asked if 5 in ranks]
    assert [ranks for backend, ranks in mine if backend == "gloo"] == [list(range(512))]
    assert {backend for backend, _ in mine} == {None, "gloo"}  # None: the backend of the default group
    assert len(mine) < 40


def test_groups_on_gpus_have_no_part_in_gloo(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    assert choose_device("cuda", 0).backend == "nccl"


def test_transformer_engine_that_is_installed_in_part_is_refused(monkeypatch, tmp_path):
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine/__init__.py").write_text("")
    (tmp_path / "transformer_engine/pytorch.py").write_text("import transformer_engine_torch_that_is_absent")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    told = "cannot be imported: No module named 'transformer_engine_torch_that_is_absent'. Install it again"
    with pytest.raises(UserError, match=told):
        choose_device("auto", 0)
    monkeypatch.delitem(sys.modules, "transformer_engine", raising=False)


def _limits(monkeypatch, soft, hard):
    found = []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limits: found.append(limits))
    return found


def test_a_job_raises_the_soft_limit_of_open_files(monkeypatch):
    found = _limits(monkeypatch, 1024, 4096)
    open_files.allow_open_files(512)
    assert found == [(4096, 4096)]


def test_a_very_high_hard_limit_is_not_used_up(monkeypatch):
    found = _limits(monkeypatch, 1024, resource.RLIM_INFINITY)
    open_files.allow_open_files(512)
    assert found == [(open_files.HIGHEST, resource.RLIM_INFINITY)]


def test_a_job_that_needs_more_open_files_than_the_machine_allows_is_refused(monkeypatch):
    _limits(monkeypatch, 1024, 4096)
    with pytest.raises(UserError, match=r"2048 ranks needs about 4,608 open files, and this machine allows 4,096"):
        open_files.allow_open_files(2048)
