"""The command line: train, eval, check, serve, plan, checkpoints, doctor, report.

Exit codes (core/exit_codes.py): 0 done; 1 the doctor found something missing, or a defect, which is shown with its
traceback; 2 a mistake of the user, which one rank reports in one message; 75 stopped by SIGUSR1, to be started again;
76 another rank ended; 130 stopped by Ctrl-C or SIGTERM. The original torchrun ends with 0 or 1 whatever its ranks
return; megatron_srpo.torchrun passes their code on.

Which errors are messages: a UserError, or a subclass, is a mistake that the user can correct, and only its text is
shown. So are a port in use and a disk that does not take more. Everything else is a defect and keeps its traceback.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Annotated, Protocol, runtime_checkable

import typer

from megatron_srpo import __version__
from megatron_srpo.commands import TOOLS
from megatron_srpo.config import (
    Config,
    ParallelConfig,
    contradictions,
    listed,
    load_config,
    nearest_key,
    read_model_folder,
    require_tokenizer_folder,
)
from megatron_srpo.core import exit_codes, streams
from megatron_srpo.core.atomic import remove_leftovers
from megatron_srpo.core.disk import cure, disk_problem
from megatron_srpo.core.errors import ConfigError, UserError
from megatron_srpo.core.installation import is_ours, missing_module
from megatron_srpo.core.text import clause, visible
from megatron_srpo.run import stopping
from megatron_srpo.run.output_lock import OutputLock

PACKAGE, SCRIPT = "megatron_srpo", "megatron-srpo"
COMPLETION = "_MEGATRON_SRPO_COMPLETE"  # typer's name of the variable for SCRIPT
TRACEBACK = "MEGATRON_SRPO_TRACEBACK"  # set this variable to see tracebacks of users' mistakes too
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # names the file from which torchrun's report takes its text
# Rank 0 ends its engine servers and prints an error, and torchrun then ends the other ranks. Another rank that failed
# waits this long before it prints, so that the same error is printed once. A server takes up to 15 s to end.
SPEAK_AFTER_SECONDS = 30.0
# Texts of gloo and NCCL after another rank has ended.
LOST_RANK = re.compile(r"Connection (closed|reset) by peer|Connection refused|ncclRemoteError|remote process exited")

app = typer.Typer(
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="SRPO on Megatron Core and vLLM. Train with: "
    "python -m megatron_srpo.torchrun --nproc-per-node N -m megatron_srpo train CONFIG",
)


@runtime_checkable
class CommandLineError(Protocol):
    """A wrong command line, as typer raises it. By its method, because the class depends on typer's version."""

    def format_message(self) -> str: ...


SPLITS = ("train", "test")
FLAGS = ("--as-teacher", "--json", "--help")  # options without a value of the commands that take overrides
TOOL_SIGNALS = (signal.SIGTERM, signal.SIGHUP)  # they end a tool in tools/ in the same way as Ctrl-C
ConfigFiles = Annotated[
    list[Path], typer.Argument(metavar="CONFIG...", help="The run's TOML file, or several; keys of later files win.")
]


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"{PACKAGE} {__version__}")
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """SRPO on Megatron Core and vLLM."""


@app.command()
def train(context: typer.Context, config: ConfigFiles) -> int:
    """Train. Any key of the configuration can be set: --section.key VALUE (docs/configuration.md lists them)."""
    stopping.hold_hangup()
    return train_here(load_config(config, context.obj, tell=print if is_driver() else lambda text: None))


def train_here(settings: Config) -> int:
    """Train on this rank; returns the exit code."""
    check_run(settings, train=True)
    run_alone()
    with (
        stopping.StopDuringStartup(prints=is_driver()),
        _open_output(settings) if is_driver() else nullcontext() as lock,
    ):
        from megatron_srpo.run import launch

        return launch.train(settings, lock)


@app.command("eval")
def evaluate(
    context: typer.Context,
    config: ConfigFiles,
    checkpoint: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A run, its checkpoints folder, or one step_NNNNNNNN.")
    ] = None,
    hf: Annotated[Path | None, typer.Option(metavar="DIR", help="A Hugging Face folder.")] = None,
    split: Annotated[str, typer.Option(metavar="SPLIT", help="Which data file: train or test.")] = "test",
    responses: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Where the responses go: eval/SPLIT.jsonl in the checkpoint's run or run.output_dir."
        ),
    ] = None,
    as_teacher: Annotated[
        bool,
        typer.Option("--as-teacher", help="Show the model the data's own solutions, as the self-teacher sees them."),
    ] = False,
) -> int:
    """Evaluate: avg@k, pass@k and maj@k on a split, with k = eval.n_samples. Any key can be set: --section.key VALUE.

    It takes all prompts of the split, whatever eval.max_prompts the file has; --eval.max_prompts N takes the first N.
    Without a launcher it runs as one process, whatever layout the configuration has.

    --as-teacher tells whether the model can teach itself: its accuracy should be far higher than without. Responses
    go to eval/SPLIT-taught.jsonl.
    """
    if (checkpoint is None) == (hf is None):
        raise UserError("eval: expected one of --checkpoint DIR and --hf DIR, got " + ("both" if hf else "neither"))
    if split not in SPLITS:
        raise UserError(f"eval: expected --split train or --split test, got {split}")
    overrides = list(context.obj)
    if hf is not None:
        overrides += ["--model.path", str(hf)]
    if "RANK" not in os.environ:
        overrides += one_process(load_config(config, overrides), overrides)
    if "eval.max_prompts" not in named_keys(overrides):
        overrides += ["--eval.max_prompts", "0"]
    settings = load_config(config, overrides)
    if as_teacher and (problem := no_solutions(settings)):
        raise UserError(f"eval --as-teacher: {problem}")
    check_run(settings, splits=(split,))
    run = (checkpoint and run_of(checkpoint)) or Path(settings.run.output_dir)
    file = responses or run / "eval" / f"{split}{'-taught' if as_teacher else ''}.jsonl"
    check_place(file)
    run_alone()
    from megatron_srpo.run import launch

    return launch.evaluate(settings, checkpoint=checkpoint, split=split, responses=file, taught=as_teacher)


@app.command()
def check(
    context: typer.Context,
    config: ConfigFiles,
    gpus: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="GPUs of the memory prediction. Default: one copy of the model."),
    ] = None,
    gpu: Annotated[str, typer.Option(metavar="NAME", help="h100, h200, b200, gb200, h20, a100.")] = "h100",
) -> int:
    """Show what a run would train on: prompts, teacher prompts, rewards of made-up responses, memory. Needs no GPU.

    Any key can be set: --section.key VALUE. The exit code is 2 if the run could not learn.
    """
    settings = load_config(config, context.obj, tell=print)
    check_run(settings, splits=("train", "test") if settings.data.test else ("train",), ranks=False)
    from megatron_srpo.config.check import smallest_world
    from megatron_srpo.run.check_command import check as check_data

    return check_data(settings, gpus=gpus or smallest_world(settings), gpu=gpu)


@app.command()
def serve(
    context: typer.Context,
    config: ConfigFiles,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="PORT", help="Where to listen.", min=1, max=65535)] = 8000,
) -> int:
    """Start one rollout server on this machine, for runs with rollout.servers (docs/rollout-engines.md)."""
    settings = load_config(config, context.obj)
    check_run(settings, ranks=False)
    from megatron_srpo.run import engines

    engines.serve(settings, host, port)
    return 0


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for programs.")] = False,
    gpu: Annotated[bool, typer.Option("--gpu", help="Check the GPUs of this node too, in three minutes.")] = False,
    gpu_rehearsal: Annotated[bool, typer.Option("--gpu-rehearsal", help="The same checks on a CPU.")] = False,
) -> int:
    """Show what is installed, whether runs will use CPU or GPU, and how to install what is missing."""
    if gpu or gpu_rehearsal:
        from megatron_srpo.run import gpu_checks

        return gpu_checks.report("cuda" if gpu else "cpu")
    from megatron_srpo.run.doctor import report as examine

    return examine(as_json=as_json)


@app.command()
def plan(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="A Hugging Face folder or a name.")] = None,
    gpus: Annotated[int, typer.Option(metavar="N", min=1, help="GPUs of all nodes.")] = 8,
    gpu: Annotated[str, typer.Option(metavar="NAME", help="h100, h200, b200, gb200, h20, a100.")] = "h100",
    batch: Annotated[int, typer.Option(min=1, help="Prompts an iteration.")] = 32,
    samples: Annotated[int, typer.Option(min=1, help="Responses a prompt.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps an iteration.")] = 1,
    prompt_mean: Annotated[int, typer.Option(min=1, help="Tokens.")] = 400,
    prompt_max: Annotated[int, typer.Option(min=1, help="Tokens.")] = 2048,
    response_mean: Annotated[int, typer.Option(min=1, help="Tokens.")] = 2000,
    response_max: Annotated[int, typer.Option(min=1, help="Tokens.")] = 8192,
    teacher_prompt_max: Annotated[int, typer.Option(min=1, help="Tokens of the teacher's prompt.")] = 10240,
    distilled: Annotated[float, typer.Option(help="Share of samples that the teacher scores.")] = 0.3,
    iterations: Annotated[int, typer.Option(min=1, help="Of the run, for GPU-hours.")] = 475,
    lora_rank: Annotated[int, typer.Option(min=0, help="Train LoRA adapters of this rank; 0: all weights.")] = 0,
    top: Annotated[int, typer.Option(min=1, help="Layouts that are shown.")] = 5,
    calibration: Annotated[Path | None, typer.Option(metavar="FILE", help="Of python -m benchmarks.calibrate.")] = None,
    write: Annotated[Path | None, typer.Option(metavar="CONFIG", help="Write the best layout's configuration.")] = None,
    check: Annotated[
        list[Path] | None,
        typer.Option(metavar="CONFIG", help="Build a configuration's ranks instead. May be repeated."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for programs.")] = False,
) -> int:
    """Predict which layouts of a model fit on a cluster and how long an iteration takes. Needs no GPU.

    With --check CONFIG it builds every distinct rank of that configuration, without memory for weights.
    """
    from megatron_srpo.plan import Workload
    from megatron_srpo.run import planning

    if check:
        if write is not None or as_json or lora_rank:
            raise UserError(
                "plan: --check prints a table of the configuration as it is; --write, --json and --lora-rank belong to "
                "a search"
            )
        return planning.check(check, gpus, list(context.obj), model)
    if model is None:
        raise UserError("plan: expected MODEL (a Hugging Face folder, or a name like Qwen3-8B), or --check CONFIG")
    workload = Workload(
        prompts=batch, samples=samples, steps=steps, prompt_mean=prompt_mean, prompt_max=prompt_max,
        response_mean=response_mean, response_max=response_max, teacher_prompt_max=teacher_prompt_max,
        distilled=distilled, iterations=iterations,
    )  # fmt: skip
    return planning.plan(
        model, gpus, gpu, workload, calibration=calibration, top=top, write=write, json_output=as_json,
        lora_rank=lora_rank,
    )  # fmt: skip


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="Output folders of runs.")],
    axis: Annotated[str, typer.Option(metavar="AXIS", help="iterations, hours or tokens.")] = "iterations",
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for a comparison (default: the one that has all runs).")
    ] = None,
) -> int:
    """Draw curves.png of one run; of several, figures by benchmark and tables beside the SRPO paper's numbers."""
    from megatron_srpo.observe import grid
    from megatron_srpo.observe.curves import AXES
    from megatron_srpo.observe.report import plot_run

    if out is not None and out.exists() and not out.is_dir():
        raise UserError(f"report: --out {out}: is a file; name a folder, which may not exist yet")
    if axis not in AXES:
        raise UserError(f"report: expected --axis {', '.join(AXES)}, got {axis}")
    found = [grid.read_run(folder) for folder in runs]
    if len(found) == 1 and out is None:
        name = "curves.png" if axis == "iterations" else f"curves_{axis}.png"
        print(plot_run(runs[0] / "metrics.jsonl", runs[0] / name, axis))
        return 0
    written = grid.write_report(found, out or Path(os.path.commonpath([run.absolute() for run in runs])), axis)
    print(written[0].read_text(encoding="utf-8"))
    print("\n".join(map(str, written)))
    return 0


@app.command()
def checkpoints(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run, or its checkpoints folder.")],
    verify: Annotated[bool, typer.Option("--verify", help="Read every byte and compare checksums.")] = False,
    prune: Annotated[int | None, typer.Option(metavar="N", min=1, help="Keep the newest N whole (and --best).")] = None,
    best: Annotated[str, typer.Option(metavar="METRIC", help='Metric of the best; "-name": lower is better.')] = "",
) -> int:
    """List a run's checkpoints, verify them, or remove old ones. The exit code is 1 if --verify finds damage."""
    from megatron_srpo.checkpoints import listing

    return listing.show(folder, verify=verify, prune=prune or 0, best=best)


# ---- helpers of the commands -----------------------------------------------------------------------------------------


def is_driver() -> bool:
    """Whether this process is rank 0."""
    return os.environ.get("RANK", "0") == "0"


def _open_output(config: Config) -> OutputLock:
    """Make the run's output folder and lock it. ConfigError if it cannot be written."""
    try:
        lock = OutputLock(Path(config.run.output_dir))
        remove_leftovers(Path(config.run.output_dir))  # of killed runs; nobody else is here
        return lock
    except OSError as error:
        raise ConfigError(
            f'run.output_dir = "{config.run.output_dir}": cannot be written: {error.strerror}. '
            f"{'Make room or choose' if error.errno in (errno.ENOSPC, errno.EDQUOT) else 'Choose'} another folder: "
            "--run.output_dir FOLDER"
        ) from error


def check_run(config: Config, *, train: bool = False, splits: tuple[str, ...] = (), ranks: bool = True) -> None:
    """Run every check that needs no model in memory. ConfigError lists all problems, with those of the model folder.

    `train` adds the splits that training reads. `ranks` is False for an engine server, which is not one of the ranks
    of the layout.
    """
    if train:
        splits = ("train", "test") if config.eval.every and config.data.test else ("train",)
    world_size = int(os.environ.get("WORLD_SIZE", "1")) if ranks else None
    hf, of_folders = None, []
    try:
        hf = read_model_folder(config.model.path)
    except ConfigError as problem:
        of_folders.append(str(problem))
    try:
        require_tokenizer_folder(config.model.tokenizer)
    except ConfigError as problem:
        of_folders.append(str(problem))
    problems = [*contradictions(config, hf, world_size, splits=splits), *of_folders]
    if problems:
        raise ConfigError(listed("this configuration", problems))


def run_alone() -> None:
    """Without torchrun, set the environment of a world of one rank on the loopback address."""
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(
        RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )


def one_process(config: Config, given: Sequence[str]) -> list[str]:
    """Overrides that reduce the layout of `config` to one process, whose packed rows have the same size. Keys that the
    user has `given` keep their value."""
    layout = {f"parallel.{name}": "1" for name in ParallelConfig.model_fields if name.endswith("_parallel_size")}
    layout |= {"parallel.sequence_parallel": "false", "rollout.tensor_parallel_size": "1"}
    named = named_keys(given)
    if "parallel.context_parallel_size" not in named:
        layout["train.max_tokens_per_gpu"] = str(config.row_budget)
    return [part for key, value in layout.items() if key not in named for part in (f"--{key}", value)]


def named_keys(given: Sequence[str]) -> set[str]:
    """The keys that overrides set."""
    return {token.removeprefix("--").partition("=")[0] for token in given}


def run_of(checkpoint: Path) -> Path | None:
    """The run's folder of what --checkpoint names: the run, its checkpoints folder, or one checkpoint. None: it is none
    of these."""
    folders = (checkpoint, *checkpoint.absolute().parents[:2])
    return next((folder for folder in folders if (folder / "checkpoints").is_dir()), None)


def no_solutions(config: Config) -> str:
    """Why the model cannot be shown the data's solutions (eval --as-teacher); "" if it can."""
    if config.environment.classes:
        return "it evaluates one turn; leave out the section [environment] and its rows"
    return (
        "" if config.data.solution_key else "set data.solution_key to the field of the rows that has a worked solution"
    )


def check_place(file: Path) -> None:
    """Make the folder of the responses before anything is generated. UserError if they cannot be written there, or if
    something else than a file has their name, which would have to make room for them."""
    folder = file.parent
    try:
        if file.exists() and not file.is_file():
            raise UserError(
                f"eval: --responses {file}: {'is a folder' if file.is_dir() else 'is no regular file'}; expected the "
                f"name of a file, for example {file / 'test.jsonl' if file.is_dir() else 'test.jsonl'}"
            )
        folder.mkdir(parents=True, exist_ok=True)
        problem = "" if os.access(folder, os.W_OK | os.X_OK) else "this user may not write there"
    except OSError as error:
        problem = error.strerror or str(error)
    if problem:
        raise UserError(
            f"eval: the responses cannot be written to {folder}: {clause(problem)}. Name a file: --responses FILE"
        )


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split the command line into (the command's own arguments, the overrides of the configuration).

    An option with a dot in its name is an override, wherever it stands. Its value is the next argument, unless the
    option contains "=". Hydra's spelling section.key=VALUE, or +section.key=VALUE, is one too.
    """
    own: list[str] = []
    overrides: list[str] = []
    rest = list(arguments)
    while rest:
        token = rest.pop(0)
        hydra = re.fullmatch(r"\+{0,2}([a-z_]\w*(\.\w+)+=.*)", token, re.DOTALL)
        if hydra and not (own and _awaits_value(own[-1])):
            overrides.append(f"--{hydra[1]}")
            continue
        if not re.match(r"--[^=]*\.", token):
            own.append(token)
            continue
        overrides.append(token)
        if "=" not in token and rest and not rest[0].startswith("--"):
            overrides.append(rest.pop(0))
    return own, overrides


def _awaits_value(token: str) -> bool:
    """Whether the next argument is the value of this one."""
    return token.startswith("--") and "=" not in token and token not in FLAGS


# ---- errors ----------------------------------------------------------------------------------------------------------


def message_for_user(error: BaseException) -> str | None:
    """The message for a mistake that the user can correct; None for a defect, which keeps its traceback.

    A mistake is a UserError, a port in use, a disk that is full or not writable, a package that is not installed, or
    the end of another rank.
    """
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, RuntimeError) and "EADDRINUSE" in str(error):
        port = os.environ.get("MASTER_PORT", "?")
        return (
            f"port {port} is in use on this machine: choose another: python -m megatron_srpo.torchrun --master-port N"
        )
    problem = disk_problem(error)
    if problem:
        return f"{clause(problem)}. {cure(problem)}, or choose another folder"
    if isinstance(error, ModuleNotFoundError) and not is_ours(error):
        return missing_module(error)
    if lost_rank(error):
        return "another rank of this run has ended; what it said is above"
    return None


def lost_rank(error: BaseException) -> bool:
    """Whether the error only says that another rank has ended."""
    return isinstance(error, RuntimeError) and bool(LOST_RANK.search(str(error)))


def _usage(error: CommandLineError) -> str:
    """The message for a wrong command line. An option that resembles a configuration key is pointed to that key."""
    option = getattr(error, "option_name", None)
    key = nearest_key(option.lstrip("-")) if option else None
    if key:
        return f"No such option: {option}. The configuration's key is set by --{key} VALUE"
    return error.format_message()


def _fail(text: str, *, secondary: bool = False) -> int:
    """Print an error once in the whole run; returns the exit code.

    Rank 0 prints and ends, and torchrun then ends the other ranks. A rank that is still alive after
    SPEAK_AFTER_SECONDS is the only one with this error, so it prints too, unless the error is `secondary`: the
    consequence of another rank's end.
    """
    speaker = "error"
    if not is_driver():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(SPEAK_AFTER_SECONDS)
        speaker = f"error (rank {os.environ['RANK']})"
        if secondary:
            return exit_codes.LOST
    with suppress(OSError):  # standard error may be a file on a full disk
        print(f"{speaker}: {visible(text)}", file=sys.stderr, flush=True)
    _tell_torchrun(text)
    return exit_codes.LOST if secondary else exit_codes.MISTAKE


def _tell_torchrun(text: str) -> None:
    """Have torchrun's report show the message where it would show a traceback."""
    file = os.environ.get(ERROR_FILE)
    if file:
        details = {"py_callstack": f"none: {text}", "timestamp": str(int(time.time()))}
        with suppress(OSError):
            Path(file).write_text(json.dumps({"message": {"message": text, "extraInfo": details}}))


def _run(command: Callable[[], int]) -> int:
    try:
        return command() or 0
    except typer.Exit as end:  # after --help
        return end.exit_code
    except KeyboardInterrupt:
        if is_driver():
            print("stopped by Ctrl-C or SIGTERM", file=sys.stderr, flush=True)
        return exit_codes.STOPPED
    except Exception as error:
        text = _usage(error) if isinstance(error, CommandLineError) else message_for_user(error)
        if text is None:
            raise
        if os.environ.get(TRACEBACK) and is_driver():
            traceback.print_exc()
        return _fail(text, secondary=lost_rank(error))


def _add_tool(name: str, text: str) -> None:
    """List a command of megatron_srpo.commands. `main` runs it, with all its arguments."""

    def tool(context: typer.Context) -> int:
        return run_command(name, context.args)

    app.command(name, help=text, add_help_option=False, context_settings={"ignore_unknown_options": True})(tool)


for _name, _text in TOOLS.items():
    _add_tool(_name, _text)


def run_command(name: str, arguments: Sequence[str]) -> int:
    """Run a command of megatron_srpo.commands; returns the exit code."""
    module = importlib.import_module(f"{PACKAGE}.commands.{name.replace('-', '_')}")
    return module.main(list(arguments))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] in TOOLS:
        return _run(lambda: run_command(given[0], given[1:]))
    stopping.hold_requeue()
    stopping.end_with_launcher()
    own, overrides = split_overrides(given)
    command = typer.main.get_command(app)
    if COMPLETION in os.environ:  # the shell asks, by the script that --install-completion wrote
        command.main([], prog_name=SCRIPT)
    name = SCRIPT if Path(sys.argv[0]).name == SCRIPT else f"python -m {PACKAGE}"

    def invoke() -> int:  # not typer's own main(), which handles Ctrl-C and errors in another way
        with command.make_context(name, own or ["--help"], obj=overrides) as context:
            return command.invoke(context)

    return _run(invoke)


def run_tool(tool: typer.Typer, name: str, arguments: Sequence[str] | None = None) -> int:
    """Run the command line of a script in tools/, with the same handling of errors; returns the exit code."""
    streams.guard()
    command = typer.main.get_command(tool)

    def invoke() -> int:
        with command.make_context(name, list(sys.argv[1:] if arguments is None else arguments)) as context:
            return command.invoke(context)

    taken = [number for number in TOOL_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # nohup
    # A tool ends as after Ctrl-C, cleaned up.
    before = {number: signal.signal(number, signal.default_int_handler) for number in taken}
    try:
        return _run(invoke)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
