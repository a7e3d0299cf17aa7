"""Without the checkout, and without packages: one message with a cure that exists there."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from megatron_srpo.core import installation
from megatron_srpo.core.exit_codes import MISTAKE
from megatron_srpo.run import cli

ROOT = Path(__file__).resolve().parents[2]
# -S hides all installed packages: only the standard library and this package are left.
ALONE = [sys.executable, "-S", "-c"]


@pytest.mark.parametrize("start", ["main", "torchrun"])
def test_a_program_without_its_packages_is_one_message_and_exit_code_2(start):
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from megatron_srpo.entry import {start}; sys.exit({start}())"
    )
    done = subprocess.run([*ALONE, program], capture_output=True, text=True, cwd="/")
    assert done.returncode == MISTAKE and done.stdout == ""
    assert done.stderr.startswith("error: this Python (") and done.stderr.count("\n") == 1
    assert "has no module" in done.stderr and "make setup" in done.stderr


@pytest.mark.parametrize(
    ("module", "cure"),
    [
        ("matplotlib.figure", "-m pip install 'megatron-srpo[report]'"),
        ("pyarrow", "-m pip install 'megatron-srpo[data]'"),
        ("typer", "-m pip install 'megatron-srpo'"),
        ("torch", "-m pip install 'megatron-srpo[cpu]' (without a GPU)"),
    ],
)
def test_outside_a_checkout_the_cure_is_an_extra_of_the_package(module, cure, monkeypatch, tmp_path):
    error = ModuleNotFoundError(f"No module named {module!r}", name=module)
    assert "make setup" in cli.message_for_user(error)
    monkeypatch.setattr(installation, "CHECKOUT", tmp_path)
    told = cli.message_for_user(error)
    assert f"has no module {module!r}" in told and cure in told and "make setup" not in told
    assert installation.setup_command(cuda=True).endswith("-m pip install 'megatron-srpo[gpu]'")


def test_a_module_of_the_package_that_is_missing_is_a_defect():
    assert cli.message_for_user(ModuleNotFoundError("x", name="megatron_srpo.rnu")) is None


def test_the_metadata_has_every_extra_that_a_message_names_and_the_marker_of_types():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert {*installation.EXTRAS.values(), "cpu", "gpu", "plan"} <= set(project["project"]["optional-dependencies"])
    assert (ROOT / "megatron_srpo" / "py.typed").is_file()
    assert project["tool"]["setuptools"]["package-data"] == {"megatron_srpo": ["py.typed"]}
    assert project["project"]["scripts"]["megatron-srpo"] == "megatron_srpo.entry:main"
