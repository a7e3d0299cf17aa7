"""What the types cannot say: contradictions between keys, with the model, and with the number of ranks.

Nothing here imports torch: a wrong configuration is refused in the first second. Every line is the key, its value, why
it cannot be, and the cure.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator

from megatron_srpo.config.check_files import file_problems
from megatron_srpo.config.check_lora import lora_problems, lora_target_problems
from megatron_srpo.config.schema import Config, ParallelConfig
from megatron_srpo.config.templates import template_problems
from megatron_srpo.core.errors import ConfigError
from megatron_srpo.families import HfConfig, ModelShape, unsupported

SMALLEST_MEMORY_MIB = 16  # beyond what the program of the environments has at its start
METRICS = (  # how the names of metrics begin, as a regular expression
    "actor|critic|data|episode|eval|forward|kind|moe|perf|response_length|reward|rollout|rollout_corr|srpo|teacher|timing_s"
)
CPU_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)  # of vLLM's CPU attention


def check(
    config: Config,
    hf_config: HfConfig | None = None,
    world_size: int | None = None,
    *,
    splits: Iterable[str] = (),
) -> None:
    """Raise one ConfigError that lists every contradiction."""
    problems = contradictions(config, hf_config, world_size, splits=splits)
    if problems:
        raise ConfigError(listed("this configuration", problems))


def contradictions(
    config: Config,
    hf_config: HfConfig | None = None,
    world_size: int | None = None,
    *,
    splits: Iterable[str] = (),
) -> list[str]:
    """A line for everything that cannot be.

    `hf_config`: the model's config.json, if it could be read. `world_size`: ranks of all nodes. `splits`: whose files
    must exist ("train", "test").
    """
    problems = [*_batches(config), *_lengths(config), *_sampling(config), *config.algorithm.problems()]
    problems += [*_rewards(config), *_environments(config), *_schedule(config), *_layout(config), *_servers(config)]
    problems += _staleness(config)
    teaching = config.algorithm.teaching
    problems += [
        *lora_problems(config),
        *template_problems(config.teacher, teaching.sources if teaching else ()),
        *file_problems(config, splits),
    ]
    if hf_config is not None:
        problems += _model(config, hf_config)
    if world_size is not None:
        problems += _ranks(config, world_size)
    return problems


def listed(subject: str, problems: list[str]) -> str:
    """One message: a line that counts, then a line for each problem."""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return f"{subject}: {count}\n" + "\n".join(f"  {problem}" for problem in problems)


def distils(config: Config) -> bool:
    """Whether the method has a teacher."""
    return config.algorithm.needs.teacher


def teacher_prompt_length(config: Config) -> int:
    """Tokens of the longest enriched prompt: teacher.max_prompt_length, or what 0 stands for without the templates."""
    return config.teacher.max_prompt_length or config.data.max_prompt_length + config.rollout.max_response_length


def teacher_prompt_limit(config: Config, hf_config: HfConfig, words: int) -> int:
    """As `teacher_prompt_length`. If teacher.max_prompt_length is 0, `words` tokens of the templates are added as far
    as a packed row and the model's positions have room for them."""
    longest, parallel = teacher_prompt_length(config), config.parallel
    if config.teacher.max_prompt_length:
        return longest
    multiple = 2 * parallel.context_parallel_size * parallel.tensor_model_parallel_size  # rows are padded to it at most
    row = config.row_budget - config.row_budget % multiple
    room = min(row, ModelShape.from_hf(hf_config).max_positions) - config.rollout.max_response_length
    return max(longest, min(longest + words, room))


def smallest_world(config: Config) -> int:
    """The smallest number of training ranks that the layout allows."""
    parallel = config.parallel
    copy = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size
    experts = parallel.expert_model_parallel_size * parallel.expert_tensor_parallel_size
    engine = config.rollout.tensor_parallel_size if config.rollout.placement == "colocated" else 1
    return math.lcm(copy, experts * parallel.pipeline_model_parallel_size, engine)


def optimizer_steps(config: Config) -> int:
    """Of the whole run."""
    batch = config.rollout.rollout_batch_size
    return config.run.iterations * math.ceil(batch / (config.train.prompts_per_mini_batch or batch))


def _batches(config: Config) -> Iterator[str]:
    batch, mini = config.rollout.rollout_batch_size, config.train.prompts_per_mini_batch
    if mini and batch % mini:
        yield (
            f"train.prompts_per_mini_batch = {mini}: does not divide rollout.rollout_batch_size = {batch}; "
            f"choose one of {_some(_divisors(batch))}, or 0 for the whole batch"
        )
    algorithm = config.algorithm
    if config.teacher.feedback_with_solution and algorithm.teaching and "feedback" not in algorithm.teaching.sources:
        yield (
            "teacher.feedback_with_solution = true: no feedback is shown to the teacher; set algorithm.use_feedback = "
            'true (or add "feedback" to algorithm.teachers), or set this to false'
        )
    if config.teacher.feedback_at == "turn":
        yield from _feedback_at_turn(config)
    if algorithm.teaching is not None and "solution" in algorithm.teaching.sources and not config.data.solution_key:
        yield (
            'algorithm.teachers: "solution" needs a worked solution in the data, and data.solution_key is empty; name '
            'the field that has it, or remove "solution"'
        )
    if config.rollout.n_samples_per_prompt > 1:
        return
    if algorithm.needs.group_baseline:
        yield (
            f"rollout.n_samples_per_prompt = 1: with algorithm.name = {algorithm.name!r} the advantage is the reward "
            "minus the group's mean, which is always 0 in a group of one; sample at least 2"
        )
    elif algorithm.teaching is not None and algorithm.teaching.sources == ("sibling",):
        yield (
            "rollout.n_samples_per_prompt = 1: no sibling can teach a group of one; sample at least 2, or set "
            "algorithm.use_feedback = true if the rewards give feedback"
        )


def _feedback_at_turn(config: Config) -> Iterator[str]:
    given, teaching = 'teacher.feedback_at = "turn"', config.algorithm.teaching
    if teaching is None:
        yield f'{given}: algorithm.name = "{config.algorithm.name}" has no teacher; set it to "prompt"'
    elif "feedback" not in teaching.sources:
        yield (
            f'{given}: no feedback is shown to the teacher; set algorithm.use_feedback = true (or add "feedback" to '
            'algorithm.teachers), or set this to "prompt"'
        )
    if not config.environment.classes or config.environment.max_turns == 1:
        why = "environment.max_turns is 1" if config.environment.classes else "environment.classes is empty"
        yield (
            f"{given}: every row is answered in one turn, because {why}, and feedback on the first turn stands in the "
            'first prompt in any case; set it to "prompt"'
        )


def _lengths(config: Config) -> Iterator[str]:
    prompt, response = config.data.max_prompt_length, config.rollout.max_response_length
    teacher, cp = teacher_prompt_length(config), config.parallel.context_parallel_size
    budget = config.row_budget - config.row_budget % (2 * cp) if cp > 1 else config.row_budget
    given = f"train.max_tokens_per_gpu = {config.train.max_tokens_per_gpu}"
    row = f"one row, which is spread over context_parallel_size = {cp} ranks" if cp > 1 else "one row"
    if prompt + response > budget:
        yield (
            f"{given}: the longest sample has data.max_prompt_length + rollout.max_response_length = "
            f"{prompt + response} tokens and must fit {row}; raise the budget to {_share(prompt + response, cp)}, "
            "or shorten one of them"
        )
    if distils(config) and teacher + response > budget:
        source = "" if config.teacher.max_prompt_length else " (data.max_prompt_length + rollout.max_response_length)"
        yield (
            f"{given}: the teacher reads up to {teacher} tokens of prompt{source} and {response} of response, which "
            f"must fit {row}; raise the budget to {_share(teacher + response, cp)}, or set a smaller "
            "teacher.max_prompt_length"
        )
    if distils(config) and 0 < config.teacher.max_prompt_length <= prompt:
        yield (
            f"teacher.max_prompt_length = {teacher}: leaves no room for a solution after a question of "
            f"data.max_prompt_length = {prompt} tokens; raise it, or set 0 for {prompt + response}"
        )


def _share(tokens: int, cp: int) -> int:
    """A rank's part of a row that holds a sequence of that many tokens, cut into 2·CP chunks if at all."""
    return tokens if cp == 1 else 2 * math.ceil(tokens / (2 * cp))


def _sampling(config: Config) -> Iterator[str]:
    rollout = config.rollout
    if 0 < rollout.max_num_batched_tokens < rollout.max_num_seqs:
        yield (
            f"rollout.max_num_batched_tokens = {rollout.max_num_batched_tokens}: each of rollout.max_num_seqs = "
            f"{rollout.max_num_seqs} responses takes one token per step; raise it to at least that, lower "
            "rollout.max_num_seqs, or set 0 for vLLM's default"
        )
    for key, value, off in (("top_p", rollout.top_p, 1.0), ("top_k", rollout.top_k, 0)):
        if value != off:
            yield (
                f"rollout.{key} = {value}: training samples must come from the whole distribution, or the importance "
                f"weights against the engine are biased; set {off} (eval.top_p may differ)"
            )
    if config.eval.n_samples > 1 and config.eval.temperature == 0:
        yield (
            f"eval.n_samples = {config.eval.n_samples}: at eval.temperature = 0 all samples are the same answer; "
            "set n_samples = 1, or a temperature above 0"
        )


def _rewards(config: Config) -> Iterator[str]:
    if config.reward.mcq_format != "strict" and "mcq" in config.reward.functions:
        yield (
            f'reward.mcq_format = "{config.reward.mcq_format}": reward.functions.mcq = '
            f'"{config.reward.functions["mcq"]}" scores these rows instead of the built-in function; remove one of them'
        )


def _environments(config: Config) -> Iterator[str]:
    settings, algorithm = config.environment, config.algorithm
    for kind in settings.arguments:
        if kind not in settings.classes:
            yield f"environment.arguments.{kind}: environment.classes has no kind {kind!r}; add it, or remove these"
    for name in settings.variables:
        if not name.isidentifier():
            yield f"environment.variables: {name!r} is not the name of a variable; name it alone, without its value"
    if not settings.classes:
        return
    for kind, reference in settings.classes.items():
        attempts = settings.arguments.get(kind, {}).get("attempts", 1)
        if reference == "python" and isinstance(attempts, int) and attempts > settings.max_turns:
            yield (
                f"environment.arguments.{kind}.attempts = {attempts}: an episode is cut after environment.max_turns = "
                f"{settings.max_turns} turns, and each attempt is one; lower it, or raise environment.max_turns"
            )
    if settings.max_turn_tokens > config.rollout.max_response_length:
        yield (
            f"environment.max_turn_tokens = {settings.max_turn_tokens}: is above rollout.max_response_length = "
            f"{config.rollout.max_response_length}, which limits all turns together; lower it, or set 0"
        )
    if 0 < settings.memory_mib < SMALLEST_MEMORY_MIB:
        yield (
            f"environment.memory_mib = {settings.memory_mib}: an episode cannot run with less than "
            f"{SMALLEST_MEMORY_MIB} MiB; raise it, or set 0 for no limit"
        )
    if config.rollout.partial_tokens:
        yield (
            f"rollout.partial_tokens = {config.rollout.partial_tokens}: an unfinished episode of an environment cannot "
            'go on in the next iteration; set it to 0 (with rollout.placement = "servers", rollout.max_staleness runs '
            "episodes ahead of the training)"
        )
    if settings.history == "split":
        for key, value, wrong in (
            ("importance_ratio", algorithm.importance_ratio, "sequence"),
            ("rollout_correction", algorithm.rollout_correction, "sequence_mask"),
        ):
            if value == wrong:
                yield (
                    f'algorithm.{key} = "{wrong}": takes a mean over a whole response, and environment.history = '
                    '"split" may train an episode as several samples; set environment.history = "keep"'
                )


def _schedule(config: Config) -> Iterator[str]:
    optimizer, steps = config.optimizer, optimizer_steps(config)
    if optimizer.min_lr > optimizer.lr:
        yield f"optimizer.min_lr = {optimizer.min_lr}: is above optimizer.lr = {optimizer.lr}; lower it"
    if optimizer.warmup_steps > steps:
        yield (
            f"optimizer.warmup_steps = {optimizer.warmup_steps}: the run has only {steps} optimizer steps and would "
            "never reach optimizer.lr; lower it, or raise run.iterations"
        )
    if config.eval.every and not config.data.test:
        yield f"eval.every = {config.eval.every}: data.test is empty; name the held-out file, or set eval.every = 0"
    if config.train.stop_on_collapse and not config.train.collapse_share:
        yield (
            "train.stop_on_collapse = true: train.collapse_share = 0 switches the warning off at which it would stop; "
            "set a share (0.5 is the default), or stop_on_collapse = false"
        )
    saved, evaluated = config.checkpoint.every, config.eval.every
    best = config.checkpoint.keep_best
    if best and not re.fullmatch(rf"-?({METRICS})/\S+", best):
        yield (
            f'checkpoint.keep_best = "{best}": is no metric, so that no checkpoint would be kept; one is written '
            'like "eval/accuracy" or "critic/score/mean" (docs/metrics.md)'
        )
    if best.removeprefix("-").startswith("eval/") and (not evaluated or saved % evaluated):
        yield (
            f'checkpoint.keep_best = "{best}": is not measured at every checkpoint (checkpoint.every = {saved}, '
            f"eval.every = {evaluated}); make checkpoint.every a multiple of eval.every"
        )


def _layout(config: Config) -> Iterator[str]:
    parallel = config.parallel
    virtual = parallel.virtual_pipeline_model_parallel_size
    if virtual > 1 and parallel.pipeline_model_parallel_size == 1:
        yield (
            f"parallel.virtual_pipeline_model_parallel_size = {virtual}: an interleaved schedule needs several "
            "stages, but parallel.pipeline_model_parallel_size is 1; set it to 1, or raise that size"
        )
    model = config.model
    if model.recompute_layers and model.recompute != "full":
        yield (
            f'model.recompute_layers = {model.recompute_layers}: it needs model.recompute = "full", but '
            f'model.recompute = "{model.recompute}"; set it to 0, or recompute to "full"'
        )
    if model.fp8 != "off" and config.run.device == "cpu":
        yield f'model.fp8 = "{model.fp8}": a CPU has no FP8 matrix products; set it to "off", or use a GPU'
    if model.fp8 != "off" and model.dtype != "bfloat16":
        yield f'model.fp8 = "{model.fp8}": needs model.dtype = "bfloat16", but model.dtype = "{model.dtype}"'
    if config.rollout.sleep_while_training and config.run.device == "cpu":
        yield "rollout.sleep_while_training = true: an engine on a CPU cannot sleep; set it to false"
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size == 1:
        yield (
            "parallel.sequence_parallel = true: it splits activations over tensor-parallel ranks, but "
            "parallel.tensor_model_parallel_size is 1; set it to false, or raise that size"
        )


def _servers(config: Config) -> Iterator[str]:
    rollout = config.rollout
    if config.train.offload_while_generating and rollout.placement == "servers":
        yield (
            "train.offload_while_generating = true: makes room for engines in the training ranks, but "
            'rollout.placement is "servers"; set it to false'
        )
    elif config.train.offload_while_generating and not rollout.sleep_while_training:
        yield (
            "train.offload_while_generating = true: has no benefit if the engine keeps its memory during the "
            "training; set rollout.sleep_while_training = true as well"
        )
    if rollout.placement == "colocated":
        if rollout.max_staleness and not rollout.partial_tokens:
            yield (
                f"rollout.max_staleness = {rollout.max_staleness}: engines in the training ranks cannot generate while "
                'these train; set it to 0, rollout.placement = "servers", or rollout.partial_tokens'
            )
        if rollout.servers:
            yield 'rollout.servers: lists servers, but rollout.placement is "colocated"; set it to "servers"'
        return
    for url in rollout.servers:
        if not re.fullmatch(r"http://(\[[0-9a-fA-F:]+\]|[^/:\s]+):\d+/?", url):
            yield f'rollout.servers: "{url}" is not the address of a server; expected http://HOST:PORT'
    if len(set(rollout.servers)) < len(rollout.servers):
        yield "rollout.servers: lists one server twice; each server is one engine, so list it once"
    last = rollout.server_port + rollout.num_servers - 1
    if rollout.server_port and last > 65535:
        yield f"rollout.server_port = {rollout.server_port}: the last server's port would be {last}; lower it"


def _staleness(config: Config) -> Iterator[str]:
    """Why responses cannot be older than the policy that they train."""
    rollout, staleness = config.rollout, config.rollout.max_staleness
    without = "rollout.max_staleness = 0" + (" and rollout.partial_tokens = 0" if rollout.partial_tokens else "")
    if staleness and rollout.max_refills:
        yield (
            f"rollout.max_refills = {rollout.max_refills}: refills need an unknown number of batches, but "
            f"responses are generated ahead of the training; set it to 0, or {without}"
        )
    if staleness and config.algorithm.rollout_correction == "off":
        yield (
            f"rollout.max_staleness = {staleness}: stale samples are biased without importance weights; "
            f'set algorithm.rollout_correction = "truncate", or {without}'
        )
    if not rollout.partial_tokens:
        if rollout.partial_groups:
            yield (
                f"rollout.partial_groups = {rollout.partial_groups}: has no effect without partial rollouts; set it to "
                "0, or set rollout.partial_tokens"
            )
        return
    given = f"rollout.partial_tokens = {rollout.partial_tokens}"
    if rollout.placement == "servers":
        yield (
            f"{given}: servers generate ahead of the training by themselves (rollout.max_staleness); set it to 0, or "
            'rollout.placement = "colocated"'
        )
    if not staleness:
        yield (
            f"{given}: a response that goes on in the next iteration is older than the policy it trains, but "
            "rollout.max_staleness is 0; set that to at least 1, or this to 0"
        )
    elif rollout.extra_groups > staleness * rollout.rollout_batch_size:
        yield (
            f"rollout.partial_groups = {rollout.partial_groups}: that many groups cannot be trained within "
            f"rollout.max_staleness = {staleness} iterations of rollout.rollout_batch_size = "
            f"{rollout.rollout_batch_size}; set at most {staleness * rollout.rollout_batch_size}, or raise "
            "max_staleness"
        )
    if rollout.partial_tokens >= rollout.max_response_length:
        yield (
            f"{given}: is not below rollout.max_response_length = {rollout.max_response_length}, so a round would "
            "complete every response; lower it, for example to an eighth of that, or set 0"
        )


def _model(config: Config, hf: HfConfig) -> Iterator[str]:
    problems = unsupported(hf)
    yield from problems
    if problems:  # its numbers may mean something else, or be absent
        return
    shape = ModelShape.from_hf(hf)
    yield from layout_problems(config.parallel, hf)
    yield from _engine_split(config, shape)
    yield from _experts(config, shape)
    yield from lora_target_problems(config.lora, shape, config.parallel.pipeline_model_parallel_size)
    vocabulary, longest = shape.vocab, shape.max_positions
    topk, head = config.algorithm.needs.topk, shape.head_dim
    if distils(config) and topk > vocabulary:
        yield (
            f"algorithm.distillation_topk = {topk}: the model's vocabulary has {vocabulary} tokens; lower it, or set 0 "
            "for the full vocabulary"
        )
    prompt = config.data.max_prompt_length
    if distils(config):
        prompt = max(prompt, teacher_prompt_length(config))
    if prompt + config.rollout.max_response_length > longest:
        whose = "teacher's enriched prompt" if prompt > config.data.max_prompt_length else "data.max_prompt_length"
        yield (
            f"rollout.max_response_length = {config.rollout.max_response_length}: with the {whose} ({prompt} tokens) "
            f"this exceeds the model's max_position_embeddings = {longest}; shorten prompts or responses"
        )
    if config.run.device == "cpu" and head not in CPU_HEAD_DIMS:
        sizes = ", ".join(map(str, CPU_HEAD_DIMS))
        yield f'run.device = "cpu": the model has head_dim {head}, but vLLM on a CPU supports only {sizes}; use a GPU'


def layout_problems(parallel: ParallelConfig, hf: HfConfig) -> Iterator[str]:
    """Why the trainer's ranks cannot share this model, a line each."""
    shape = ModelShape.from_hf(hf)
    sizes, layers = _split_sizes(shape), shape.layers
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    uneven = [f"{name} = {size}" for name, size in sizes.items() if size % tp]
    if uneven:
        yield (
            f"parallel.tensor_model_parallel_size = {tp}: does not divide the model's {', '.join(uneven)}; every rank "
            f"needs whole heads and key-value heads: choose one of {_some(_divisors(math.gcd(*sizes.values())))}"
        )
    yield from _expert_layout(parallel, shape)
    virtual = parallel.virtual_pipeline_model_parallel_size
    if pp * virtual > layers:
        pieces = f"{pp} pipeline stages" + (f" in {virtual} pieces each" if virtual > 1 else "")
        yield (
            f"parallel.pipeline_model_parallel_size = {pp}: {pieces} take at least {pp * virtual} layers, but the "
            f"model's num_hidden_layers = {layers}; lower it"
        )


def _split_sizes(shape: ModelShape) -> dict[str, int]:
    """The sizes that tensor parallelism divides; intermediate_size only if a layer has it."""
    sizes = {"num_attention_heads": shape.heads, "num_key_value_heads": shape.groups}
    return sizes if all(shape.expert_layers) else sizes | {"intermediate_size": shape.ffn}


def _expert_layout(parallel: ParallelConfig, shape: ModelShape) -> Iterator[str]:
    """Why the experts cannot be divided evenly among the trainer's ranks."""
    count = shape.experts
    ep, etp = parallel.expert_model_parallel_size, parallel.expert_tensor_parallel_size
    if not count:
        for name, size in (("model", ep), ("tensor", etp)):
            if size > 1:
                yield f"parallel.expert_{name}_parallel_size = {size}: the model has no experts; set it to 1"
        return
    width = shape.expert_ffn
    if count % ep:
        yield (
            f"parallel.expert_model_parallel_size = {ep}: does not divide the model's {count} experts; choose one of "
            f"{_some(_divisors(count))}"
        )
    if width % etp:
        yield (
            f"parallel.expert_tensor_parallel_size = {etp}: does not divide the model's moe_intermediate_size = "
            f"{width}; choose one of {_some(_divisors(width))}"
        )


def _engine_split(config: Config, shape: ModelShape) -> Iterator[str]:
    """Why the heads cannot be divided evenly among the ranks of an engine."""
    sizes = _split_sizes(shape)
    heads, groups, ffn = sizes["num_attention_heads"], sizes["num_key_value_heads"], sizes.get("intermediate_size", 0)
    engine = config.rollout.tensor_parallel_size
    fits = [size for size in _divisors(math.gcd(heads, ffn)) if groups % size == 0 or size % groups == 0]
    if engine not in fits:
        yield (
            f"rollout.tensor_parallel_size = {engine}: does not fit the model's "
            f"{', '.join(f'{name} = {size}' for name, size in sizes.items())}; choose one of {_some(fits)}"
        )


def _experts(config: Config, shape: ModelShape) -> Iterator[str]:
    """Why the run's other settings do not fit a model with experts, or one without."""
    parallel = config.parallel
    if not shape.experts:
        if config.train.moe_aux_loss_coef:
            yield f"train.moe_aux_loss_coef = {config.train.moe_aux_loss_coef}: the model has no experts; set it to 0"
        if config.rollout.routing_replay in ("rollout", "old"):
            yield (
                f'rollout.routing_replay = "{config.rollout.routing_replay}": the model has no experts; set it to '
                '"auto" or "off"'
            )
        if config.teacher.routing_replay:
            yield "teacher.routing_replay = true: the model has no experts; set it to false"
        return
    if config.teacher.routing_replay and config.rollout.replay(shape.experts) != "rollout":
        yield (
            f'teacher.routing_replay = true: with rollout.routing_replay = "{config.rollout.routing_replay}" the '
            'engine returns no experts; set it to false, or rollout.routing_replay = "rollout"'
        )
    width, engine = shape.expert_ffn, config.rollout.tensor_parallel_size
    if width % engine:
        yield (
            f"rollout.tensor_parallel_size = {engine}: does not divide the model's moe_intermediate_size = {width}; "
            f"choose one of {_some(_divisors(width))}"
        )
    if parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel:
        yield (
            "parallel.sequence_parallel = false: with experts and parallel.tensor_model_parallel_size > 1 "
            "Megatron would send every token from each rank; set it to true"
        )
    if config.run.device == "cpu" and shape.hidden % 32:
        yield (
            f'run.device = "cpu": the model has experts and hidden_size {shape.hidden}, but vLLM on a CPU '
            "supports only multiples of 32 with experts; use a GPU"
        )


def _ranks(config: Config, world_size: int) -> Iterator[str]:
    parallel, engine = config.parallel, config.rollout.tensor_parallel_size
    tp, pp, cp = (
        parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size, parallel.context_parallel_size,
    )  # fmt: skip
    copies = tp * pp * cp
    started = "1 rank was started" if world_size == 1 else f"{world_size} ranks were started"
    if world_size % copies:
        needed = math.lcm(copies, engine) * math.ceil(world_size / math.lcm(copies, engine))
        yield (
            f"parallel: one copy of the model takes tensor {tp} × pipeline {pp} × context {cp} = {copies} ranks, but "
            f"{started}; start a multiple of {copies} (python -m megatron_srpo.torchrun --nproc-per-node {needed} "
            "-m megatron_srpo …), or lower a size"
        )
    ep, etp = parallel.expert_model_parallel_size, parallel.expert_tensor_parallel_size
    if world_size % (ep * etp * pp) and world_size % copies == 0:
        yield (
            f"parallel: all experts take expert {ep} × expert tensor {etp} × pipeline {pp} = {ep * etp * pp} ranks, "
            f"but {started}; start a multiple of {math.lcm(copies, ep * etp * pp)}, or lower a size"
        )
    if config.rollout.placement == "colocated" and world_size % engine:
        yield (
            f"rollout.tensor_parallel_size = {engine}: one engine takes {engine} ranks, but {started}; choose one of "
            f"{_some(_divisors(world_size))}"
        )


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _some(sizes: list[int]) -> str:
    """The first ten of them, in words."""
    return ", ".join(map(str, sizes[:10])) + (", …" if len(sizes) > 10 else "")
