"""Builds the parts from a configuration and starts the loop: the only place where all packages meet."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_srpo.config import Config, read_model_folder, save_resolved
from megatron_srpo.core import exit_codes
from megatron_srpo.run.driver import DriverParts
from megatron_srpo.run.engines import build_engine
from megatron_srpo.run.stopping import StopRequest
from megatron_srpo.run.watchdog import Watchdog


@dataclass
class Session:
    """One rank's share of the machine: device, groups and the control channel."""

    path: Any  # mcore.device.DevicePath
    topology: Any  # mcore.groups.Topology
    control: Any  # mcore.control.Control


@contextmanager
def _session(config: Config) -> Iterator[Session]:
    _quiet()  # before the libraries are imported
    from megatron_srpo.mcore import groups
    from megatron_srpo.mcore.control import Control
    from megatron_srpo.mcore.device import choose_device
    from megatron_srpo.rollout import prepare_environment

    path = choose_device(config.run.device, groups.local_rank())
    prepare_environment(path.device.type)  # before vLLM is imported
    topology = groups.initialize(
        config.parallel, path, seed=config.run.seed, timeout_minutes=config.run.control_timeout_minutes
    )
    try:
        yield Session(path, topology, Control(topology))
    finally:
        groups.shutdown()


def _quiet() -> None:
    """Silence what the libraries say of themselves at every start; nothing of ours goes through `warnings`."""
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron asks for it with sequence parallelism
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # vLLM says where it binds memory as a warning of torch's
    for module in ("torch.*", "megatron.*", "transformers.*"):
        warnings.filterwarnings("ignore", module=module.replace(".*", r"\..*"))


def _build_scorer(config: Config, session: Session, driver: DriverParts | None, closing: ExitStack) -> Any:
    """Reward workers on every rank that speaks for an engine; the configured number is shared among them."""
    from megatron_srpo.rewards import RewardPool
    from megatron_srpo.run.scoring import RewardScorer

    control, engine_size = session.control, config.rollout.tensor_parallel_size
    if config.rollout.placement == "servers":
        engine_size = session.topology.world_size  # the driver speaks for all of them
    engines = max(1, session.topology.world_size // engine_size)
    workers = -(-config.reward.workers // engines)
    kinds = control.share(lambda: driver.kinds())

    def build() -> Any:
        if session.topology.rank % engine_size:
            return None
        return closing.enter_context(RewardPool(config.reward.model_copy(update={"workers": workers}), kinds))

    return RewardScorer(control.everywhere(build), control)


def _build_policy(config: Config, hf: dict, session: Session, *, total_steps: int, trainable: bool) -> Any:
    from megatron_srpo.bridge import load_hf_weights
    from megatron_srpo.mcore.policy import Policy

    return Policy(
        config, hf, session.topology, session.path, partial(load_hf_weights, hf_dir=config.model.path),
        total_steps=total_steps, trainable=trainable,
    )  # fmt: skip


def _requests(prompts: list, iteration: int, refill: int, *, seed: int, samples: int) -> list:
    """All samples of all prompts; a prompt that comes again in a refill gets new seeds."""
    from megatron_srpo.rollout import GenerateRequest, request_seed

    return [
        GenerateRequest(
            prompt=index,
            sample=sample,
            token_ids=prompt.token_ids,
            seed=request_seed(seed, iteration, prompt.uid, refill * samples + sample),
        )
        for index, prompt in enumerate(prompts)
        for sample in range(samples)
    ]


class Evaluator:
    """Samples k answers to every held-out prompt and scores them; every rank calls it, the driver gets metrics."""

    def __init__(self, config: Config, engine: Any, prompts: list, scorer: Any) -> None:
        limit = config.eval.max_prompts
        self._config, self._engine, self._scorer = config, engine, scorer
        self._prompts = prompts[:limit] if limit else prompts

    def __call__(self) -> dict[str, float] | None:
        from megatron_srpo.rollout import SamplingSettings
        from megatron_srpo.run.evaluation import accuracy_metrics

        config = self._config
        # Iteration −1: the same seeds at every evaluation, so that curves differ by the weights alone.
        requests = _requests(self._prompts, -1, 0, seed=config.run.seed, samples=config.eval.n_samples)
        sampling = SamplingSettings(
            temperature=config.eval.temperature, top_p=config.eval.top_p, max_tokens=config.rollout.max_response_length
        )
        rollouts = self._engine.generate(requests, sampling, self._scorer.start(self._prompts))
        rewards = self._scorer.finish(rollouts)
        if rollouts is None:
            return None
        return accuracy_metrics(
            rollouts, rewards, threshold=config.algorithm.success_reward_threshold, k=config.eval.n_samples
        )


def _write_hf(config: Config, weights: Iterable, target: Path, *, is_driver: bool) -> None:
    """Every rank drains the export; the driver writes the folder."""
    from megatron_srpo.bridge import write_hf_folder

    if is_driver:
        write_hf_folder(weights, config.model.path, target, dtype=config.model.dtype)
    else:
        for _ in weights:
            pass


def train(config: Config) -> int:
    """Run the training job on this rank; returns the process's exit code: DONE, STOPPED or REQUEUE."""
    with _session(config) as session:
        with ExitStack() as closing:
            code = _train(config, session, closing)
        session.control.barrier()  # torchrun ends all ranks when one has stopped early; the driver closes its log first
        return code


def _sampling(config: Config) -> Any:
    from megatron_srpo.rollout import SamplingSettings

    rollout = config.rollout
    return SamplingSettings(
        temperature=rollout.temperature, top_p=rollout.top_p, max_tokens=rollout.max_response_length
    )


def _optimizer_steps(config: Config) -> int:
    per_step = config.train.prompts_per_mini_batch or config.rollout.rollout_batch_size
    return config.run.iterations * -(-config.rollout.rollout_batch_size // per_step)


def _train(config: Config, session: Session, closing: ExitStack) -> int:
    from megatron_srpo.trainer import Trainer

    control = session.control
    splits = ("train", "test") if config.eval.every else ("train",)
    driver = control.on_driver(lambda: DriverParts(config, splits=splits))
    if driver:
        closing.callback(driver.close)
    scorer = _build_scorer(config, session, driver, closing)
    stop = StopRequest(speaks=control.is_driver)
    watchdog = Watchdog(60 * config.run.watchdog_minutes, rank=session.topology.rank)
    closing.callback(watchdog.close)
    with watchdog.phase("start"):
        parts, restored = _assemble(config, session, driver, scorer, stop, watchdog, closing)
    start, state = (restored.iteration, restored.state) if restored else (0, {})
    stop.install()
    done = Trainer(parts, start_iteration=start, skipped_in_a_row=state.get("skipped_in_a_row", 0)).run()
    folder = Path(config.run.output_dir) / "hf"
    if done:
        with watchdog.phase("export"):
            _write_hf(config, parts.weights, folder, is_driver=control.is_driver)
    if driver:
        saved = parts.checkpoints.last or (restored.folder if restored else None)
        driver.say(_ending(config, done, start, folder, saved))
    requeue = control.any(stop.requeue)
    return exit_codes.DONE if done else exit_codes.REQUEUE if requeue else exit_codes.STOPPED


def _ending(config: Config, done: bool, start: int, folder: Path, saved: Path | None) -> str:
    """The run's last line."""
    if done and start >= config.run.iterations:
        return (
            f"nothing to train: {saved} has {start} iterations, and run.iterations = {config.run.iterations}. Raise it "
            f"to go on, or start anew: checkpoint.resume = false. The trained model is in {folder}"
        )
    if done:
        return f"done: the trained model is in {folder}"
    if saved is None:
        return "stopped before the first iteration: there is nothing to save"
    return f"stopped; last checkpoint: {saved} (the same command goes on from it)"


def _assemble(
    config: Config, session: Session, driver: DriverParts | None, scorer: Any, stop: StopRequest, watchdog: Watchdog,
    closing: ExitStack,
) -> tuple[Any, Any]:  # fmt: skip
    """Policy, engine and everything else of the loop; returns (parts, the checkpoint that they go on from, if any)."""
    from megatron_srpo.bridge import Exporter
    from megatron_srpo.checkpoints.saving import Checkpoints
    from megatron_srpo.losses.objective import Objective
    from megatron_srpo.mcore import checkpoint
    from megatron_srpo.mcore.device import device_name
    from megatron_srpo.plan import Architecture, Meter
    from megatron_srpo.trainer import Parts

    control = session.control
    hf = read_model_folder(config.model.path)
    policy = _build_policy(config, hf, session, total_steps=_optimizer_steps(config), trainable=True)
    exporter = Exporter(policy.shards, hf, bucket_bytes=config.bridge.bucket_mib * 2**20)
    checkpoints = Checkpoints(config, control, checkpoint, driver.say if driver else str)
    restored = checkpoints.restore(policy)
    start, state = (restored.iteration, restored.state) if restored else (0, {})
    loader = control.on_driver(driver.loader if driver else lambda: None)
    if restored:
        control.share(lambda: checkpoints.restore_data(loader, restored.state["loader"]))
    control.share(lambda: save_resolved(config, Path(config.run.output_dir) / "config.toml"))  # nothing refused it
    with policy.on_host() if config.train.offload_while_generating else nullcontext():
        engine = build_engine(config, session, driver)
        closing.callback(engine.close)
        if config.rollout.sleep_while_training:
            engine.sleep()
    if start or config.rollout.servers:  # what servers of somebody else hold is anybody's guess
        engine.publish(exporter, start)
    test = control.share(lambda: driver.prompts.get("test", []))
    requests = partial(_requests, seed=config.run.seed, samples=config.rollout.n_samples_per_prompt)
    if driver and config.rollout.max_staleness:
        from megatron_srpo.rollout import Prefetcher

        engine = loader = Prefetcher(
            engine, loader, requests, _sampling(config), batches=config.rollout.max_staleness, start=start,
            total=config.run.iterations,
        )  # fmt: skip
    parts = Parts(
        config=config,
        control=control,
        policy=policy,
        objective=Objective(config),
        engine=engine,
        weights=exporter,
        requests=requests,
        sampling=_sampling(config),
        evaluate=Evaluator(config, engine, test, scorer),
        checkpoints=checkpoints,
        should_stop=stop,
        watchdog=watchdog,
        meter=Meter(Architecture.from_hf(hf), session.topology.world_size, device_name(session.topology.device)),
        loader=loader,
        scorer=scorer,
        teacher_prompt=driver and driver.teacher_prompt,
        observer=control.on_driver(lambda: driver.observe(start, state.get("observer", {}))),
    )
    if restored:
        restored.restore_generators()
    return parts, restored


def evaluate(config: Config, *, checkpoint: Path | None, split: str) -> int:
    """Evaluate model.path, or a checkpoint of ours, on a split; prints the metrics as JSON on the driver."""
    from megatron_srpo import checkpoints

    with _session(config) as session, ExitStack() as closing:
        driver = session.control.on_driver(lambda: DriverParts(config, splits=(split,)))
        if driver:
            closing.callback(driver.close)
        scorer = _build_scorer(config, session, driver, closing)
        folder = session.control.share(lambda: checkpoints.whole(checkpoint) if checkpoint else None)
        engine = build_engine(config, session, driver)
        closing.callback(engine.close)
        if folder is not None or config.rollout.servers:  # what servers of somebody else hold is anybody's guess
            engine.publish(_evaluated_weights(config, session, folder), 1)
        prompts = session.control.share(lambda: driver.prompts[split])
        metrics = Evaluator(config, engine, prompts, scorer)()
        if driver:
            print(json.dumps(metrics, indent=1), flush=True)
    return 0


def _evaluated_weights(config: Config, session: Session, folder: Path | None) -> Iterable:
    """The weights of one of our checkpoints, or of model.path, in Hugging Face names."""
    from megatron_srpo.bridge import Exporter
    from megatron_srpo.mcore import checkpoint

    hf = read_model_folder(config.model.path)
    policy = _build_policy(config, hf, session, total_steps=1, trainable=False)
    if folder is not None:
        checkpoint.load(policy, folder)
    return Exporter(policy.shards, hf, bucket_bytes=config.bridge.bucket_mib * 2**20)
