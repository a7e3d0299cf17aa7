"""The commands of a Slurm job, without a cluster: what every node runs, and what is refused."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_srpo.config import load_config
from megatron_srpo.core.exit_codes import DONE, MISTAKE
from megatron_srpo.rollout.vllm.token_middleware import TOKEN_VARIABLE
from slurm import commands, launch, serve
from slurm.job import BrokenJob, Job, job_from, parse

ROOT = Path(__file__).parents[2]
CONFIG = "examples/science/srpo_qwen3_8b.toml"
SCRIPTS = sorted(path.name for path in (ROOT / "slurm").glob("srpo_*.sh"))


def dry_run(script: str, *arguments: str, **settings: str) -> list[str]:
    """The lines that a script prints with DRY_RUN=1; nothing of this machine's settings reaches it."""
    environment = {"PATH": os.environ["PATH"], "DRY_RUN": "1", "SRPO_HOST_PYTHON": sys.executable, **settings}
    result = subprocess.run(
        ["bash", f"slurm/{script}", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def header(script: str) -> dict[str, str]:
    """sbatch's options in a script."""
    lines = re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", (ROOT / "slurm" / script).read_text(), re.MULTILINE)
    return dict(lines)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_names_its_configuration_and_asks_for_whole_nodes_a_signal_before_the_limit_and_requeues(script):
    options = header(script)
    assert {"nodes", "time", "requeue", "exclusive"} <= options.keys() and options["ntasks-per-node"] == "1"
    assert options["gpus-per-node"] == "8" and options["signal"].startswith("B:USR1@")
    trained = [line for line in dry_run(script) if " megatron_srpo train " in line][-1]
    config = next(part for part in shlex.split(trained) if part.endswith(".toml"))
    assert Path(config).stem == Path(script).stem and load_config(ROOT / config)
    assert f"--nnodes={options['nodes']} " in trained


def test_every_node_gets_its_number_the_first_ones_address_and_the_users_overrides():
    lines = dry_run("srpo_qwen3_8b.sh", "--nodes", "3", "--optimizer.lr", "1e-6", "--run.name=a b")
    trains = [shlex.split(line) for line in lines if line.startswith("    ") and " train " in line]
    assert [next(part for part in words if "node-rank" in part) for words in trains] == [
        "--node-rank=0", "--node-rank=1", "--node-rank=2"
    ]  # fmt: skip
    for words in trains:
        assert {"--nnodes=3", "--nproc-per-node=8", "--master-addr=node0"} <= set(words)
        assert words[words.index("train") :] == ["train", CONFIG, "--optimizer.lr", "1e-6", "--run.name=a b"]
    checks = next(line for line in lines if "slurm.settings" in line)
    assert f"slurm.settings 24 {CONFIG} --optimizer.lr 1e-6" in checks


def test_a_key_in_hydras_spelling_is_a_key(monkeypatch):
    monkeypatch.chdir(ROOT)
    given = parse([CONFIG, "optimizer.lr=1e-6", "++algorithm.name=grpo", "--run.seed", "1"])
    assert given.overrides == ("--optimizer.lr=1e-6", "--algorithm.name=grpo", "--run.seed", "1")


def test_a_benchmark_and_a_method_are_two_more_files_in_every_step():
    given = ("--method", "grpo", "--benchmark=physics", "--nodes=2", "--rollout-nodes=1", "--run.seed", "4")
    lines = dry_run("srpo_qwen3_8b.sh", *given, SRPO_PYTHON=sys.executable)
    files = [CONFIG, "configs/benchmark/physics.toml", "configs/method/grpo.toml"]
    assert lines[0].endswith("ranks train " + " + ".join(files))
    for what in ("slurm.settings 8", "megatron_srpo serve", "megatron_srpo train"):
        assert any(f"{what} {' '.join(files)} --run.seed 4" in line for line in lines if line.startswith("srun")), what
    assert lines[-1].startswith("# an iteration, s: ")  # the planner has read all of them


def test_an_engines_size_in_a_method_or_benchmark_counts(tmp_path, monkeypatch):
    (tmp_path / "base.toml").write_text("[rollout]\ntensor_parallel_size = 2\n")
    (tmp_path / "more.toml").write_text("[rollout]\ntensor_parallel_size = 4\n")
    job = Job(str(tmp_path / "base.toml"), (), ("a",), overlays=(str(tmp_path / "more.toml"),))
    assert launch.engine_ranks(job) == 4


def test_the_health_check_meets_on_another_port_and_sees_every_rank():
    lines = dry_run("srpo_qwen3_8b.sh", "--nodes=2")
    health, train = (next(line for line in lines if line.startswith("srun") and what in line)
                     for what in ("slurm.health", " train "))  # fmt: skip
    ports = [re.search(r"--master-port=(\d+)", line)[1] for line in (health, train)]
    assert int(ports[1]) == int(ports[0]) + 1
    assert "--nproc-per-node=8" in health and "--gpus=8" in health


def test_ranks_have_most_of_the_health_checks_time_to_start_and_one_node_needs_no_bandwidth():
    job = Job(CONFIG, (), ("a", "b"), health_seconds=900)
    words = commands.health_step(job, device="auto", output="out").command
    assert {"--meet-seconds=600", "--seconds=300", "--min-bandwidth=5"} <= set(words)
    alone = commands.health_step(Job(CONFIG, (), ("a",)), device="auto", output="out").command
    assert not [word for word in alone if "bandwidth" in word] and "--meet-seconds=400" in alone


def test_the_interface_reaches_every_node_unless_it_only_excludes_some():
    steps = [commands.train_step(Job(CONFIG, (), ("a",), interface=name), 1).command for name in ("ib0", "^lo")]
    assert "--interface=ib0" in steps[0] and not [word for word in steps[1] if "--interface" in word]


@pytest.mark.parametrize(
    ("text", "given", "size"),
    [
        ("[rollout]\ntensor_parallel_size = 16  # two nodes\n", (), 16),
        ("[parallel]\ntensor_parallel_size = 4\n[rollout]\n # x\n", (), 1),
        ("rollout.tensor_parallel_size=2\n", (), 2),
        ("[rollout]\ntensor_parallel_size = 4\n", ("--rollout.tensor_parallel_size", "8"), 8),
    ],
)
def test_a_dry_run_reads_the_engines_size_without_todays_python(tmp_path, monkeypatch, text, given, size):
    monkeypatch.setitem(sys.modules, "tomllib", None)  # it came with Python 3.11
    (tmp_path / "c.toml").write_text(text)
    assert launch.engine_ranks(Job(str(tmp_path / "c.toml"), given, ("a",))) == size


def test_a_dry_run_ends_with_what_the_planner_says_of_memory_and_time():
    fits, phases, host, time = dry_run("srpo_qwen3_32b.sh", SRPO_PYTHON=sys.executable)[-4:]
    assert fits.startswith("# memory of a training GPU, GiB: weights 7.6 + gradients 15.3") and fits.endswith("fits")
    assert re.search("GiB: generate .* swap .* score .* train .* publish .* save .* load .*; margin", phases)
    assert "host memory, GiB: saving a checkpoint" in host
    assert time.startswith("# an iteration, s: ")
    tight = dry_run("srpo_qwen3_32b.sh", "--nodes=1", SRPO_PYTHON=sys.executable, SRPO_GPU="a100")
    assert "32 h100" not in "".join(tight) and "DOES NOT FIT" in tight[-3]


@pytest.mark.parametrize("given", [["-h"], ["--help"], ["absent.toml", "--help"]])
def test_help_says_what_the_program_takes(given, capsys):
    assert launch.main(given) == DONE
    assert "--rollout-nodes K" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "told"),
    [(["--optimizer.lrr", "1"], "optimizer.lr"), (["--optimizer.lr=banana"], "optimizer.lr"),
     (["--parallel.tensor_model_parallel_size=3"], "tensor_model_parallel_size"), (["--nodes=0"], "at least 1"),
     (["--nodes=2", "--rollout-nodes=1", "--rollout.tensor_parallel_size=0"], "a whole number ≥ 1")],
)  # fmt: skip
def test_a_dry_run_of_what_the_trainer_would_refuse_is_one_message(given, told, capsys, monkeypatch):
    monkeypatch.setenv("SRPO_PYTHON", sys.executable)
    monkeypatch.chdir(ROOT)
    assert launch.main(["examples/science/srpo_qwen3_8b.toml", "--dry-run", *given]) == MISTAKE
    said = capsys.readouterr()
    assert told in said.err and said.err.startswith("error: ") and not said.out


def test_a_dry_run_without_the_projects_environment_says_that_there_is_no_plan():
    assert dry_run("srpo_qwen3_8b.sh", SRPO_PYTHON="/absent/python")[-1].startswith("# no plan: /absent/python cannot")


@pytest.mark.parametrize(
    ("overrides", "ports"),
    [((), range(8)), (("--rollout.tensor_parallel_size", "4"), range(2)), (("--rollout.tensor_parallel_size=8",), [0])],
)
def test_the_last_nodes_serve_and_the_trainer_learns_every_servers_address(overrides, ports):
    lines = dry_run("srpo_qwen3_8b.sh", "--nodes=4", "--rollout-nodes=2", *overrides)
    check, health, serve, train = (shlex.split(line) for line in lines if line.startswith("srun"))
    assert "--nodelist=node0,node1,node2,node3" in health
    assert "--nodelist=node2,node3" in serve and "--hosts=node2,node3" in serve
    assert "--nodelist=node0,node1" in train and "--nnodes=2" in train
    assert check[check.index("slurm.settings") + 1] == "16"  # ranks that train
    urls = json.loads(train[train.index("--rollout.servers") + 1])
    first = int(next(part for part in serve if part.startswith("--port=")).removeprefix("--port="))
    assert urls == [
        f"http://node{2 + node}:{first + node * len(ports) + port}" for node in range(2) for port in ports
    ]  # fmt: skip
    assert train[train.index("--rollout.placement") + 1] == "servers"


@pytest.mark.parametrize(
    ("given", "share"), [((), "0.9"), (("--rollout.gpu_memory_utilization", "0.7"), "0.7")], ids=["ours", "the user's"]
)
def test_engines_on_nodes_of_their_own_take_most_of_a_gpu(given, share):
    job = Job(CONFIG, given, ("a", "b"), rollout_nodes=1)
    words = commands.serve_step(job, 1).command
    assert [words[i + 1] for i, word in enumerate(words) if word == "--rollout.gpu_memory_utilization"] == [share]
    assert "0.9" not in commands.train_step(job, 1).command


def test_a_nodes_servers_listen_where_the_trainer_looks_for_them():
    job = Job(CONFIG, (), ("a", "b", "c"), rollout_nodes=2, ranks_per_node=8, address="{node}.net", job_id="31")
    for size in (1, 2, 8):
        command = commands.serve_step(job, size).command
        options, server = serve.parse(command[command.index("slurm.serve") + 1 :])
        assert server[2:5] == ["megatron_srpo", "serve", CONFIG]
        found = [address for node in (0, 1) for address in serve.node_addresses(options, node)]
        assert [f"http://{host}:{port}" for host, port in found] == commands.server_urls(job, size)
        assert len(found) == 16 // size


def test_the_servers_token_is_the_one_that_they_ask_for():
    assert commands.TOKEN == TOKEN_VARIABLE


def test_a_site_sets_interface_scratch_container_and_address_in_its_file(tmp_path):
    site = tmp_path / "site.env"
    site.write_text(
        'SRPO_INTERFACE=ib7\nSRPO_SCRATCH="/fast/my scratch"\nSRPO_SRUN_OPTIONS="--container-image=/x.sqsh --y"\n'
        "SRPO_ADDRESS={node}-ib0\nSRPO_RANKS_PER_NODE=4\nSRPO_PYTHON=/opt/python\n"
    )
    lines = dry_run("srpo_qwen3_8b.sh", SRPO_SITE=str(site))
    assert "export NCCL_SOCKET_IFNAME=ib7" in lines and not [line for line in lines if "GLOO_SOCKET" in line]
    srun = [shlex.split(line) for line in lines if line.startswith("srun")]
    for words in srun:
        assert words[words.index("/opt/python") - 2 :][:2] == ["--container-image=/x.sqsh", "--y"]
    assert "--scratch=/fast/my scratch" in srun[-1] and "--disk=/fast/my scratch" in srun[1]
    assert {"--master-addr=node0-ib0", "--nproc-per-node=4"} <= set(srun[-1])


def test_a_container_is_started_once_a_node_and_everything_inside_starts_plain_python():
    settings = {"SRPO_PYTHON": "apptainer exec --nv --bind '/my data' srpo.sif python3"}
    lines = dry_run("srpo_qwen3_8b.sh", "--nodes=2", "--rollout-nodes=1", **settings)
    steps = [shlex.split(line) for line in lines if line.startswith("srun")]
    assert len(steps) == 4  # check, health, servers, training
    for words in steps:
        start = words.index("apptainer")
        assert words[start : start + 8] == [
            "apptainer",
            "exec",
            "--nv",
            "--bind",
            "/my data",
            "srpo.sif",
            "python3",
            "-m",
        ]
        assert words.count("apptainer") == 1
    assert all(words[words.index("--") + 1] == "python3" for words in steps[1:])
    serve = steps[2][steps[2].index("--") + 1 :]
    assert serve[serve.index("--") + 1 :][:4] == ["python3", "-m", "megatron_srpo", "serve"]


def test_every_step_inherits_the_jobs_variables_even_if_sbatch_exports_none():
    lines = dry_run("srpo_qwen3_8b.sh", "--nodes", "2", "--rollout-nodes", "1", SLURM_EXPORT_ENV="NONE")
    steps = [shlex.split(line) for line in lines if line.startswith("srun ")]
    assert len(steps) == 4 and all("--export=ALL" in words for words in steps)


def test_options_of_srun_are_read_as_a_shell_reads_them():
    mounts = "--container-mounts=/my data:/data"
    given = {"SRPO_SRUN_OPTIONS": shlex.join([mounts, "--x"]), "SLURM_JOB_CPUS_PER_NODE": "96(x3),64", "DRY_RUN": "1"}
    job = job_from(parse([CONFIG, "--dry-run"]), given)
    words = commands.train_step(job, 1).argv
    assert {mounts, "--x", "--mpi=none", "--cpus-per-task=64"} <= set(words)
    ours = job_from(parse([CONFIG, "--dry-run"]), {**given, "SRPO_CPUS_PER_TASK": "0"})
    assert not [word for word in commands.train_step(ours, 1).argv if "cpus-per-task" in word]


def test_a_dry_run_shows_the_header_the_sites_settings_and_what_is_absent():
    lines = dry_run(
        "srpo_qwen3_8b.sh", SBATCH_ACCOUNT="me", SRPO_INTERFACE="ib 0", SRPO_PYTHON=sys.executable,
    )  # fmt: skip
    assert "#SBATCH --exclusive" in lines and "#SBATCH --gpus-per-node=8" in lines
    assert "# the site sets SBATCH_ACCOUNT=me" in lines and "# the site sets SRPO_INTERFACE='ib 0'" in lines
    assert "export NCCL_SOCKET_IFNAME='ib 0'" in lines
    assert f"# not there: model.path = {load_config(ROOT / CONFIG).model.path}" in lines


def test_what_a_site_sets_itself_is_left_as_it_is():
    job = Job(CONFIG, (), ("a",), interface="ib0", scratch="/s", environment={"NCCL_SOCKET_IFNAME": "eth9"})
    assert "NCCL_SOCKET_IFNAME" not in commands.environment(job)


def test_every_setting_that_is_read_is_in_the_example_and_in_nothing_else():
    read = set()
    for path in (ROOT / "slurm").iterdir():
        if path.suffix in (".py", ".sh"):
            read |= set(re.findall(r"\bSRPO_[A-Z_]+", path.read_text()))
    example = (ROOT / "slurm/site.env.example").read_text()
    assert read == set(re.findall(r"\bSRPO_[A-Z_]+", example))
    assert not [
        line for line in example.splitlines() if line and not line.startswith("#")
    ]  # nothing until it is edited


def test_jobs_that_share_a_host_do_not_share_ports():
    ports = [Job(CONFIG, (), ("a",), job_id=str(number)).port for number in range(70000, 70500)]
    assert all(later - earlier >= 2 for earlier, later in zip(sorted(ports), sorted(ports)[1:], strict=False))
    assert all(1024 < port < 32768 for port in ports)  # above: Linux gives them to any client


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "expected the path of a TOML file"),
        (["absent.toml"], "no such file"),
        ([CONFIG, "--bogus"], "--bogus: no such argument"),
        ([CONFIG, "another.toml"], "another.toml: no such argument"),
        ([CONFIG, "--benchmark", "maths"], "--benchmark: expected one of biology, chemistry, materials, physics, too"),
        ([CONFIG, "--method"], "--method: expected one of grpo, mix, sdpo, sdpo-correct"),
        ([CONFIG, "--rollout-nodes"], "--rollout-nodes: expected a number of nodes"),
        ([CONFIG, "--nodes=two"], '--nodes: expected a number of nodes, got "two"'),
    ],
)
def test_a_mistake_in_the_arguments_is_one_message(arguments, told, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(BrokenJob, match=re.escape(told)):
        parse(arguments)


@pytest.mark.parametrize(
    ("arguments", "environment", "told"),
    [
        ([], {}, "this is not a Slurm job"),
        (["--dry-run", "--nodes=2", "--rollout-nodes=2"], {}, "--rollout-nodes 2: the job has 2 nodes"),
        (["--dry-run"], {"SRPO_MAX_ATTEMPTS": "many"}, 'SRPO_MAX_ATTEMPTS = "many"'),
        (["--nodes=2"], {"SLURM_JOB_NODELIST": "a"}, "it is sbatch's"),
    ],
)
def test_a_job_that_cannot_be_is_one_message(arguments, environment, told, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(BrokenJob, match=re.escape(told)):
        job_from(parse([CONFIG, *arguments]), environment)


def test_the_batch_host_needs_a_python_without_packages_and_no_newer_than_three_nine():
    code = "import sys; sys.path.insert(0, ''); import slurm.launch; print(slurm.launch.main(['--dry-run']))"
    result = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.stdout == "2\n" and "expected the path of a TOML file" in result.stderr
    import ast

    for name in ("launch", "job", "commands", "supervisor", "attempts"):
        ast.parse((ROOT / f"slurm/{name}.py").read_text(), feature_version=(3, 9))
