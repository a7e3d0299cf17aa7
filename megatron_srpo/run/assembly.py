"""Builds the parts of a run from its configuration: the only place where all packages meet."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from megatron_srpo.batching.collapse import CollapseAlarm
from megatron_srpo.batching.diagnosis import SkippedSteps
from megatron_srpo.batching.handover import Handover
from megatron_srpo.batching.teacher_refresh import TeacherRefresh
from megatron_srpo.config import (
    BUCKET_MIB,
    Config,
    published_adapters,
    read_model_folder,
    save_resolved,
    starts_with_publish,
)
from megatron_srpo.core.environment import unset_variables
from megatron_srpo.core.output_log import rank_log
from megatron_srpo.core.protocols import Scorer, Store
from megatron_srpo.families import HfConfig, ModelShape
from megatron_srpo.run.engines import build_engine
from megatron_srpo.run.evaluation import chosen_prompts
from megatron_srpo.run.generation import Evaluator, replay_mode
from megatron_srpo.run.roles import Role
from megatron_srpo.run.session import Session
from megatron_srpo.run.stopping import StopRequest
from megatron_srpo.run.timer import PhaseTimer
from megatron_srpo.run.watchdog import Watchdog

if TYPE_CHECKING:
    from megatron_srpo.bridge import Exporter
    from megatron_srpo.checkpoints.saving import Restored
    from megatron_srpo.mcore.policy import Policy
    from megatron_srpo.rollout import RolloutEngine
    from megatron_srpo.trainer import Components


def build_scorer(config: Config, session: Session, role: Role, closing: ExitStack) -> Scorer:
    """Reward workers on every rank that an engine hands its responses to; the configured number is shared among
    them."""
    from megatron_srpo.data import Demonstrations
    from megatron_srpo.rewards import RewardPool
    from megatron_srpo.rewards.registry import unknown
    from megatron_srpo.run.scorer import IdleScorer, PoolScorer

    control, topology = session.control, session.topology
    # With servers, rank 0 receives the responses of all of them.
    size = topology.world_size if config.rollout.placement == "servers" else config.rollout.tensor_parallel_size
    workers = -(-config.reward.workers // max(1, topology.world_size // size))
    # Environments may give the rewards of their kinds themselves.
    own = {kind for kind in config.environment.classes if unknown(kind, config.reward.functions)}
    kinds = control.share(role.kinds) - own
    chat_options, opening = control.share(role.chat_options), control.share(role.opening)

    def build() -> Scorer:
        if topology.rank % size:
            return IdleScorer(control)
        for line in unset_variables("reward.environment", config.reward.environment):
            role.log.warn(line)
        log = rank_log(config.run.output_dir, "rewards", topology.rank, lambda text: role.log.warn(text))
        reward = config.reward.model_copy(update={"workers": workers})
        pool = closing.enter_context(RewardPool(reward, kinds, log))
        scorer = PoolScorer(
            pool, control, threshold=config.algorithm.success_reward_threshold, leads=control.is_driver,
            opening=opening,
        )  # fmt: skip
        teaching = config.algorithm.teaching
        if teaching is not None and ("sibling" in teaching.sources or teaching.needs.contrast):
            demonstrations = Demonstrations(config.model.tokenizer or config.model.path, chat_options)
            closing.callback(demonstrations.close)
            scorer.tokenize(demonstrations, wrong=teaching.needs.contrast)
        return scorer

    return control.everywhere(build)


def build_policy(config: Config, session: Session, *, trainable: bool) -> Policy:
    """The model with the weights of model.path, and with lora.rank the adapters of lora.path or new ones."""
    from megatron_srpo.bridge import load_weights
    from megatron_srpo.config.check import optimizer_steps
    from megatron_srpo.mcore.policy import Policy

    return Policy(
        config, read_model_folder(config.model.path), session.topology, session.path,
        partial(load_weights, hf_dir=config.model.path, lora=config.lora), total_steps=optimizer_steps(config),
        trainable=trainable,
    )  # fmt: skip


def bucket_bytes(config: Config, device: str) -> int:
    """bridge.bucket_mib in bytes, or the size for this device."""
    return (config.bridge.bucket_mib or BUCKET_MIB[device]) * 2**20


def build_exporter(config: Config, policy: Policy, *, adapters: bool = False) -> Exporter:
    """The policy's weights in Hugging Face names, adapters merged into them, or with `adapters` these alone."""
    from megatron_srpo.bridge import Exporter

    hf = read_model_folder(config.model.path)
    shards = policy.shards.of_adapters() if adapters else policy.shards
    return Exporter(shards, hf, bucket_bytes=bucket_bytes(config, policy.topology.device.type))


def _evaluated_at_once(config: Config, ranks: int) -> int:
    """Responses of one batch of an evaluation: as many as the engines generate at a time, or a training batch."""
    rollout = config.rollout
    engines = len(rollout.servers) or rollout.num_servers
    if rollout.placement != "servers":
        engines = ranks // rollout.tensor_parallel_size
    return max(engines * rollout.max_num_seqs, rollout.rollout_batch_size * rollout.n_samples_per_prompt)


def _head_bytes(config: Config, hf: HfConfig) -> int:
    """Size of a rank's shard of the LM head in the model's dtype."""
    shape = ModelShape.from_hf(hf)
    rows = -(-shape.vocab // config.parallel.tensor_model_parallel_size)
    return rows * shape.hidden * (4 if config.model.dtype == "float32" else 2)


def build_parts(
    config: Config, session: Session, role: Role, scorer: Scorer, stop: StopRequest, watchdog: Watchdog,
    closing: ExitStack,
) -> tuple[Components, Restored | None, Exporter]:  # fmt: skip
    """The parts of the loop, the checkpoint that they go on from, if any, and the export that the run writes at its
    end."""
    from megatron_srpo.checkpoints.saving import Checkpoints
    from megatron_srpo.losses.objective import Objective
    from megatron_srpo.mcore import checkpoint
    from megatron_srpo.mcore.device import device_name
    from megatron_srpo.plan import Architecture, Meter
    from megatron_srpo.run.start_check import check_start, probes, routing_note
    from megatron_srpo.trainer import Components

    def open_engine() -> RolloutEngine:
        engine = build_engine(config, session, role)
        closing.callback(engine.close)
        return engine

    control, topology = session.control, session.topology
    # Servers start in processes of their own while this one loads the policy; the first call that needs them waits.
    servers = open_engine() if config.rollout.placement == "servers" else None
    policy = build_policy(config, session, trainable=True)
    hf = read_model_folder(config.model.path)
    architecture = Architecture.from_hf(hf)
    # Of the model as it computes, or of the adapters alone: what is published, and what the run leaves behind.
    kinds = published_adapters(config) is not None, config.writes_adapter
    exporters = {alone: build_exporter(config, policy, adapters=alone) for alone in {*kinds}}
    published, trained = (exporters[alone] for alone in kinds)
    store = Checkpoints(config, control, checkpoint, lambda text: role.log.message(text))
    restored = store.restore(policy)
    start, state = (restored.iteration, restored.state) if restored else (0, {})
    if restored:
        control.share(lambda: role.restore_data(store.restore_data, state.get("loader", {})))
    control.share(lambda: save_resolved(config, Path(config.run.output_dir) / "config.toml"))  # nothing refused it
    with policy.on_host() if config.train.offload_while_generating else nullcontext():
        engine = servers or open_engine()
        if config.rollout.sleep_while_training:
            engine.sleep()
    # External servers may still hold another run's weights, and adapters are not in model.path.
    if start or config.rollout.servers or starts_with_publish(config):
        engine.publish(published, start)
    objective = Objective(config, head_bytes=_head_bytes(config, hf))
    if start < config.run.iterations:
        sample = control.share(lambda: probes(config, role.prompts("train")))
        replays = replay_mode(config) == "rollout"
        agreement = check_start(config, control, engine, policy, objective, sample, experts=replays)
        for line in filter(None, (agreement, routing_note(config, hf))):
            role.log.message(line)
    test, chosen = chosen_prompts(control.share(lambda: role.prompts("test")), config.eval, "test")
    if config.eval.every:
        role.log.message(chosen)
    control.share(lambda: role.open_log(start, state.get("observer", {})))
    handover = Handover(config, state.get("handover", {}))
    source = role.source(
        control, engine, scorer, start=start, dp_size=topology.dp_size, padding=policy.padding, handover=handover
    )
    parts = Components(
        config=config,
        control=control,
        source=source,
        policy=policy,
        objective=objective,
        engine=engine,
        weights=published,
        evaluate=Evaluator(
            config,
            engine,
            test,
            scorer,
            stop=lambda: control.any(stop()),
            requests=_evaluated_at_once(config, topology.world_size),
            say=lambda text: role.log.message(text),
        ),
        store=cast(Store, store),  # generic in the policy, which mypy cannot match with a protocol
        log=role.log,
        timer=PhaseTimer(watchdog.phase),
        meter=Meter(architecture, topology.world_size, device_name(topology.device), frozen=config.lora.rank > 0),
        should_stop=stop,
        skipped=SkippedSteps(config.train.max_skipped_steps, state.get("skipped_in_a_row", 0)),
        refresh=TeacherRefresh(config, state.get("teacher", {})),
        handover=handover,
        collapse=CollapseAlarm(config, state.get("collapse", {})),
    )
    if restored:
        restored.restore_generators()
    return parts, restored, trained
