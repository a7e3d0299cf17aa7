"""Without the checkout, and without packages: one message with a cure that exists there."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from megatron_srpo.core import installation
from megatron_srpo.core.exit_codes import MISTAKE
from megatron_srpo.run import cli
from tests.tiny_models import make_tiny_model

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
    named = project["tool"]["setuptools"]["package-data"]["megatron_srpo"]
    package = ROOT / "megatron_srpo"
    others = {str(file.relative_to(package)) for file in package.rglob("*") if file.is_file() and file.suffix != ".py"}
    assert {name for name in others if "__pycache__" not in name} == set(named) and "py.typed" in named
    assert project["project"]["scripts"]["megatron-srpo"] == "megatron_srpo.entry:main"


BASE_ONLY = """
import importlib.abc, os, sys

HIDDEN = {"torch", "megatron", "vllm", "transformers", "tokenizers", "matplotlib", "pyarrow", "datasets", "psutil"}

class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hide())
from megatron_srpo.run import cli
for line in sys.stdin.read().splitlines():
    print(f"{line.split()[0]} {cli.main(line.split())}", file=sys.stderr, flush=True)
    os.environ.pop("RANK", None)
"""


def test_with_the_base_packages_alone_every_command_works_or_says_what_it_needs(tmp_path):
    model = make_tiny_model(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "answer": "b", "kind": "exact"}\n')
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "critic/score/mean": 0.5}\n')
    config = tmp_path / "run.toml"
    config.write_text(
        f'[run]\noutput_dir = "{tmp_path}/out"\n[model]\npath = "{model}"\n'
        f'[data]\ntrain = "{tmp_path}/rows.jsonl"\ntest = "{tmp_path}/rows.jsonl"\nmax_prompt_length = 32\n'
        "[rollout]\nmax_response_length = 16\n"
    )
    commands = [
        "plan Qwen3-8B --gpus 8 --gpu H100 --top 1", f"plan --check {config} --gpus 1", f"report {tmp_path}",
        f"check {config}", f"train {config}", f"eval {config} --hf {model}", f"checkpoints {tmp_path}",
        f"convert-hf-to-megatron --hf {model} --out {tmp_path}/m", f"compare-logits --hf {model} --token-ids 1",
        f"prepare-data convert {tmp_path}/rows.jsonl --out {tmp_path}/rows --test-size 0",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", BASE_ONLY], input="\n".join(commands), capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    codes = dict(
        line.split() for line in done.stderr.splitlines() if not line.startswith("error") and line.count(" ") == 1
    )
    assert codes["prepare-data"] == "0", done.stderr
    assert {name for name, code in codes.items() if code == "2"} >= {"report", "check", "train", "eval"}
    refusals = [line for line in done.stderr.splitlines() if "has no module" in line]
    assert len(refusals) >= 6 and all(line.startswith("error: this Python") for line in refusals)
