"""The planner: parameters against transformers, the search's promises, its configuration against the trainer's."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch

from megatron_srpo.config import Config, contradictions, load_config
from megatron_srpo.plan import MACHINES, SHIPPED, Architecture, Layout, Workload, machine_of, read_architecture, search
from megatron_srpo.plan.activations import stage_activations
from megatron_srpo.plan.configuration import configuration, layout_of, own_engine_gpus, sections, workload_of
from megatron_srpo.plan.duration import (
    forward_flops,
    generate_seconds,
    iteration_time,
    optimizer_seconds,
    pass_seconds,
    publish_seconds,
    student_pass,
    swap_seconds,
    teacher_pass,
)
from megatron_srpo.plan.layout import impossible
from megatron_srpo.plan.memory import (
    engine_memory,
    loading_bytes,
    persistent_lines,
    publish_bytes,
    stage_parameters,
    teacher_bytes,
    train_pass_finds_topk,
    training_memory,
)
from megatron_srpo.plan.parameters import adapter_parameters, published_adapters
from megatron_srpo.plan.search import complexity, evaluate
from megatron_srpo.plan.sharing import kept_keys, question_copies
from megatron_srpo.run import cli
from megatron_srpo.run.planning import _engine_nodes
from slurm.plan import lines as job_lines

H100 = machine_of("h100")
SMALL = Workload(prompts=4, samples=4, response_mean=300, response_max=1000, teacher_prompt_max=2000, prompt_max=500)


@pytest.mark.parametrize(
    "name", ["Qwen3-0.6B", "Qwen3-8B", "Qwen3-32B", "Qwen3-30B-A3B", "Qwen3-235B-A22B", "Llama-3.1-8B-Instruct"]
)
def test_a_shipped_models_parameters_are_those_of_transformers_own(name):
    from transformers import AutoConfig, AutoModelForCausalLM

    arch, hf = read_architecture(name)
    config = AutoConfig.for_model(**hf)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert arch.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_layers_without_experts_count_in_the_parameters_and_pass_the_check_of_every_rank(tmp_path, capsys):
    hf = SHIPPED["Qwen3-30B-A3B"] | {"num_hidden_layers": 4, "mlp_only_layers": [0], "num_experts": 8}
    (tmp_path / "config.json").write_text(json.dumps(hf))
    (tmp_path / "run.toml").write_text(f'[model]\npath = "{tmp_path}"\n[data]\ntrain = "d.jsonl"\n')
    assert cli.main(["plan", "--check", str(tmp_path / "run.toml"), "--gpus", "1"]) == 0
    assert "exported, as config.json implies" in capsys.readouterr().out


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (4, 2), (1, 2)])
def test_the_ranks_of_a_model_have_its_parameters_and_their_own_norms(name, tensor, pipeline):
    arch, _ = read_architecture(name)
    layout = Layout(tensor * pipeline, tensor, pipeline)
    parts = [stage_parameters(arch, layout, stage) for stage in range(pipeline)]
    everywhere = arch.layers * (arch.small_vectors + arch.experts * arch.hidden) + arch.hidden  # on each tensor rank
    copies = arch.vocab * arch.hidden if arch.tied and pipeline > 1 else 0
    experts = sum(part.experts for part in parts)
    found = tensor * sum(part.ordinary for part in parts) - (tensor - 1) * everywhere - copies + experts
    assert found == arch.parameters


@pytest.mark.parametrize("name", ["Qwen3-8B", "Llama-3.1-8B-Instruct"])
def test_adapters_have_the_factors_of_every_projection_of_transformers_own_model(name):
    from transformers import AutoConfig, AutoModelForCausalLM

    arch, hf = read_architecture(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**hf))
    shapes = [module.weight.shape for name, module in model.named_modules() if name.endswith("_proj")]
    assert adapter_parameters(arch, Layout(1, lora_rank=16), 0).whole == sum(16 * (a + b) for a, b in shapes)
    published = sum(16 * (a + b) for a, b in shapes), 2 * len(shapes)
    assert published_adapters(arch, Layout(4, 2, 2, lora_rank=16)) == published
    parts = [adapter_parameters(arch, Layout(4, 2, 2, lora_rank=16), stage) for stage in range(2)]
    split = sum(16 * (a + b) for a, b in shapes) - arch.layers * 16 * 7 * arch.hidden  # the factors that TP splits
    assert 2 * sum(part.whole for part in parts) == split + 2 * arch.layers * 16 * 7 * arch.hidden


def test_adapters_need_no_offload_where_all_weights_do():
    arch, _ = read_architecture("Qwen3-32B")
    layout = Layout(8, 8, recompute="full", engine_tensor=4, engine_memory=0.55)
    workload = dataclasses.replace(SMALL, teacher_prompt_max=10240, response_max=8192)
    assert not evaluate(arch, layout, H100, workload).memory.fits
    adapters = dataclasses.replace(layout, lora_rank=32)
    found = evaluate(arch, adapters, H100, workload)
    assert found.memory.fits and "LoRA of rank 32" in adapters.name()
    lines = persistent_lines(arch, adapters, 0)
    trained = adapter_parameters(arch, adapters, 0).whole
    whole, alone = (publish_seconds(arch, one, H100) for one in (layout, adapters))
    assert 0 < alone < 0.25 * whole  # most of it is the latency of 896 factors
    assert lines["gradients"] == 4 * trained and lines["optimizer"] == 12 * trained and lines["shadow"] == 4 * trained


def test_found_layouts_fit_are_sorted_and_can_be():
    arch, _ = read_architecture("Qwen3-0.6B")
    found = search(arch, 4, H100, SMALL, show=20)
    assert len(found.best) > 5
    seconds = [candidate.step_seconds for candidate in found.best]
    assert seconds[1:] == sorted(seconds[1:]) and seconds[0] <= 1.03 * min(seconds)
    near = [one for one in found.best if one.step_seconds <= 1.03 * min(seconds)]
    assert complexity(found.best[0].layout) == min(complexity(one.layout) for one in near)
    for candidate in found.best:
        assert not list(impossible(candidate.layout, arch))
        assert candidate.memory.total <= candidate.memory.limit == 0.97 * H100.memory
        assert sum(candidate.time.lines.values()) == pytest.approx(candidate.step_seconds)
        assert 0 < candidate.mfu < candidate.train_mfu < 1
        assert candidate.layout.max_tokens * candidate.layout.context >= SMALL.longest_row


@pytest.mark.parametrize(
    ("name", "odd"), [("Qwen3-4B", {"intermediate_size": 9724}), ("Qwen3-30B-A3B", {"moe_intermediate_size": 764})]
)
def test_no_layout_has_engines_that_would_cut_the_width_of_an_mlp_unevenly(name, odd):
    hf = SHIPPED[name] | odd  # a multiple of 4, but not of 8
    found = search(Architecture.from_hf(hf, name), 8, machine_of("h200"), SMALL, show=3)
    assert found.best and all(candidate.layout.engine_tensor <= 4 for candidate in found.best)
    configuration(found.best[0].layout, SMALL, "m", hf)


def test_what_does_not_fit_says_what_is_largest():
    arch, _ = read_architecture("Qwen3-32B")
    found = search(arch, 1, H100, SMALL)
    assert not found.best and found.misfits
    (nearest, *_) = found.misfits
    assert nearest.memory.total > H100.memory or nearest.memory.notes
    assert nearest.memory.lines["gradients"] > H100.memory


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("Qwen3-32B", Layout(32, 8, recompute="full")),
        ("Qwen3-30B-A3B", Layout(16, 4, expert=16, recompute="full")),
        ("Qwen3-235B-A22B", Layout(128, 4, 2, expert=64, recompute="full")),
    ],
)
def test_a_checkpoint_is_loaded_in_the_memory_of_a_training_step(name, layout):
    arch, _ = read_architecture(name)
    plan = training_memory(arch, layout, Workload(), H100, rows=4)
    for stage in range(layout.pipeline):
        loading = sum(persistent_lines(arch, layout, stage).values()) + loading_bytes(arch, layout, stage)
        assert loading < min(plan.total, H100.memory)
    whole = 4 * max(stage_parameters(arch, layout, stage).whole for stage in range(layout.pipeline))
    assert plan.host_loading <= 8 * whole  # one kind of state of the eight ranks of a node
    more = training_memory(arch, dataclasses.replace(layout, gpus=4 * layout.gpus), Workload(), H100, rows=4)
    assert more.host_loading < plan.host_loading  # with more data-parallel ranks each reads a smaller part


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("Qwen3-8B", Layout(16, 4, recompute="full")),
        ("Qwen3-32B", Layout(32, 8, recompute="full")),
        ("Qwen3-30B-A3B", Layout(16, 4, expert=16, recompute="full")),
        ("Qwen3-235B-A22B", Layout(256, 4, 2, expert=64, recompute="full")),
    ],
)
def test_the_nodes_that_save_a_checkpoint_together_copy_every_number_once(name, layout):
    arch, _ = read_architecture(name)
    everything = layout.gpus / 8 * training_memory(arch, layout, Workload(), H100, rows=4).host_saving
    state = 18 * arch.parameters  # bf16 weights; fp32 main parameters, two moments, the teacher
    assert state <= everything < 1.07 * state


def test_a_rank_that_saves_copies_at_least_one_of_the_largest_chunks():
    arch, _ = read_architecture("Qwen3-8B")
    plan = training_memory(arch, Layout(512, 1, recompute="full"), Workload(), H100, rows=4)
    assert plan.host_saving == 8 * 4 * arch.vocab * arch.hidden > 8 * 18 * arch.parameters / 512


def test_more_of_a_resource_is_never_slower_and_recompute_saves_memory():
    arch, _ = read_architecture("Qwen3-8B")
    workload = Workload()
    base = Layout(8, 4, max_tokens=18432, engine_sleeps=True)
    half = dataclasses.replace(base, recompute="full", recompute_layers=18)
    ways = [dataclasses.replace(base, recompute=way) for way in ("full", "selective", "none")]
    full, some, none = (sum(stage_activations(arch, way, 0, 18432, 1, path="te")) for way in ways)
    assert full < sum(stage_activations(arch, half, 0, 18432, 1, path="te")) < none and full < some < none
    fast = dataclasses.replace(H100, flops=2 * H100.flops, bandwidth=2 * H100.bandwidth, link=2 * H100.link)
    slow, quick = (iteration_time(arch, base, machine, workload, 1e10) for machine in (H100, fast))
    assert all(quick.lines[name] <= seconds for name, seconds in slow.lines.items())
    assert quick.lines["train"] < 0.6 * slow.lines["train"]


def test_a_trainer_that_leaves_makes_room_for_the_engine_and_pays_for_the_way():
    arch, _ = read_architecture("Qwen3-32B")
    workload = Workload()
    given = {"recompute": "full", "engine_tensor": 4, "engine_memory": 0.85, "engine_sleeps": True}
    stays = Layout(32, 4, 4, max_tokens=18432, **given)
    leaves = dataclasses.replace(stays, trainer_leaves=True)
    crowded, free = (evaluate(arch, layout, H100, workload) for layout in (stays, leaves))
    assert crowded.memory.total > H100.memory >= free.memory.total and crowded.time is None
    parameters = stage_parameters(arch, leaves, 3).whole * (2 + 16 / 2)  # weights; main, moments and shadow over DP 2
    assert free.time.lines["offload"] == pytest.approx(2 * parameters / 25e9, rel=0.05)
    config = configuration(leaves, workload, "runs/models/Qwen3-32B", SHIPPED["Qwen3-32B"])
    assert config.train.offload_while_generating and config.rollout.sleep_while_training


def test_turns_keep_the_trainer_and_sleep_keeps_the_engines_weights_in_host_memory(capsys):
    arch, _ = read_architecture("Qwen3-8B")
    both = Layout(8, 2, recompute="full", engine_sleeps=True, trainer_leaves=True, engine_tensor=2)
    lines = persistent_lines(arch, both, 0)
    plan = evaluate(arch, both, H100, Workload()).memory
    assert plan.host_turns == 8 * (lines["weights"] + lines["optimizer"] + lines["shadow"])
    assert plan.host_engines == pytest.approx(8 * 2 * arch.parameters / 2)
    away = dataclasses.replace(both, optimizer_on_host=True, shadow_on_host=True)
    assert evaluate(arch, away, H100, Workload()).memory.host_turns == 8 * lines["weights"]  # the rest is there anyway
    apart = evaluate(
        arch, dataclasses.replace(both, engine_sleeps=False, trainer_leaves=False), H100, Workload()
    ).memory
    assert apart.host_turns == apart.host_engines == 0
    assert cli.main(["plan", "Qwen3-8B", "--gpus", "8", "--gpu", "h100"]) == 0
    assert "copies for turns" in (text := capsys.readouterr().out) and "sleeping engines" in text
    config = configuration(both, Workload(), "runs/models/Qwen3-8B", SHIPPED["Qwen3-8B"])
    (host,) = [line for line in job_lines(config, arch, both, "h100") if "host memory" in line]
    assert f"the trainer's copies for turns {plan.host_turns / 2**30:.0f}, weights of sleeping engines 61" in host


def test_an_optimizer_in_host_memory_makes_room_and_pays_for_the_way_in_every_step():
    arch, _ = read_architecture("Qwen3-32B")
    workload = Workload()
    stays = Layout(8, 8, max_tokens=18432, recompute="full", shadow_on_host=True, engine_sleeps=True, engine_tensor=8)
    leaves = dataclasses.replace(stays, optimizer_on_host=True)
    crowded, free = (evaluate(arch, layout, H100, workload) for layout in (stays, leaves))
    assert crowded.memory.total > H100.memory and not crowded.memory.fits and free.memory.fits
    parameters = stage_parameters(arch, leaves, 0).whole
    assert crowded.memory.lines["optimizer"] == 12 * parameters > 10 * free.memory.lines["optimizer"]
    assert free.memory.host_state == 8 * (12 + 4) * parameters
    adam = [optimizer_seconds(arch, layout, H100)[2] for layout in (stays, leaves)]
    assert adam[1] - adam[0] == pytest.approx(24 * parameters / 25e9)
    assert configuration(leaves, workload, "runs/models/Qwen3-32B", SHIPPED["Qwen3-32B"]).optimizer.offload


def test_a_piece_of_the_optimizer_may_be_a_whole_embedding_but_never_more_than_a_ranks_shard():
    arch, _ = read_architecture("Qwen3-8B")
    few, many = (Layout(gpus, optimizer_on_host=True) for gpus in (8, 64))
    assert persistent_lines(arch, few, 0)["optimizer"] == 12 * arch.vocab * arch.hidden
    assert persistent_lines(arch, many, 0)["optimizer"] == pytest.approx(12 * arch.parameters / 64)
    adapters = persistent_lines(arch, dataclasses.replace(few, gpus=1, lora_rank=64), 0)
    assert adapters["optimizer"] == 2**28  # the embedding has no state


def test_training_flops_are_six_a_parameter_and_token_where_sequences_are_short():
    arch, _ = read_architecture("Qwen3-8B")
    head_and_layers = arch.parameters - arch.vocab * arch.hidden - arch.layers * arch.small_vectors - arch.hidden
    assert forward_flops(arch, 0) == 2 * head_and_layers


def test_generation_of_one_sequence_reads_the_weights_once_a_token():
    arch, _ = read_architecture("Qwen3-8B")
    workload = Workload(prompts=1, samples=1, response_mean=500, response_max=500, response_sigma=1e-6, prompt_mean=1)
    machine = dataclasses.replace(H100, decode_overhead=0.0)
    seconds = generate_seconds(arch, machine, workload, 1, 1, 2, 1e12)
    assert seconds == pytest.approx(500 * 2 * arch.parameters / machine.memory_rate, rel=0.01)


def test_response_lengths_have_the_wanted_mean_and_maximum():
    lengths = Workload(response_mean=2000, response_max=8192).response_lengths()
    assert sum(lengths) / len(lengths) == pytest.approx(2000, rel=0.01)
    assert max(lengths) == 8192 and list(lengths) == sorted(lengths)


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "gpus", "gpu"), [("Qwen3-8B", 8, "h100"), ("Qwen3-32B", 32, "h200")])
def test_the_written_configuration_passes_the_trainers_own_checks(tmp_path, capsys, model, gpus, gpu):
    file = tmp_path / "planned.toml"
    arguments = ["plan", model, "--gpus", str(gpus), "--gpu", gpu, "--write", str(file), "--json"]
    assert cli.main(arguments) == 0
    best = json.loads(capsys.readouterr().out)["layouts"][0]
    assert cli.main(arguments) == 2 and "exists and is not replaced" in capsys.readouterr().err
    config = load_config(file)
    assert contradictions(config, SHIPPED[model], gpus - best["layout"]["engine_gpus"]) == []
    assert config.parallel.tensor_model_parallel_size == best["layout"]["tensor"]
    assert sum(best["memory"]["lines"].values()) == pytest.approx(best["memory"]["total"])


def test_a_training_rank_sends_one_copy_to_each_of_its_servers():
    arch, machine = read_architecture("Qwen3-8B")[0], H100
    few, as_many, more = (
        publish_seconds(arch, Layout(128, tensor=4, engine_tensor=1, engine_gpus=gpus), machine)
        for gpus in (32, 64, 96)
    )
    copy = 2 * arch.parameters / machine.link_rate(128)
    assert as_many == pytest.approx(few) and copy > 0.3  # seconds
    assert more - few == pytest.approx(2 * copy)  # 96 servers of 32 ranks: three each


@pytest.mark.parametrize(("engine_gpus", "expected"), [(0, "colocated"), (8, "servers")])
def test_engines_in_the_ranks_and_on_gpus_of_their_own_are_configurations_of_the_trainer(engine_gpus, expected):
    layout = Layout(32, tensor=4, engine_tensor=4, engine_gpus=engine_gpus, engine_memory=0.3)
    assert evaluate(read_architecture("Qwen3-8B")[0], layout, H100, Workload()).time
    config = configuration(layout, Workload(), "runs/models/Qwen3-8B", SHIPPED["Qwen3-8B"])  # or raises
    assert config.rollout.placement == expected
    if engine_gpus:
        assert config.rollout.num_servers == 2 and "--rollout-nodes 1 " in _engine_nodes(layout, H100)


def test_the_report_names_assumptions_lines_and_reasons(capsys):
    assert cli.main(["plan", "Qwen3-14B", "--gpus", "4", "--gpu", "h100"]) == 0
    text = capsys.readouterr().out
    for words in ("Predicted, not measured", "assumed efficiencies", "KV cache", "gradients", "publish", "GPU-hours",
                  "does not fit"):  # fmt: skip
        assert words in text


def test_nothing_that_fits_is_exit_code_1(capsys):
    assert cli.main(["plan", "Qwen3-32B", "--gpus", "1"]) == 1
    told = capsys.readouterr().out
    assert "None of" in told
    fits = re.search(r"It fits on (\d+) GPUs: TP", told)
    assert fits and 2 < int(fits[1]) <= 64


def test_half_of_the_gpus_are_enough_where_more_do_not_pay(capsys):
    assert cli.main(["plan", "Qwen3-0.6B", "--gpus", "64", "--gpu", "H100", "--top", "1", "--batch", "8"]) == 0
    assert "32 GPUs are enough: an iteration takes" in capsys.readouterr().out


def test_memory_is_what_the_driver_reports_and_a_proposal_leaves_room():
    assert 78 < H100.memory / 2**30 < 79.7 and 139 < machine_of("H200").memory / 2**30 < 140.5
    for machine in MACHINES.values():
        assert machine.usable == pytest.approx(0.97 * machine.memory)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["plan"], "expected MODEL"),
        (["plan", "Qwen3-9B"], "Did you mean Qwen3-8B?"),
        (["plan", "Qwen3-8B", "--gpu", "h101"], "expected --gpu a100"),
        (["plan", "Qwen3-8B", "--gpus", "0"], "greater than or equal to 1"),
        (["plan", "Qwen3-8B", "--steps", "0"], "greater than or equal to 1"),
        (["plan", "Qwen3-8B", "--batch", "-5"], "greater than or equal to 1"),
        (["plan", "Qwen3-8B", "--top", "0"], "greater than or equal to 1"),
        (["plan", "Qwen3-8B", "--distilled", "nan"], "from 0 to 1"),
        (["plan", "Qwen3-8B", "--distilled", "1.5"], "from 0 to 1"),
        (["plan", "Qwen3-8B", "--steps", "64"], "expected a divisor"),
        (["plan", "Qwen3-8B", "--write", "absent/run.toml"], "a folder that exists"),
        (["plan", "Qwen3-8B", "--check", "run.toml", "--json"], "belong to a search"),
        (["plan", "Qwen3-8B", "--check", "run.toml", "--lora-rank", "8"], "belong to a search"),
        (["plan", "Qwen3-8B", "--response-max", "40000"], "the model has 40960 positions"),
        (["plan", "Qwen3-8B", "--response-mean", "9000"], "above its maximum"),
        (["plan", "Qwen3-8B", "--calibration", "absent.json"], "python -m benchmarks.calibrate"),
    ],
)
def test_a_mistake_is_told_in_one_message(capsys, arguments, told):
    assert cli.main(arguments) == 2
    message = capsys.readouterr().err
    assert told in message and "Traceback" not in message


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [("hidden_size", "x", "hidden"), ("vocab_size", -3, "vocab"), ("num_attention_heads", 0, "does not describe"),
     ("num_key_value_heads", 3, "do not divide"), ("num_hidden_layers", 0, "layers")],
)  # fmt: skip
def test_a_model_that_cannot_be_is_told_by_its_file(tmp_path, capsys, key, value, told):
    (tmp_path / "config.json").write_text(json.dumps(SHIPPED["Qwen3-0.6B"] | {key: value}))
    assert cli.main(["plan", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert told in message and str(tmp_path / "config.json") in message


def test_without_sharing_a_pass_has_the_tokens_and_the_context_of_whole_samples():
    alone = dataclasses.replace(SMALL, shares_prompts=False)
    found = student_pass(alone, Layout(1))
    assert found.tokens == pytest.approx(alone.student_tokens) and found.context == pytest.approx(alone.mean_context())
    part = student_pass(alone, Layout(1), share=0.25)
    assert part.tokens == pytest.approx(alone.student_tokens / 4) and part.context == pytest.approx(found.context)


def test_the_planner_counts_the_tokens_that_the_batch_plan_forwards():
    """Fixed lengths: the formula against the real packing, with and without sharing, on one rank and on several."""
    from megatron_srpo.batching import plan_batch
    from megatron_srpo.core.records import Padding
    from tests.made_samples import make_sample

    work = Workload(prompts=4, samples=8, prompt_mean=40, response_mean=20, response_max=20, response_sigma=0.0)
    for ranks, row in ((1, 4096), (8, 4096), (1, 130), (4, 130)):
        layout = Layout(ranks, max_tokens=row)
        groups = []
        for number in range(work.prompts):
            first = make_sample(f"train:{number}", 0, [1] * 40, [2] * 20, [-1.0] * 20, weights={"policy": 1.0})
            prompt = first.student.prompt_ids
            groups.append([])
            for sample in range(work.samples):
                stream = dataclasses.replace(first.student, prompt_ids=prompt)
                groups[-1].append(dataclasses.replace(first, sample=sample, student=stream))
        for shares in (False, True):
            plan = plan_batch(groups, dp_size=ranks, max_tokens=row, padding=Padding(shares=shares))
            _, tokens = plan.mini_batches[0].forwarded["student"]
            keys, _ = kept_keys(dataclasses.replace(work, shares_prompts=shares), layout)
            rows = [row for rank in plan.mini_batches[0].student for row in rank]
            packed = keys_of(rows, [one for group in groups for one in group], Padding(shares=shares), "student")
            assert keys == pytest.approx(packed / tokens, rel=0.1 if shares and row == 130 else 1e-9), (ranks, row)
            found = student_pass(dataclasses.replace(work, shares_prompts=shares), layout).tokens
            assert found == pytest.approx(tokens, rel=0.1 if shares and row == 130 else 1e-9), (ranks, row, shares)


def keys_of(rows, samples, padding, stream):
    """How many keys attention keeps for these rows: what each sequence sees."""
    from megatron_srpo.batching import pack_rows
    from megatron_srpo.core.tensors import chain_of

    count = 0
    for row in pack_rows(rows, samples, stream=stream, padding=padding):
        bounds, prefixes = row.cu_seqlens.tolist(), row.prefixes or (-1,) * (len(row.cu_seqlens) - 1)
        count += sum(bounds[i + 1] - bounds[i] for own in range(len(prefixes)) for i in chain_of(own, prefixes))
    return count


def test_the_planner_counts_the_teachers_tokens_that_the_batch_plan_forwards():
    """Fixed lengths, and as many teachers of each demonstration as the planner expects on average."""
    from array import array

    from megatron_srpo.batching import plan_batch
    from megatron_srpo.core.records import Padding, Stream
    from tests.made_samples import make_sample

    work = Workload(
        prompts=8, samples=8, prompt_mean=40, response_mean=20, response_max=20, response_sigma=0.0, distilled=0.25
    )
    rng, groups = np.random.default_rng(0), []
    for number in range(work.prompts):
        made = make_sample(f"train:{number}", 0, [1] * 40, [2] * 20, [-1.0] * 20, weights={"policy": 1.0})
        taught = [
            Stream(array("i", [1] * 40 + [10 + int(sibling)] * 20), made.student.response_ids, made.student.trained)
            for sibling in rng.integers(0, 6, 2)
        ]
        prompts = {}
        taught = [
            dataclasses.replace(one, prompt_ids=prompts.setdefault(bytes(one.prompt_ids), one.prompt_ids))
            for one in taught
        ]
        groups.append(
            [dataclasses.replace(made, sample=i, weights={"distill": 1.0}, teacher=one) for i, one in enumerate(taught)]
        )
    for shares in (False, True):
        plan = plan_batch(groups, dp_size=1, max_tokens=4096, padding=Padding(shares=shares))
        _, tokens = plan.mini_batches[0].forwarded["teacher"]
        one = dataclasses.replace(work, shares_prompts=shares)
        keys = one.teacher_keys(question_copies(one, Layout(1, max_tokens=4096)))
        rows, every = plan.mini_batches[0].teacher[0], [one for group in groups for one in group]
        packed = keys_of(rows, every, Padding(shares=shares), "teacher") / tokens
        assert keys == pytest.approx(packed, rel=0.06 if shares else 1e-9), shares
        found = teacher_pass(dataclasses.replace(work, shares_prompts=shares), Layout(1, max_tokens=4096)).tokens
        assert found == pytest.approx(tokens, rel=0.04 if shares else 1e-9), shares
    assert teacher_pass(dataclasses.replace(work, distilled=0.0), Layout(1)).tokens == 0


def test_shared_prompts_save_train_time_and_rows_but_not_the_drivers_and_not_under_context_parallelism():
    arch, _ = read_architecture("Qwen3-0.6B")
    work = dataclasses.replace(SMALL, prompts=64, prompt_mean=400, response_mean=100)
    alone = dataclasses.replace(work, shares_prompts=False)
    for layout, same in ((Layout(1, max_tokens=3000), False), (Layout(2, context=2, max_tokens=1500), True)):
        shared, whole = (iteration_time(arch, layout, H100, one, 1e10) for one in (work, alone))
        assert (shared.lines["train"] == whole.lines["train"]) is same and shared.rows <= whole.rows
        assert shared.lines["driver"] == whole.lines["driver"] and shared.tokens == whole.tokens
        if not same:
            assert shared.lines["train"] < 0.6 * whole.lines["train"] and shared.rows < whole.rows


def test_the_top_k_pass_is_left_out_where_the_train_pass_finds_the_ids_and_the_copy_of_the_head_is_counted():
    arch, _ = read_architecture("Qwen3-8B")
    layout, head = Layout(8, 2, recompute="full"), 2 * arch.vocab * arch.hidden / 2
    own = dataclasses.replace(SMALL, teacher_head_mib=0)
    found, passes = (iteration_time(arch, layout, H100, one, 1e10) for one in (SMALL, own))
    assert found.lines["score"] == 0 < passes.lines["score"] and found.flops < passes.flops
    small = dataclasses.replace(SMALL, teacher_head_mib=int(head / 2**20) - 1)
    assert iteration_time(arch, layout, H100, small, 1e10).lines == passes.lines
    two = dataclasses.replace(SMALL, steps=2), dataclasses.replace(own, steps=2)
    kept, both = (iteration_time(arch, layout, H100, one, 1e10).lines["score"] for one in two)
    assert 0 < kept < both  # the pass for old log-probs, which finds the ids of the second step; and the first step's
    time = iteration_time(arch, layout, H100, two[0], 1e10)
    every, taught = student_pass(two[0], layout), teacher_pass(two[0], layout)
    scored = time.flops - time.train_flops - taught.tokens * forward_flops(arch, taught.context)
    assert scored == pytest.approx(every.tokens * forward_flops(arch, every.context) / 2)
    lines, others = (training_memory(arch, layout, one, H100, rows=2).phases for one in (SMALL, own))
    hidden = 3 * 2 * layout.max_tokens * arch.hidden  # of the row, of its trained and of its distilled positions
    assert lines["train"] - others["train"] == pytest.approx((head + hidden) * (1 + H100.fragmentation))
    adapters = dataclasses.replace(layout, lora_rank=8)
    lines, others = (training_memory(arch, adapters, one, H100, rows=2).phases for one in (SMALL, own))
    assert lines["train"] - others["train"] == pytest.approx(hidden * (1 + H100.fragmentation))  # the head is the same


# ---- the method of a configuration -----------------------------------------------------------------------------------


def configured(**sections):
    """(layout on 8 GPUs, workload) of a configuration."""
    config = Config(**{"model": {"path": "m", "recompute": "full"}, "data": {"train": "d"}} | sections)
    return layout_of(config, 8), workload_of(config)


def test_without_sequence_parallelism_every_tensor_parallel_rank_keeps_whole_norms_and_residuals():
    arch, _ = read_architecture("Qwen3-8B")
    sizes = {"tensor_model_parallel_size": 4}
    (whole, workload), (split, _) = configured(parallel=sizes), configured(parallel=sizes | {"sequence_parallel": True})
    held = {one: stage_activations(arch, one, 0, one.max_tokens, 1, path="te")[0] for one in (whole, split)}
    kept, working = arch.layers * 2 * whole.max_tokens * arch.hidden, held[split]
    assert held[whole] > kept > 3 * working
    assert configuration(whole, workload, "m", SHIPPED["Qwen3-8B"]).parallel.sequence_parallel is False


def test_the_buckets_of_a_publish_are_those_of_the_configuration():
    arch, _ = read_architecture("Qwen3-8B")
    sizes = {"tensor_model_parallel_size": 4}
    (usual, _), (large, _) = configured(parallel=sizes), configured(parallel=sizes, bridge={"bucket_mib": 2048})
    small = min(2 * 151936 * 4096, 2**31)  # the embedding is a bucket of its own
    gathered = 2 * 2**31 - small - 2**28
    assert publish_bytes(arch, large) - publish_bytes(arch, usual) == pytest.approx(gathered * (1 + 1 / 4))


def test_settings_of_the_head_and_the_engines_count_in_the_plan_of_a_job():
    arch, _ = read_architecture("Qwen3-4B")
    base = {"model": {"path": "m", "recompute": "full"}, "data": {"train": "d"}}
    for section in ({"train": {"logits_memory_mib": 64}}, {"rollout": {"max_num_seqs": 16}}):
        usual, other = (Config(**base | given) for given in ({}, section))
        told = [list(job_lines(one, arch, layout_of(one, 8), "h200")) for one in (usual, other)]
        assert told[0] != told[1]


@pytest.mark.parametrize(
    ("rollout", "gpus"),
    [({}, 0), ({"num_servers": 2, "tensor_parallel_size": 4, "placement": "servers"}, 8),
     ({"servers": ["http://a:1", "http://b:1"], "placement": "servers"}, 2)],
)  # fmt: skip
def test_servers_of_a_configuration_have_gpus_of_their_own(rollout, gpus):
    config = Config(model={"path": "m"}, data={"train": "d"}, rollout=rollout)
    assert own_engine_gpus(config) == gpus and layout_of(config, 8 + gpus, gpus).colocated == (gpus == 0)


def test_engines_on_gpus_of_their_own_are_written_with_the_memory_that_they_were_planned_with():
    layout = Layout(8, engine_gpus=4)
    assert sections(layout, SMALL, "m")["rollout"]["gpu_memory_utilization"] == 0.9
    arch, _ = read_architecture("Qwen3-8B")
    lines = engine_memory(arch, layout, SMALL, H100).lines
    assert lines["weights"] + lines["engine work"] + lines["KV cache"] == pytest.approx(0.9 * H100.memory)
    rollout = {"placement": "servers", "num_servers": 4, "gpu_memory_utilization": 0.6}
    layout = layout_of(Config(model={"path": "m"}, data={"train": "d"}, rollout=rollout), 8, 4)
    lines = engine_memory(arch, layout, SMALL, H100).lines
    assert lines["weights"] + lines["engine work"] + lines["KV cache"] == pytest.approx(0.6 * H100.memory)


@pytest.mark.parametrize(
    ("rollout_nodes", "given", "share"),
    [("1", (), 0.9), ("1", ("--rollout.gpu_memory_utilization", "0.7"), 0.7),
     ("0", ("--rollout.placement", "servers", "--rollout.num_servers", "8"), 0.5)],
)  # fmt: skip
def test_the_plan_of_a_job_has_the_memory_that_its_servers_get(tmp_path, capsys, rollout_nodes, given, share):
    from slurm.plan import main

    (tmp_path / "run.toml").write_text(
        '[model]\npath = "Qwen3-8B"\nrecompute = "full"\n[parallel]\ntensor_model_parallel_size = 4\n'
        'sequence_parallel = true\n[data]\ntrain = "d.jsonl"\n'
    )
    assert main(["h100", "2", rollout_nodes, "8", str(tmp_path / "run.toml"), *given]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "memory of an engine's GPU" in line]
    parts = dict(re.findall(r"(weights|engine work|KV cache) ([\d.]+)", line))
    assert sum(map(float, parts.values())) == pytest.approx(share * H100.memory / 2**30, abs=0.2)


@pytest.mark.parametrize("model", ["Qwen3-8B", "Qwen3-30B-A3B"])
@pytest.mark.parametrize(
    "lora", [{}, {"publish": "merged"}, {"publish": "adapter"}, {"rank": 600}, {"targets": ["attention", "experts"]}]
)
def test_the_planner_publishes_what_the_run_publishes(model, lora):
    arch, _ = read_architecture(model)
    config = Config(model={"path": "m"}, data={"train": "d"}, lora={"rank": 8, "targets": ["attention"]} | lora)
    layout = dataclasses.replace(layout_of(config, 8), tensor=2)
    alone = config.lora.published(arch.experts) is not None
    assert (published_adapters(arch, layout) != (0, 0)) == alone
    whole = dataclasses.replace(layout, lora_merged=True)
    assert (0 < publish_seconds(arch, layout, H100) < publish_seconds(arch, whole, H100)) == alone
    assert (publish_bytes(arch, layout) < publish_bytes(arch, whole)) == alone


SHADOWS = [
    ({}, 1),
    ({"algorithm": {"kl_loss_coef": 0.01}}, 2),
    ({"algorithm": {"name": "grpo"}}, 0),
    ({"algorithm": {"name": "grpo", "kl_loss_coef": 0.01}}, 1),
    ({"teacher": {"mode": "live"}}, 0),
    ({"teacher": {"mode": "refresh"}}, 1),
    ({"teacher": {"mode": "frozen"}, "algorithm": {"kl_loss_coef": 0.01}}, 1),
    ({"teacher": {"mode": "trust_region"}}, 1),
    ({"teacher": {"mode": "trust_region"}, "lora": {"rank": 8}}, 0),
    ({"algorithm": {"kl_loss_coef": 0.01}, "lora": {"rank": 8}}, 1),
    ({"algorithm": {"kl_loss_coef": 0.01}, "lora": {"rank": 8, "path": "adapters"}}, 2),
]


@pytest.mark.parametrize(("sections", "shadows"), SHADOWS)
def test_the_planner_counts_the_shadows_that_the_policy_builds(monkeypatch, sections, shadows):
    from types import SimpleNamespace

    from megatron_srpo.mcore import policy

    monkeypatch.setattr(policy, "WeightShadow", lambda optimizer, offload: None)
    config = Config(**{"model": {"path": "m"}, "data": {"train": "d"}} | sections)
    built = SimpleNamespace(optimizer=None, _starts_as_base=config.lora.rank > 0 and not config.lora.path)
    assert len(policy.Policy._build_shadows(built, config)) == shadows
    arch, _ = read_architecture("Qwen3-8B")
    layout, workload = configured(**sections)
    assert workload.shadows == shadows
    one = persistent_lines(arch, layout, 0)["shadow"]
    plan = training_memory(arch, layout, workload, H100, rows=2)
    assert plan.lines["shadow"] == shadows * one
    if not layout.lora_rank:
        assert plan.host_saving == pytest.approx((4 * (3 + shadows) + 2) / 4 * 8 * one)
    offloaded = dataclasses.replace(layout, shadow_on_host=True)
    assert training_memory(arch, offloaded, workload, H100, rows=2).host_state == pytest.approx(8 * shadows * one)


def test_the_pass_of_the_reference_and_its_swap_take_time():
    arch, _ = read_architecture("Qwen3-8B")
    layout, without = configured(algorithm={"name": "grpo"})
    _, workload = configured(algorithm={"name": "grpo", "kl_loss_coef": 0.01})
    alone, both = (iteration_time(arch, layout, H100, one, 1e10) for one in (without, workload))
    assert alone.lines["teacher"] == 0
    forward, _, _ = pass_seconds(arch, layout, H100, workload, student_pass(workload, layout), path="te")
    assert both.lines["teacher"] == pytest.approx(forward + swap_seconds(arch, layout, H100))
    assert both.flops > alone.flops and both.train_flops == alone.train_flops
    _, twice = configured(algorithm={"kl_loss_coef": 0.01})
    assert (twice.swaps, without.swaps, workload.swaps) == (2, 0, 1)
    assert configured(teacher={"mode": "frozen"}, lora={"rank": 8})[1].swaps == 0  # adapters are switched off
    assert configured(teacher={"mode": "frozen"}, algorithm={"kl_loss_coef": 0.01})[1].swaps == 2  # of one shadow


PASSES = [
    {},
    {"train": {"score_every": "step"}},
    {"algorithm": {"name": "contrastive"}},
    {"algorithm": {"name": "contrastive", "kl_loss_coef": 0.01}, "train": {"score_every": "step"}},
    {"algorithm": {"name": "contrastive"}, "teacher": {"mode": "trust_region"}, "train": {"score_every": "step"}},
    {"algorithm": {"name": "contrastive"}, "teacher": {"mode": "frozen"}, "lora": {"rank": 8}},
    {"algorithm": {"kl_loss_coef": 0.01}, "teacher": {"mode": "live"}, "train": {"score_every": "step"}},
]


@pytest.mark.parametrize("sections", PASSES)
def test_the_planner_counts_the_swaps_and_the_teachers_passes_that_the_trainer_makes(monkeypatch, sections):
    from contextlib import nullcontext
    from types import SimpleNamespace

    from megatron_srpo.losses.objective import Objective
    from megatron_srpo.mcore import policy

    swapped = []
    active = SimpleNamespace(active=lambda: swapped.append(1) or nullcontext())
    monkeypatch.setattr(policy, "WeightShadow", lambda optimizer, offload: active)
    monkeypatch.setattr(policy.lora, "adapters_off", lambda model: nullcontext())
    steps = {"prompts_per_mini_batch": 8}  # four of them
    sections = sections | {"train": steps | sections.get("train", {})}
    config = Config(**{"model": {"path": "m"}, "data": {"train": "d"}} | sections)
    built = SimpleNamespace(
        optimizer=None, _starts_as_base=config.lora.rank > 0 and not config.lora.path, model=None,
        _teacher_config=config.teacher,
    )  # fmt: skip
    built.shadows = policy.Policy._build_shadows(built, config)
    scorings = Objective(config).passes()
    for scoring in scorings:
        for _ in range(4 if scoring.each_step else 1):
            policy.Policy.weights(built, scoring.weights)
    _, workload = configured(**sections)
    assert workload.steps == 4 and workload.swaps == len(swapped)
    assert workload.teacher_passes == sum(scoring.rows in ("teacher", "contrast") for scoring in scorings)


def test_scores_of_every_step_and_a_contrast_take_time():
    arch, _ = read_architecture("Qwen3-8B")
    layout = configured()[0]
    once, each = (
        configured(train={"prompts_per_mini_batch": 8, "score_every": every})[1] for every in ("iteration", "step")
    )
    rlsd, contrast = (configured(algorithm={"name": name})[1] for name in ("rlsd", "contrastive"))
    swap = swap_seconds(arch, layout, H100)

    def lines(workload):
        return iteration_time(arch, layout, H100, workload, 1e10).lines

    assert lines(each)["teacher"] - lines(once)["teacher"] == pytest.approx(3 * swap)
    own = [dataclasses.replace(one, teacher_head_mib=0) for one in (once, each)]
    ids = [lines(one)["score"] - lines(found)["score"] for one, found in zip(own, (once, each), strict=True)]
    assert ids[1] == pytest.approx(4 * ids[0])  # the pass for old log-probs has none of every step's ids
    contrast = dataclasses.replace(contrast, distilled=rlsd.distilled)
    assert lines(contrast)["teacher"] == pytest.approx(2 * lines(rlsd)["teacher"])
    flops = [iteration_time(arch, layout, H100, one, 1e10).flops for one in (rlsd, contrast)]
    taught = teacher_pass(rlsd, layout)
    assert flops[1] - flops[0] == pytest.approx(taught.tokens * forward_flops(arch, taught.context))


def test_a_method_says_which_responses_its_teacher_scores():
    shares = {
        name: configured(algorithm={"name": name})[1].distilled for name in ("srpo", "demopsd", "sdpo", "rlsd", "rlrt")
    }
    assert shares == {"srpo": 0.3, "demopsd": 0.3, "sdpo": 1.0, "rlsd": 1.0, "rlrt": 0.7}
    _, some = configured(algorithm={"name": "sdpo", "distill_on": "correct"})
    assert some.distilled == 0.7
    srpo, sdpo = (configured(algorithm={"name": name})[1] for name in ("srpo", "sdpo"))
    assert srpo.demonstrations(1.0) == dataclasses.replace(srpo, correct=None).demonstrations(1.0)
    assert sdpo.demonstrations(1.0) > srpo.demonstrations(1.0)  # as many correct siblings, for more teachers


def test_a_full_vocabulary_divergence_holds_logits_on_the_device_and_on_the_host():
    arch, _ = read_architecture("Qwen3-8B")
    layout, whole = configured(algorithm={"distillation_topk": 0}, parallel={"tensor_model_parallel_size": 2})
    logits = 2 * layout.max_tokens * arch.vocab / 2
    topk = dataclasses.replace(whole, full_vocabulary=False)
    found, others = (training_memory(arch, layout, one, H100, rows=2) for one in (whole, topk))
    more = {name: found.phases[name] - others.phases[name] for name in found.phases}
    # The teacher's logits, the student's and their gradient; scoring has none but the logits and their copy.
    assert more["train"] == pytest.approx(1.05 * 3 * logits)
    assert more["score"] == pytest.approx(1.05 * (2 * logits - min(logits, 2**31)))
    assert {name for name, size in more.items() if size} == {"train", "score"}
    tokens = whole.distilled * whole.rollouts * sum(whole.response_lengths()) / 64 * 1.03  # on all ranks
    rows = 4 * 2 * layout.max_tokens  # of four data-parallel ranks
    assert found.host_scores == pytest.approx(2 * arch.vocab * (tokens + rows), rel=1e-3) and others.host_scores == 0


def test_the_teachers_logits_are_freed_after_the_step():
    from megatron_srpo.batching import plan_batch, share_of
    from megatron_srpo.batching.passes import BatchPasses
    from megatron_srpo.core.records import Batch
    from tests.unit.test_trainer_passes import CountingPolicy, ZeroObjective, distilled_group

    config = Config(model={"path": "m"}, data={"train": "d"}, algorithm={"distillation_topk": 0})
    group = distilled_group()
    mine, share = share_of(group, plan_batch([group], dp_size=1, max_tokens=40), 0)
    work = BatchPasses(Batch(mine, share, {}), CountingPolicy(), ZeroObjective(config))
    for sample, score in zip(mine, work.scores, strict=True):
        score.teacher_logits = torch.zeros(sample.length, 7) if sample.teacher else None
    (mini,) = share.mini_batches
    work.train_step(mini)
    assert all(score.teacher_logits is None for score in work.scores)


@pytest.mark.parametrize("mode", ["ema", "frozen", "live", "trust_region"])
@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("mib", [0, 1100, 1200, 2300, 2400])  # a head of Qwen3-8B has 1187 MiB
def test_the_planner_and_the_trainer_agree_on_who_finds_the_top_k_ids(mode, rank, mib):
    from megatron_srpo.losses.objective import one_student_pass

    sections = {"teacher": {"mode": mode}, "lora": {"rank": rank}, "train": {"teacher_head_mib": mib}}
    config = Config(model={"path": "m"}, data={"train": "d"}, **sections)
    arch, _ = read_architecture("Qwen3-8B")
    layout, workload = configured(**sections)
    assert train_pass_finds_topk(arch, layout, workload) == one_student_pass(config, 2 * arch.vocab * arch.hidden)


def test_a_trust_region_has_joined_heads_hidden_states_and_a_pass_of_the_initial_model():
    arch, _ = read_architecture("Qwen3-8B")
    (layout, ema), (_, trust) = configured(), configured(teacher={"mode": "trust_region"})
    head, hidden = 2 * arch.vocab * arch.hidden, 2 * layout.max_tokens * arch.hidden
    assert teacher_bytes(arch, layout, ema) == (head + 2 * hidden, head + 3 * hidden)
    assert teacher_bytes(arch, layout, trust) == (3 * head + 7 * hidden, 2 * head)  # two heads exceed teacher_head_mib
    large = dataclasses.replace(trust, teacher_head_mib=4096)
    assert teacher_bytes(arch, layout, large) == (3 * head + 7 * hidden, 2 * head + 6 * hidden)
    live = dataclasses.replace(ema, teacher="live")
    assert teacher_bytes(arch, layout, live) == (2 * hidden, 3 * hidden)
    times = [iteration_time(arch, layout, H100, one, 1e10) for one in (ema, trust, live)]
    taught, _, _ = pass_seconds(arch, layout, H100, ema, teacher_pass(ema, layout), path="te")
    swap = swap_seconds(arch, layout, H100)
    expected = taught + swap, 2 * taught + swap, taught
    assert [time.lines["teacher"] for time in times] == pytest.approx(expected)
    kept, few = (training_memory(arch, layout, one, H100, rows=2).host_scores for one in (large, ema))
    tokens = ema.distilled_tokens * 1.03 / 8
    assert few == pytest.approx(8 * 2 * arch.hidden * (tokens + 2 * layout.max_tokens))
    assert kept == pytest.approx(8 * head + 2 * few)


def test_hidden_states_of_the_teacher_are_kept_for_one_step_and_logits_for_all_whose_pass_they_are_of():
    arch, _ = read_architecture("Qwen3-8B")

    def kept(topk=100, **train):
        layout, workload = configured(
            algorithm={"distillation_topk": topk}, train={"max_tokens_per_gpu": 18432} | train
        )
        plan = training_memory(arch, layout, workload, H100, rows=0)
        return plan.host_scores / (2 * 8)

    four, each = {"prompts_per_mini_batch": 8}, {"prompts_per_mini_batch": 8, "score_every": "step"}
    whole, logits = kept(), kept(topk=0)
    assert kept(**four) == kept(**each) == pytest.approx(whole / 4)
    assert kept(topk=0, **four) == logits and kept(topk=0, **each) == pytest.approx(logits / 4)


def test_a_swap_writes_the_experts_share_of_their_own_ranks():
    arch, _ = read_architecture("Qwen3-30B-A3B")
    layout = Layout(16, 4, expert=16)
    endless = dataclasses.replace(H100, link=1e30, network=1e30, latency=0.0)
    part = stage_parameters(arch, layout, 0)
    written = 6 * (part.ordinary / 4 + part.experts)  # bf16 weights of fp32 slices; every rank has experts of its own
    assert swap_seconds(arch, layout, endless) == pytest.approx(2 * written / H100.memory_rate)
