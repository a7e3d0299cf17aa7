"""Builds the rollout engine that a configuration asks for, with what it needs of the bridge."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_srpo.config import Config, published_adapters, starts_with_publish
from megatron_srpo.core.environment import unset_variables
from megatron_srpo.core.output_log import rank_log
from megatron_srpo.rewards.registry import unknown
from megatron_srpo.rollout import RolloutEngine, RolloutError
from megatron_srpo.run.roles import Driver, Role
from megatron_srpo.run.session import Session

if TYPE_CHECKING:
    from megatron_srpo.environments.episodes import EpisodeRunner


def build_engine(config: Config, session: Session, role: Role) -> RolloutEngine:
    """The engine of rollout.placement, with the environments of the configuration. Collective."""
    engine = _one_turn_engine(config, session, role)
    if not config.environment.classes:
        return engine
    from megatron_srpo.environments.engine import EpisodeEngine

    try:
        return EpisodeEngine(engine, _episode_runner(config, session, role), session.control)
    except BaseException:
        engine.close()
        raise


def _episode_runner(config: Config, session: Session, role: Role) -> EpisodeRunner | None:
    """On ranks whose engine is handed requests: rank 0 with servers, else the first rank of each engine. Collective."""
    control, topology = session.control, session.topology
    options = control.share(role.chat_options)
    size = topology.world_size if config.rollout.placement == "servers" else config.rollout.tensor_parallel_size

    def build() -> EpisodeRunner | None:
        from megatron_srpo.data import Chat, load_tokenizer
        from megatron_srpo.environments.episodes import EpisodeRunner

        if topology.rank % size:
            return None
        chat = Chat(
            load_tokenizer(config.model.tokenizer or config.model.path), options, config.environment.history,
            gaps=config.teacher.feedback_at == "turn",
        )  # fmt: skip
        scored = {kind for kind in config.environment.classes if unknown(kind, config.reward.functions) is None}
        log = rank_log(config.run.output_dir, "environments", topology.rank, lambda text: role.log.warn(text))
        return EpisodeRunner(config, chat, scored, lambda text: role.log.warn(text), log)

    return control.everywhere(build)


def _one_turn_engine(config: Config, session: Session, role: Role) -> RolloutEngine:
    from megatron_srpo.bridge import Verifier
    from megatron_srpo.rollout import ColocatedEngine

    if config.rollout.placement == "servers":
        return _server_engine(config, session, role)
    engine = ColocatedEngine(
        hf_dir=config.model.path,
        dtype=config.model.dtype,
        rollout=config.rollout,
        max_model_len=_longest(config),
        seed=config.run.seed,
        control_group=session.topology.control_group,
        device=session.topology.device.type,
        tokenizer=config.model.tokenizer,
        verifier=Verifier(config.bridge.verify_every),
        adapters=published_adapters(config),
    )
    if engine.draws_one_by_one and config.rollout.partial_tokens:
        engine.close()
        raise RolloutError(
            f"rollout.partial_tokens = {config.rollout.partial_tokens}: vLLM uses its Model Runner V1 on this GPU, "
            "which would draw the same random numbers for every part of a response. Unset VLLM_USE_V2_MODEL_RUNNER if "
            "it is set; otherwise vLLM does not support this model or these settings with V2, and partial_tokens must "
            "be 0."
        )
    if engine.draws_one_by_one:
        role.log.warn(
            "vLLM uses its Model Runner V1 on this GPU, which draws the tokens of one request after the other; the "
            "samples are right, but decoding is slower. Unset VLLM_USE_V2_MODEL_RUNNER if it is set; otherwise vLLM "
            "does not support this model or these settings with V2."
        )
    return engine


def _longest(config: Config) -> int:
    return config.data.max_prompt_length + config.rollout.max_response_length


def _server_engine(config: Config, session: Session, role: Role) -> RolloutEngine:
    from megatron_srpo.rollout import ServersFollower

    if not isinstance(role, Driver):
        return ServersFollower(session.control, _longest(config), session.topology.device)
    return start_servers(config, session, role.decode, lambda text: role.log.message(text))


def start_servers(
    config: Config, session: Session, decode: Callable[[list[int]], str], say: Callable[[str], None]
) -> RolloutEngine:
    """(rank 0) The engine that starts the configuration's vLLM servers, or connects to them. The other ranks make a
    ServersFollower at the same time."""
    from megatron_srpo.bridge import Verifier
    from megatron_srpo.bridge.weight_stream import Sender, local_address
    from megatron_srpo.rollout import ServersEngine

    rollout, device = config.rollout, session.topology.device
    cuda = device.type == "cuda"
    for line in [] if rollout.servers else unset_variables("rollout.server_environment", rollout.server_environment):
        say(f"warning: {line}")
    backend = rollout.weight_transfer if rollout.weight_transfer != "auto" else "nccl" if cuda else "gloo"

    def make_sender(host: str) -> Sender:
        return Sender(local_address(host, 1), timeout_s=rollout.server_timeout_seconds, backend=backend, device=device)

    return ServersEngine(
        hf_dir=config.model.path, tokenizer=config.model.tokenizer, dtype=config.model.dtype, rollout=rollout,
        max_model_len=_longest(config), seed=config.run.seed, device=device.type, control=session.control,
        make_sender=make_sender, verifier=Verifier(config.bridge.verify_every),
        logs=Path(config.run.output_dir) / "engines", decode=decode, say=say,
        adapters=published_adapters(config), folder_is_first=not starts_with_publish(config),
    )  # fmt: skip


def serve(config: Config, host: str, port: int) -> None:
    """Become a vLLM server for runs with this configuration; does not return."""
    from megatron_srpo.data import load_tokenizer
    from megatron_srpo.mcore.device import choose_device
    from megatron_srpo.rollout import become_server

    load_tokenizer(config.model.tokenizer or config.model.path)  # what is wrong with it is told before vLLM starts
    for line in unset_variables("rollout.server_environment", config.rollout.server_environment):
        print(f"warning: {line}", file=sys.stderr, flush=True)
    become_server(config, _longest(config), choose_device(config.run.device, 0).device.type, host, port)
