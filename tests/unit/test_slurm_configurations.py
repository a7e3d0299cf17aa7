"""The configurations behind the scripts: the paper's numbers, on a layout that the architecture and the nodes allow."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_srpo.config import check, load_config
from tests.unit.test_config_check import QWEN3_8B
from tests.unit.test_examples_science import PAPER, QWEN3_4B

ROOT = Path(__file__).parents[2]
# What the config.json of each model says, where it differs from Qwen3-8B's.
ARCHITECTURES = {
    "8b": QWEN3_8B,
    "4b": QWEN3_4B,
    "32b": QWEN3_8B | {
        "num_hidden_layers": 64, "hidden_size": 5120, "num_attention_heads": 64, "intermediate_size": 25600,
    },
}  # fmt: skip


def test_every_script_has_its_architecture_here():
    scripts = {path.stem.removeprefix("srpo_qwen3_") for path in (ROOT / "slurm").glob("srpo_*.sh")}
    assert scripts == set(ARCHITECTURES)


@pytest.mark.parametrize("size", ARCHITECTURES)
def test_a_scripts_configuration_passes_all_checks_on_its_own_nodes_and_on_twice_as_many(size):
    script = (ROOT / f"slurm/srpo_qwen3_{size}.sh").read_text()
    nodes = int(re.search(r"^#SBATCH --nodes=(\d+)$", script, re.MULTILINE)[1])
    config = load_config(ROOT / f"examples/science/srpo_qwen3_{size}.toml")
    check(config, ARCHITECTURES[size], 8 * nodes)
    check(config, ARCHITECTURES[size], 16 * nodes)


@pytest.mark.parametrize("size", ARCHITECTURES)
def test_every_size_trains_by_the_papers_numbers(size):
    config = load_config(ROOT / f"examples/science/srpo_qwen3_{size}.toml")
    found = {part: {key: getattr(getattr(config, part), key) for key in keys} for part, keys in PAPER.items()}
    assert found == PAPER
    assert config.model.path.lower().endswith(f"qwen3-{size.replace('_', '-')}")
    assert config.run.output_dir == f"runs/srpo-qwen3-{size.replace('_', '-')}"
