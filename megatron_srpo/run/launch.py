"""A training run and an evaluation on this rank, from beginning to end.

Nothing heavy is imported before `open_session` has set the environment of the libraries.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_srpo.config import Config, LoraConfig, published_adapters, starts_with_publish
from megatron_srpo.core import exit_codes
from megatron_srpo.core.disk import disk_problem
from megatron_srpo.core.errors import UserError
from megatron_srpo.core.protocols import Weights
from megatron_srpo.core.text import clause
from megatron_srpo.run.output_lock import OutputLock
from megatron_srpo.run.session import Session, open_session
from megatron_srpo.run.stopping import StopRequest
from megatron_srpo.run.timer import PhaseTimer
from megatron_srpo.run.watchdog import Watchdog

if TYPE_CHECKING:
    from megatron_srpo.core.records import Group
    from megatron_srpo.mcore.control import Control
    from megatron_srpo.run.roles import Role


def train(config: Config, lock: OutputLock | None = None) -> int:
    """Run the training job on this rank; returns the process's exit code: DONE, STOPPED or REQUEUE. Rank 0 gives the
    `lock` of the output folder, which is looked after in every iteration."""
    with open_session(config) as session:
        with ExitStack() as closing:
            code = _train(config, session, closing, lock)
        session.control.barrier()  # torchrun ends all ranks when one has stopped early; rank 0 closes its log first
        return code


def _open_role(
    config: Config, session: Session, splits: tuple[str, ...], closing: ExitStack, *, trains: bool
) -> Role:  # fmt: skip
    from megatron_srpo.run.roles import Driver, Follower

    def build() -> Role:
        return Driver(config, splits=splits, trains=trains) if session.control.is_driver else Follower(config)

    role = session.control.everywhere(build)
    closing.callback(role.close)
    return role


def _train(config: Config, session: Session, closing: ExitStack, lock: OutputLock | None) -> int:
    from megatron_srpo.checkpoints.saving import LastCheckpointLost
    from megatron_srpo.run.assembly import build_parts, build_scorer
    from megatron_srpo.trainer import Trainer

    control = session.control
    role = _open_role(config, session, ("train", "test") if config.eval.every else ("train",), closing, trains=True)
    scorer = build_scorer(config, session, role, closing)
    stop = StopRequest(speaks=control.is_driver)
    watchdog = Watchdog(60 * config.run.watchdog_minutes, rank=session.topology.rank)
    closing.callback(watchdog.close)
    with watchdog.phase("start"):
        parts, restored, trained = build_parts(config, session, role, scorer, stop, watchdog, closing)
    if lock is not None:
        parts.should_stop = partial(_looking_after, lock, role.log.warn, stop)
    start, saved = (restored.iteration, restored.folder) if restored else (0, None)
    stop.install()
    folder = Path(config.run.output_dir) / "hf"
    trainer = Trainer(parts, start_iteration=start)
    try:
        done = trainer.run()
    except LastCheckpointLost as lost:
        with watchdog.phase("export"):
            raise UserError(f"{lost} {_rescue_weights(config, control, trained, trainer.iteration)}") from lost
    if done:
        with watchdog.phase("export"):
            _write_hf(config, trained, folder, is_driver=control.is_driver)
    role.log.message(_ending(config, done, start, folder, parts.store.last or saved))
    requeue = control.any(stop.requeue)
    return exit_codes.DONE if done else exit_codes.REQUEUE if requeue else exit_codes.STOPPED


def _looking_after(lock: OutputLock, warn: Callable[[str], None], stop: StopRequest) -> bool:
    """Whether the run shall stop. On the way it checks that the output folder is still this run's."""
    lock.renew(warn)
    return stop()


def _write_hf(config: Config, weights: Weights, target: Path, *, is_driver: bool) -> None:
    """Every rank drains the export; rank 0 writes the folder of the model, or of the adapter."""
    from megatron_srpo.bridge import write_adapter_folder, write_hf_folder

    if is_driver and config.writes_adapter:
        write_adapter_folder(weights, target, config.lora, config.model.path)
    elif is_driver:
        write_hf_folder(
            weights, config.model.path, target, dtype=config.model.dtype, tokenizer=config.model.tokenizer
        )  # fmt: skip
    else:
        for _ in weights:
            pass


def _rescue_weights(config: Config, control: Control, weights: Weights, iteration: int) -> str:
    """Export the weights that no checkpoint holds: into the output folder, where they need less room than a checkpoint,
    or else into checkpoint.fallback_dir. Returns a sentence about the result. Every rank calls it."""
    name = "hf" if iteration >= config.run.iterations else f"hf_iteration_{iteration:08d}"
    problems = []
    for root in filter(None, (config.run.output_dir, config.fallback_folder)):
        problem = control.share(partial(str, _export_problem(config, weights, Path(root) / name, control.is_driver)))
        if not problem:
            return f"The weights of iteration {iteration} are in {Path(root) / name}, without the optimizer's state."
        problems.append(problem)
    return f"Its weights could not be exported either: {'; '.join(map(clause, problems))}."


def _export_problem(config: Config, weights: Weights, target: Path, is_driver: bool) -> str:
    """Export the weights; why the disk did not take them, or "". Only rank 0 knows."""
    try:
        _write_hf(config, weights, target, is_driver=is_driver)
    except (OSError, UserError) as error:  # write_hf_folder has drained the export, as the other ranks do
        return disk_problem(error, writing=True) or str(error)
    return ""


def _ending(config: Config, done: bool, start: int, folder: Path, saved: Path | None) -> str:
    """The run's last line."""
    if done and start >= config.run.iterations:
        return (
            f"nothing to train: {saved} has {start} iterations, and run.iterations = {config.run.iterations}. Raise it "
            f"to go on, or start again: checkpoint.resume = false. The trained model is in {folder}"
        )
    if done:
        return f"done: the trained {'adapter' if config.writes_adapter else 'model'} is in {folder}"
    if saved is None:
        return "stopped before the first iteration: there is nothing to save"
    return f"stopped; last checkpoint: {saved} (the same command goes on from it)"


def evaluate(config: Config, *, checkpoint: Path | None, split: str, responses: Path, taught: bool = False) -> int:
    """`measure`; rank 0 prints the metrics as JSON."""
    metrics = measure(config, checkpoint=checkpoint, split=split, responses=responses, taught=taught)
    if metrics:
        print(json.dumps(metrics, indent=1), flush=True)
    return 0


def measure(
    config: Config, *, checkpoint: Path | None, split: str, responses: Path, taught: bool = False
) -> dict[str, float]:  # fmt: skip
    """Evaluate model.path, or a checkpoint of ours, on a split. Returns the metrics on rank 0, {} on the other ranks.
    Rank 0 writes the responses to the file `responses`; an earlier one is set aside. `taught`: the model reads the
    data's own solution with each question, as the self-teacher does; eval/accuracy_untaught is then the accuracy for
    the same questions alone."""
    with open_session(config) as session, ExitStack() as closing:
        from megatron_srpo import checkpoints
        from megatron_srpo.run.assembly import build_scorer
        from megatron_srpo.run.engines import build_engine
        from megatron_srpo.run.evaluation import chosen_prompts
        from megatron_srpo.run.generation import Evaluator

        control = session.control
        role = _open_role(config, session, (split,), closing, trains=False)
        scorer = build_scorer(config, session, role, closing)
        plain = control.share(lambda: role.prompts(split))
        prompts = control.share(lambda: role.taught_prompts(split)) if taught else plain
        folder = control.share(lambda: checkpoints.whole(checkpoint) if checkpoint else None)
        control.share(lambda: _require_same_adapters(config, folder))
        untrained = config.rollout.model_copy(update={"routing_replay": "off"})  # nobody asks for experts
        longest = max([config.data.max_prompt_length, *(len(prompt.token_ids) for prompt in prompts)])
        room = config.data.model_copy(update={"max_prompt_length": longest})
        engine = build_engine(config.model_copy(update={"rollout": untrained, "data": room}), session, role)
        closing.callback(engine.close)
        # External servers may still hold another run's weights, and adapters are not in model.path.
        if folder is not None or config.rollout.servers or starts_with_publish(config):
            engine.publish(_evaluated_weights(config, session, folder), 1)
        prompts, chosen = chosen_prompts(prompts, config.eval, split)
        role.log.message(chosen)
        timer = PhaseTimer(Watchdog(0).phase)
        keep = partial(_write_responses, responses, role.log.message)
        metrics = Evaluator(config, engine, prompts, scorer, keep=keep)(timer)
        if taught:
            uids = {prompt.uid for prompt in prompts}
            same = [prompt for prompt in plain if prompt.uid in uids]
            untaught = Evaluator(config, engine, same, scorer)(timer)
            metrics |= {"eval/accuracy_untaught": untaught["eval/accuracy"]} if control.is_driver else {}
    return metrics


def _require_same_adapters(config: Config, folder: Path | None) -> None:
    """UserError if a checkpoint was trained with another [lora] section, with which its weights would be others."""
    from megatron_srpo.conversion.adapters import stored_lora

    if folder is None:
        return
    theirs = stored_lora(folder) or LoraConfig()
    different = [
        f"lora.{key} = {value!r} (here {mine!r})"
        for key in ("rank", "alpha", "rslora", "targets")
        if (value := getattr(theirs, key)) != (mine := getattr(config.lora, key)) and (theirs.rank or key == "rank")
    ]
    if different:
        raise UserError(
            f"{folder} was trained with {', '.join(different)}: evaluate it with the same [lora] section, for example "
            "with config.toml of its run"
        )


def _write_responses(file: Path, say: Callable[[str], None], groups: Sequence[Group]) -> None:
    """Write them, and tell where they are. If the disk does not take them this is told too, and the metrics of an
    evaluation that may have taken hours are not lost with them."""
    from megatron_srpo.core.atomic import atomic_write, set_aside
    from megatron_srpo.observe.rollouts import evaluated_record

    lines = (json.dumps(evaluated_record(group), ensure_ascii=False) for group in groups)
    text = "".join(line + "\n" for line in lines).encode("utf-8", "backslashreplace").decode()
    try:
        if file.exists():
            set_aside(file)
        atomic_write(file, text)
    except OSError as error:
        problem = disk_problem(error, writing=True) or str(error)
        say(f"warning: the responses could not be written to {file}: {clause(problem)}; the metrics are complete")
    else:
        say(f"the responses are in {file}")


def _evaluated_weights(config: Config, session: Session, folder: Path | None) -> Iterable:
    """The weights of one of our checkpoints, or of model.path, in Hugging Face names."""
    from megatron_srpo.mcore import checkpoint
    from megatron_srpo.run.assembly import build_exporter, build_policy

    policy = build_policy(config, session, trainable=False)
    if folder is not None:
        checkpoint.load(policy, folder)
    return build_exporter(config, policy, adapters=published_adapters(config) is not None)
