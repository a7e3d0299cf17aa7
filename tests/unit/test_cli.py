"""The command line: what it passes on, how it refuses, and that its surface does not change unnoticed."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import typer
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from megatron_srpo import __version__
from megatron_srpo.commands import TOOLS
from megatron_srpo.config.reference import defaults
from megatron_srpo.core import exit_codes
from megatron_srpo.core.errors import ConfigError, UserError
from megatron_srpo.run import cli
from megatron_srpo.run.output_lock import OutputLock

ROOT = Path(__file__).resolve().parents[2]
FROZEN = Path(__file__).with_name("cli_frozen.txt")
HF = {
    "architectures": ["Qwen3ForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 128,
    "vocab_size": 53,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
}
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def run_file(tmp_path, monkeypatch):
    """A sound run of two tensor-parallel ranks: configuration, model folder and data."""
    for name in RANK_VARIABLES:
        monkeypatch.setenv(name, "")  # restored after the test, whatever the command sets
        monkeypatch.delenv(name)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(HF))
    (model / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")  # a whole file without tensors
    (tmp_path / "rows.jsonl").write_text("{}\n")
    file = tmp_path / "run.toml"
    file.write_text(
        f"""
        [run]
        output_dir = "{tmp_path}/out"
        [model]
        path = "{model}"
        [parallel]
        tensor_model_parallel_size = 2
        sequence_parallel = true
        [data]
        train = "{tmp_path}/rows.jsonl"
        test = "{tmp_path}/rows.jsonl"
        max_prompt_length = 16
        [rollout]
        max_response_length = 8
        [algorithm]
        distillation_topk = 20
        """
    )
    return file


class FakeLaunch:
    """Stands for megatron_srpo.run.launch and keeps what it was called with."""

    def __init__(self, result=0):
        self.result, self.calls = result, []

    def _called(self, name, config, **options):
        self.calls.append((name, config, options, dict(os.environ)))
        if isinstance(self.result, BaseException):
            raise self.result
        return self.result

    def train(self, config, lock):
        return self._called("train", config)

    def evaluate(self, config, **options):
        return self._called("evaluate", config, **options)


@pytest.fixture
def launch(monkeypatch):
    fake = FakeLaunch()
    monkeypatch.setitem(sys.modules, "megatron_srpo.run.launch", fake)
    monkeypatch.setattr("megatron_srpo.run.launch", fake, raising=False)
    return fake


def as_ranks(monkeypatch, world, rank=0):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world))


# ---- train -----------------------------------------------------------------------------------------------------------


def test_train_starts_the_run_with_the_overrides(run_file, launch, monkeypatch):
    as_ranks(monkeypatch, 2)
    assert cli.main(["train", str(run_file), "--optimizer.lr", "1e-3", "--run.seed=7"]) == 0
    [(name, config, _, _)] = launch.calls
    assert (name, config.optimizer.lr, config.run.seed) == ("train", 1e-3, 7)


def test_a_second_run_in_the_same_folder_is_refused_and_changes_nothing(run_file, launch, monkeypatch, capfd):
    as_ranks(monkeypatch, 2)
    out = run_file.parent / "out"
    with OutputLock(out):
        (out / "config.toml").write_text("the first one's")
        assert cli.main(["train", str(run_file)]) == 2
    assert f"{out} is in use by another run" in capfd.readouterr().err
    assert (out / "config.toml").read_text() == "the first one's" and launch.calls == []
    assert cli.main(["train", str(run_file)]) == 0


def test_overrides_may_stand_before_the_file(run_file, launch, monkeypatch):
    as_ranks(monkeypatch, 2)
    assert cli.main(["train", "--run.seed", "7", str(run_file)]) == 0
    assert launch.calls[0][1].run.seed == 7


def test_only_the_driver_saves_the_configuration(run_file, launch, monkeypatch):
    as_ranks(monkeypatch, 2, rank=1)
    assert cli.main(["train", str(run_file)]) == 0
    assert not (run_file.parent / "out").exists()


def test_without_torchrun_train_is_a_world_of_one(run_file, launch):
    alone = ["--parallel.tensor_model_parallel_size", "1", "--parallel.sequence_parallel", "false"]
    assert cli.main(["train", str(run_file), *alone]) == 0
    environment = launch.calls[0][3]
    assert [environment[name] for name in RANK_VARIABLES[:5]] == ["0", "0", "1", "1", "127.0.0.1"]
    assert int(environment["MASTER_PORT"]) > 0


def test_train_returns_the_runs_exit_code(run_file, launch, monkeypatch):
    as_ranks(monkeypatch, 2)
    launch.result = 130
    assert cli.main(["train", str(run_file)]) == 130


def test_a_refused_run_says_everything_at_once_and_starts_nothing(run_file, launch, capfd):
    (run_file.parent / "model" / "model.safetensors").unlink()
    overrides = ["--rollout.top_p", "0.5", "--data.train", "absent.jsonl"]
    assert cli.main(["train", str(run_file), *overrides]) == 2
    told = capfd.readouterr().err
    assert told.startswith("error: this configuration: 4 problems\n") and told.count("\n  ") == 4
    for text in ("rollout.top_p = 0.5", "absent.jsonl", "1 rank was started", "has no weights"):
        assert text in told
    assert launch.calls == [] and "Traceback" not in told


def test_the_held_out_file_is_needed_only_by_a_run_that_evaluates(run_file, launch, monkeypatch):
    as_ranks(monkeypatch, 2)
    missing = ["--data.test", "absent.jsonl"]
    assert cli.main(["train", str(run_file), *missing]) == 0
    assert cli.main(["train", str(run_file), *missing, "--eval.every", "1"]) == 2


# ---- eval ------------------------------------------------------------------------------------------------------------


def test_eval_without_torchrun_folds_the_layout_into_one_process(run_file, launch):
    assert cli.main(["eval", str(run_file), "--checkpoint", "some/run", "--eval.n_samples", "4"]) == 0
    [(name, config, options, _)] = launch.calls
    assert (name, config.eval.n_samples) == ("evaluate", 4)
    assert (config.parallel.tensor_model_parallel_size, config.parallel.sequence_parallel) == (1, False)
    responses = Path(config.run.output_dir) / "eval" / "test.jsonl"
    assert options == {"checkpoint": Path("some/run"), "split": "test", "responses": responses, "taught": False}
    assert responses.parent.is_dir()


def test_eval_without_torchrun_folds_every_size_of_the_layout(run_file, launch, capfd):
    sizes = {"context_parallel_size": 2, "pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
    sizes |= {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 2}
    lines = "".join(f"{name} = {size}\n" for name, size in sizes.items())
    text = run_file.read_text().replace("[parallel]\n", f"[parallel]\n{lines}")
    run_file.write_text(text + "\n[train]\nmax_tokens_per_gpu = 16\n")  # rows of 32 tokens, which the teacher needs
    assert cli.main(["eval", str(run_file), "--checkpoint", "x"]) == 0, capfd.readouterr().err
    layout = launch.calls[0][1].parallel.model_dump()
    assert {size for name, size in layout.items() if name.endswith("_size")} == {1}
    assert launch.calls[0][1].row_budget == 32


def test_eval_as_teacher_needs_solutions_and_writes_a_file_of_its_own(run_file, launch, capsys):
    asked = ["eval", str(run_file), "--checkpoint", "some/run", "--as-teacher"]
    assert cli.main(asked) == 2 and "data.solution_key" in capsys.readouterr().err
    assert cli.main([*asked, "--data.solution_key", "worked"]) == 0
    assert launch.calls[-1][2]["taught"] and launch.calls[-1][2]["responses"].name == "test-taught.jsonl"


@pytest.mark.parametrize("part", ["", "checkpoints", "checkpoints/step_00000002"])
def test_responses_of_an_evaluation_go_into_the_run_whose_checkpoint_it_is(run_file, launch, tmp_path, part):
    (tmp_path / "old" / "checkpoints" / "step_00000002").mkdir(parents=True)
    assert cli.main(["eval", str(run_file), "--checkpoint", str(tmp_path / "old" / part)]) == 0
    assert launch.calls[0][2]["responses"] == tmp_path / "old" / "eval" / "test.jsonl"


@pytest.mark.parametrize(("given", "taken"), [([], 0), (["--eval.max_prompts=1"], 1)])
def test_eval_takes_all_prompts_unless_the_command_line_limits_them(run_file, launch, given, taken):
    run_file.write_text(run_file.read_text() + "\n[eval]\nmax_prompts = 2\n")
    assert cli.main(["eval", str(run_file), "--checkpoint", "x", *given]) == 0
    assert launch.calls[0][1].eval.max_prompts == taken


def test_eval_refuses_a_place_for_responses_that_cannot_be_written(run_file, launch, capfd):
    assert cli.main(["eval", str(run_file), "--checkpoint", "x", "--responses", f"{run_file}/a.jsonl"]) == 2
    assert "the responses cannot be written to" in capfd.readouterr().err and launch.calls == []


@pytest.mark.parametrize("place", ["a_folder", "a_pipe"])
def test_eval_replaces_nothing_but_a_file_by_its_responses(run_file, launch, tmp_path, capfd, place):
    (tmp_path / "a_folder").mkdir()
    os.mkfifo(tmp_path / "a_pipe")
    assert cli.main(["eval", str(run_file), "--checkpoint", "x", "--responses", str(tmp_path / place)]) == 2
    assert f"--responses {tmp_path / place}" in capfd.readouterr().err and launch.calls == []


def test_eval_under_torchrun_keeps_the_layout(run_file, launch, monkeypatch):
    as_ranks(monkeypatch, 2)
    assert cli.main(["eval", str(run_file), "--checkpoint", "some/run", "--split", "train"]) == 0
    assert launch.calls[0][1].parallel.tensor_model_parallel_size == 2
    assert launch.calls[0][2]["split"] == "train"


def test_a_layout_that_the_user_gives_is_not_folded(run_file, launch, capfd):
    given = ["--parallel.tensor_model_parallel_size=2", "--parallel.sequence_parallel=true"]
    assert cli.main(["eval", str(run_file), "--checkpoint", "x", *given]) == 2
    assert "1 rank was started" in capfd.readouterr().err


def test_eval_of_a_hugging_face_folder_reads_that_folder(run_file, launch):
    model = run_file.parent / "model"
    trained = model.rename(model.with_name("trained"))
    assert cli.main(["eval", str(run_file), "--hf", str(trained)]) == 0
    assert launch.calls[0][1].model.path == str(trained)
    assert launch.calls[0][2]["checkpoint"] is None


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "expected one of --checkpoint DIR and --hf DIR, got neither"),
        (["--checkpoint", "a", "--hf", "b"], "got both"),
        (["--hf", "b", "--split", "dev"], "expected --split train or --split test, got dev"),
        (["--hf", "absent"], "no such folder"),
    ],
)
def test_eval_refuses_what_it_cannot_do(run_file, launch, capfd, arguments, expected):
    assert cli.main(["eval", str(run_file), *arguments]) == 2
    assert expected in capfd.readouterr().err and launch.calls == []


def test_every_command_with_a_configuration_takes_several_files(run_file, launch, monkeypatch, tmp_path, capfd):
    more = tmp_path / "more.toml"
    more.write_text("[run]\nseed = 7\n[parallel]\ntensor_model_parallel_size = 1\nsequence_parallel = false\n")
    files, served = [str(run_file), str(more)], []
    monkeypatch.setattr("megatron_srpo.run.engines.serve", lambda config, host, port: served.append(config.run.seed))
    assert cli.main(["train", *files]) == 0, capfd.readouterr().err
    assert cli.main(["eval", *files, "--hf", str(tmp_path / "model")]) == 0, capfd.readouterr().err
    assert cli.main(["serve", *files]) == 0 and served == [7]
    assert [config.run.seed for _, config, _, _ in launch.calls] == [7, 7]
    assert (
        cli.main(
            [
                "plan",
                "--gpus",
                "3",
                "--parallel.tensor_model_parallel_size",
                "2",
                *(part for file in files for part in ("--check", file)),
            ]
        )
        == 2
    )
    assert f"{files[0]} + {files[1]} on 3 GPUs" in capfd.readouterr().err


# ---- report, help, usage ---------------------------------------------------------------------------------------------


def test_a_server_is_refused_a_tokenizer_that_is_not_there(run_file, capfd):
    assert cli.main(["serve", str(run_file), "--model.tokenizer=nope"]) == 2
    assert 'model.tokenizer = "nope": no such folder' in capfd.readouterr().err


def test_a_server_takes_a_configuration_for_any_number_of_ranks(run_file, monkeypatch, capfd):
    served = []
    monkeypatch.setattr("megatron_srpo.run.engines.serve", lambda config, host, port: served.append((host, port)))
    assert cli.main(["serve", str(run_file), "--port=8001"]) == 0, capfd.readouterr().err
    assert served == [("127.0.0.1", 8001)]


def test_report_draws_the_curves_of_a_run(tmp_path, capfd):
    rows = [json.dumps({"step": step, "critic/score/mean": step / 3}) for step in range(3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    assert cli.main(["report", str(tmp_path)]) == 0
    assert (tmp_path / "curves.png").stat().st_size > 1000 and "curves.png" in capfd.readouterr().out


def test_report_of_a_folder_without_metrics_is_refused(tmp_path, capfd):
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "metrics.jsonl is not there" in capfd.readouterr().err


def test_report_is_refused_a_place_that_is_no_folder(tmp_path, capfd):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "critic/score/mean": 0.5}\n')
    assert cli.main(["report", str(tmp_path), "--out", str(file)]) == 2
    assert f"report: --out {file}: is a file" in capfd.readouterr().err


def test_a_disk_that_refuses_a_command_is_told_with_a_cure_that_fits():
    full, closed = OSError(errno.ENOSPC, "No space left on device", "a"), PermissionError(13, "Permission denied", "a")
    assert cli.message_for_user(full) == "a: No space left on device. Make room, or choose another folder"
    assert cli.message_for_user(closed) == (
        "a: Permission denied. Make the folder writable (its disk, mount and permissions), or choose another folder"
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train"], "Missing argument"),
        (["trian", "x.toml"], "No such command"),
        (["train", "x.toml", "--lr", "3"], "set by --optimizer.lr VALUE"),
        (["doctor", "x.toml"], "unexpected extra argument"),
        (["train", "absent.toml"], "absent.toml: no such file"),
        (["doctor", "--jsn"], "--jsn"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(arguments, expected, capfd, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert cli.main(arguments) == 2
    told = capfd.readouterr().err
    assert expected in told and told.startswith("error: ") and told.count("\n") == 1


def test_the_version_and_the_commands_of_the_tools_are_there(capfd, tmp_path):
    assert cli.main(["--version"]) == 0 and capfd.readouterr().out == f"megatron_srpo {__version__}\n"
    assert cli.main(["--help"]) == 0
    told = capfd.readouterr().out
    assert [name for name in TOOLS if name not in told] == []
    for name in TOOLS:
        assert cli.main([name, "--help"]) == 0
        assert "Usage" in capfd.readouterr().out
    assert cli.main(["prepare-data", "convert", str(tmp_path / "no.jsonl"), "--out", str(tmp_path / "o")]) == 2
    assert capfd.readouterr().err.startswith("prepare-data: ")


def test_a_shell_can_complete_commands(monkeypatch, capfd):
    monkeypatch.setenv("_MEGATRON_SRPO_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "megatron-srpo ev")
    monkeypatch.setenv("COMP_CWORD", "1")
    with pytest.raises(SystemExit):
        cli.main([])
    assert capfd.readouterr().out.split() == ["eval"]


@pytest.mark.parametrize("arguments", [[], ["--help"], ["train", "--help"], ["eval", "--help"]])
def test_help_is_no_error(arguments, capfd):
    assert cli.main(arguments) == 0
    assert "Usage: python -m megatron_srpo" in capfd.readouterr().out


def test_overrides_are_found_wherever_they_stand():
    own, overrides = cli.split_overrides(
        ["eval", "--a.b", "-1", "run.toml", "--hf=x.y/z", "--c.d=1 2", "--checkpoint", "e.f", "--g.h", "--i.j", "k"]
    )
    assert own == ["eval", "run.toml", "--hf=x.y/z", "--checkpoint", "e.f"]
    assert overrides == ["--a.b", "-1", "--c.d=1 2", "--g.h", "--i.j", "k"]


def test_hydras_spelling_is_an_override_and_a_key_of_another_project_names_ours(run_file, launch, monkeypatch, capfd):
    as_ranks(monkeypatch, 2)
    assert cli.main(["train", str(run_file), "optimizer.lr=1e-4", "+rollout.max_num_seqs=8"]) == 0
    assert (launch.calls[0][1].optimizer.lr, launch.calls[0][1].rollout.max_num_seqs) == (1e-4, 8)
    assert cli.main(["train", str(run_file), "actor_rollout_ref.rollout.n=8", "trainer.save_freq=5"]) == 2
    told = capfd.readouterr().err
    assert '--actor_rollout_ref.rollout.n "8": no such key; the nearest is rollout.n_samples_per_prompt' in told
    assert "the nearest is checkpoint.every" in told
    assert cli.split_overrides(["eval", "--hf", "a.b=c"])[0] == ["eval", "--hf", "a.b=c"]
    assert cli.split_overrides(["eval", "--hf=a", "b.c=d"]) == (["eval", "--hf=a"], ["--b.c=d"])
    commands = typer.main.get_command(cli.app).commands
    found = (p for name in ("train", "eval", "check", "serve", "plan") for p in commands[name].params)
    flags = {parameter.opts[0] for parameter in found if getattr(parameter, "is_flag", False)}
    assert flags | {"--help"} == set(cli.FLAGS)
    for flag in cli.FLAGS:
        assert cli.split_overrides(["eval", flag, "b.c=d"]) == (["eval", flag], ["--b.c=d"])


# ---- errors ----------------------------------------------------------------------------------------------------------


class _OfOurs(UserError):
    pass


def raised(function):
    try:
        function()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def in_our_package(source):
    """The exception of `source`, run as a module of this package."""
    module = types.ModuleType("megatron_srpo.pretended")
    return raised(lambda: exec(compile(source, "pretended.py", "exec"), module.__dict__))


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ConfigError("a"), "a"),
        (UserError("b"), "b"),
        (_OfOurs("c"), "c"),
        (RuntimeError("… EADDRINUSE …"), "port 29500 is in use"),
        (OSError(28, "No space left on device", "runs/x"), "runs/x: No space left on device. Make room"),
    ],
)
def test_what_the_user_can_mend_is_a_message(error, text, monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert cli.message_for_user(error).startswith(text)


@pytest.mark.parametrize(
    "error",
    [
        in_our_package("raise ValueError('d')"),
        in_our_package("int('x')"),
        in_our_package("list(zip([1], [], strict=True))"),
        in_our_package("raise KeyError('x')"),
        raised(lambda: int("x")),
        raised(lambda: json.loads("{")),
        RuntimeError("shapes differ"),
        FileNotFoundError(2, "No such file", "x"),
        AssertionError(),
    ],
)
def test_a_defect_keeps_its_traceback(error):
    assert cli.message_for_user(error) is None


def test_a_defect_goes_through(run_file, launch, monkeypatch):
    as_ranks(monkeypatch, 2)
    launch.result = RuntimeError("shapes differ")
    with pytest.raises(RuntimeError, match="shapes differ"):
        cli.main(["train", str(run_file)])


class Ended(BaseException):
    """Torchrun's SIGTERM, which ends a rank that waits."""


@pytest.fixture
def waiting(monkeypatch):
    """What happens to a rank while it waits for torchrun to end it: nothing, or what the list holds."""
    ends = []

    def wait(seconds):
        assert seconds == cli.SPEAK_AFTER_SECONDS and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        if ends:
            raise ends[0]

    monkeypatch.setattr(cli.time, "sleep", wait)
    before = signal.getsignal(signal.SIGTERM)
    yield ends
    signal.signal(signal.SIGTERM, before)


def test_of_ranks_that_fail_together_only_the_driver_speaks(run_file, launch, monkeypatch, capfd, waiting):
    launch.result = UserError("expected this, got that")
    as_ranks(monkeypatch, 2)
    assert cli.main(["train", str(run_file)]) == 2
    assert capfd.readouterr().err == "error: expected this, got that\n"
    as_ranks(monkeypatch, 2, rank=1)
    waiting.append(Ended())
    with pytest.raises(Ended):
        cli.main(["train", str(run_file)])
    assert capfd.readouterr().err == ""


def test_a_rank_that_fails_alone_speaks(run_file, launch, monkeypatch, capfd, waiting):
    launch.result = UserError("expected this, got that")
    as_ranks(monkeypatch, 2, rank=1)
    assert cli.main(["train", str(run_file)]) == 2
    assert capfd.readouterr().err == "error (rank 1): expected this, got that\n"


@pytest.mark.parametrize(("rank", "told"), [(0, "error: another rank of this run has ended"), (1, "")])
def test_the_loss_of_another_rank_is_one_line_of_the_driver(run_file, launch, monkeypatch, capfd, waiting, rank, told):
    launch.result = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:41")
    as_ranks(monkeypatch, 2, rank)
    assert cli.main(["train", str(run_file)]) == exit_codes.LOST
    err = capfd.readouterr().err
    assert err.startswith(told) if told else err == ""


def test_torchruns_report_gets_the_message_in_place_of_a_traceback(run_file, launch, monkeypatch, tmp_path):
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    as_ranks(monkeypatch, 2)
    launch.result = UserError("expected this, got that")
    assert cli.main(["train", str(run_file)]) == 2
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(file))
    report = ChildFailedError("megatron_srpo", {0: failure}).format_msg()
    assert "expected this, got that" in report and "To enable traceback" not in report


def test_an_output_folder_that_cannot_be_made_is_told(run_file, launch, monkeypatch, capfd):
    as_ranks(monkeypatch, 2)
    folder = run_file.parent / ("x" * 300)  # longer than a name may be
    assert cli.main(["train", str(run_file), "--run.output_dir", str(folder)]) == 2
    told = capfd.readouterr().err
    assert "run.output_dir = " in told and "cannot be written: File name too long" in told and launch.calls == []


def test_ctrl_c_is_one_line_and_exit_code_130(run_file, launch, monkeypatch, capfd):
    as_ranks(monkeypatch, 2)
    launch.result = KeyboardInterrupt()
    assert cli.main(["train", str(run_file)]) == 130
    assert capfd.readouterr().err.strip() == "stopped by Ctrl-C or SIGTERM"


def test_the_module_runs_as_a_program_and_loads_nothing_heavy_for_a_refusal():
    code = (
        "import runpy, sys\nsys.argv = ['x', 'train', 'absent.toml']\n"
        "try:\n    runpy.run_module('megatron_srpo', run_name='__main__')\n"
        "except SystemExit as end:\n    print(end.code, 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["2", "False"] and "absent.toml: no such file" in done.stderr


# ---- the surface -----------------------------------------------------------------------------------------------------


def surface() -> str:
    """Commands, their parameters and all configuration keys, with defaults."""
    lines = []
    for name, command in typer.main.get_command(cli.app).commands.items():
        for parameter in command.params:
            lines.append(f"{name} {' '.join(parameter.opts)} default={parameter.default!r}")
    return "\n".join([*lines, *(f"--{key} {value}" for key, value in defaults().items())]) + "\n"


def test_the_command_line_has_not_changed_unnoticed():
    update = 'python -c "from tests.unit.test_cli import *; FROZEN.write_text(surface())"'
    assert surface() == FROZEN.read_text(), (
        f"commands, options, keys or defaults changed. If meant: {update}, and a line in CHANGELOG.md"
    )


def test_sigterm_ends_a_tool_as_ctrl_c_does(capfd):
    tool, tidied = typer.Typer(), []

    @tool.command()
    def work() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)
        finally:
            tidied.append(True)

    before = signal.getsignal(signal.SIGTERM)
    assert cli.run_tool(tool, "work.py", []) == exit_codes.STOPPED and tidied
    assert signal.getsignal(signal.SIGTERM) is before
    assert capfd.readouterr().err.strip() == "stopped by Ctrl-C or SIGTERM"


@pytest.mark.parametrize(
    ("typed", "expected"),
    [("tr", ["train"]), ("pre", ["prepare-data"]), ("eval --ch", ["--checkpoint"]), ("plan --gp", ["--gpus", "--gpu"])],
)
def test_the_shell_completes_commands_and_options(typed, expected):
    """What the script of --install-completion asks."""
    words = f"megatron-srpo {typed}"
    environment = os.environ | {
        cli.COMPLETION: "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)
    }  # fmt: skip
    code = "import sys; sys.argv[0] = 'megatron-srpo'; from megatron_srpo.run.cli import main; main([])"
    answer = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert answer.stdout.split() == expected
