"""The configurations behind the scripts: the paper's numbers, on a layout that the architecture, the nodes, and the
memory of 80 GB GPUs allow."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_srpo.config import Config, check, load_config
from megatron_srpo.plan import SHIPPED, evaluate, machine_of, read_architecture, shipped_if_absent
from megatron_srpo.plan.memory import PHASES
from slurm import plan
from tests.unit.test_paper_settings import PAPER, value_of

ROOT = Path(__file__).parents[2]
MODELS = {name.removeprefix("Qwen3-").lower().replace("-", "_"): name for name in SHIPPED}
MODELS["32b_lora"] = "Qwen3-32B"
SIZES = sorted(path.stem.removeprefix("srpo_qwen3_") for path in (ROOT / "slurm").glob("srpo_*.sh"))


def nodes_of(size: str) -> int:
    """What the script asks sbatch for."""
    script = (ROOT / f"slurm/srpo_qwen3_{size}.sh").read_text()
    return int(re.search(r"^#SBATCH --nodes=(\d+)$", script, re.MULTILINE)[1])


def configuration(size: str) -> Config:
    return load_config(ROOT / f"examples/science/srpo_qwen3_{size}.toml")


@pytest.mark.parametrize("size", SIZES)
def test_a_scripts_configuration_passes_all_checks_on_its_own_nodes_and_on_twice_as_many(size):
    for nodes in (nodes_of(size), 2 * nodes_of(size)):
        check(configuration(size), SHIPPED[MODELS[size]], 8 * nodes)


@pytest.mark.parametrize("size", SIZES)
def test_by_the_planner_it_fits_gpus_of_80_gb(size):
    config = configuration(size)
    layout = plan.layout_of(config, 8 * nodes_of(size))
    found = evaluate(
        read_architecture(shipped_if_absent(config.model.path))[0], layout, machine_of("h100"), plan.workload_of(config)
    )
    assert found.memory.fits, (found.memory.lines, found.memory.notes)


@pytest.mark.parametrize("size", SIZES)
def test_every_phase_of_every_shipped_combination_fits_with_a_margin_and_its_checkpoints_fit_the_host(size):
    overlays = [[method] for method in sorted((ROOT / "configs/method").glob("*.toml"))]
    if size == "8b":
        overlays += [[model] for model in sorted((ROOT / "configs/model").glob("*.toml"))]
    overlays += [[benchmark] for benchmark in sorted((ROOT / "configs/benchmark").glob("*.toml"))]
    for more in overlays:
        config = load_config([ROOT / f"examples/science/srpo_qwen3_{size}.toml", *more])
        arch = read_architecture(shipped_if_absent(config.model.path))[0]
        layout = plan.layout_of(config, 8 * nodes_of(size))
        memory = evaluate(arch, layout, machine_of("h100"), plan.workload_of(config)).memory
        assert tuple(memory.phases) == PHASES, more
        assert max(memory.phases.values()) == pytest.approx(memory.total)
        assert all(0 < needed <= memory.limit for needed in memory.phases.values()), (more, memory.phases)
        assert 0 < memory.host_loading < memory.host_saving < 0.3e12, more  # nodes of 8 H100s have 2 TB


@pytest.mark.parametrize("size", SIZES)
def test_every_size_trains_by_the_papers_numbers(size):
    config = configuration(size)
    assert {key: value_of(config, key) for key in PAPER} == PAPER
    assert config.model.path == f"runs/models/{MODELS[size]}"
    assert config.run.output_dir == f"runs/qwen3-{size.replace('_', '-')}/chemistry/srpo"
