"""What a run with adapters keeps: the teacher as their average, the reference without them, checkpoints of them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_srpo.core.errors import UserError
from tests.distributed.test_lora import ALL, EVERYTHING, exported, loss_of, make_policy
from tests.distributed.test_policy import VOCAB, _rows, scored
from tests.distributed_harness import run_distributed
from tests.fresh_process import fresh_process
from tests.lora_reference import load_adapted, read_folder
from tests.routed_reference import load
from tests.saved_policy import save_policy
from tests.tiny_models import make_tiny_model

SLOW = pytest.mark.slow
LAYOUTS = {
    "tp2 sp": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pp2 interleaved": (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
    "dp2": (2, {}),
    "cp2": (2, {"context_parallel_size": 2}),
}
MOE_LAYOUTS = {
    "ep2 tp2 sp": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_model_parallel_size": 2}),
    "etp2": (2, {"expert_tensor_parallel_size": 2}),
}


def save(policy, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    save_policy(policy, folder)


def copies(policy) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in policy.shards.adapters.items()}


def equal(some, others) -> bool:
    return some.keys() == others.keys() and all(torch.equal(some[name], others[name]) for name in others)


def train_and_report(model, parallel, scratch, targets, other=None, dtype="float32"):
    """Train three steps, save, go on, load, go on again. `other`: another layout's checkpoint of the same moment."""
    from megatron_srpo.mcore import checkpoint

    policy = make_policy(model, None, parallel, targets=targets, dtype=dtype)
    rows = _rows(policy.topology.dp_rank, policy.topology.dp_size)
    assert list(policy.shadows) == ["teacher"], "the reference is no second set of weights"
    base = {name: value.detach().clone() for name, value in policy.shards.parameters.items()}
    drawn = exported(policy, model, policy.shards.of_adapters())
    before = scored(policy, rows)
    average = {name: value.double() for name, value in copies(policy).items()}
    losses = []
    for _ in range(3):
        losses.append(float(policy.train_step(rows, loss_of).metrics["loss"]))
        for name, value in policy.shards.adapters.items():  # the EMA teacher's recurrence, at the default rate
            average[name] = 0.95 * average[name] + 0.05 * value.detach().double()
    held = copies(policy)
    with policy.weights("teacher"):
        for name, value in policy.shards.adapters.items():
            bound = 1e-6 if dtype == "float32" else 2e-3
            torch.testing.assert_close(value.detach().double(), average[name], rtol=bound, atol=bound, msg=name)
        assert not equal(held, copies(policy))
    assert equal(held, copies(policy))
    with policy.weights("reference"):
        reference = scored(policy, rows)
    assert all(torch.equal(a, b) for a, b in zip(reference, before, strict=True))
    moved = scored(policy, rows)  # every rank takes part
    assert not any(torch.equal(a, b) for a, b in zip(moved, before, strict=True))
    assert all(torch.equal(base[name], value) for name, value in policy.shards.parameters.items())

    saved = exported(policy, model, policy.shards.of_adapters())
    merged = exported(policy, model, policy.shards)
    save(policy, scratch)
    assert checkpoint.stored(scratch) == {"main", "exp_avg", "exp_avg_sq", "teacher"}
    from megatron_srpo.mcore.safe_files import read_index

    assert all(".adapters." in key for key in read_index(scratch).state_dict_metadata)
    policy.train_step(rows, loss_of)
    straight = copies(policy)
    with policy.weights("teacher"):
        teacher = copies(policy)
    checkpoint.load(policy, scratch)
    assert equal(held, copies(policy))
    policy.train_step(rows, loss_of)
    assert equal(straight, copies(policy)), "a resumed run goes on bit for bit"
    with policy.weights("teacher"):
        assert equal(teacher, copies(policy))
    report = {"drawn": drawn, "losses": losses, "base": policy.base, "saved": saved, "merged": merged}
    report["trained"] = exported(policy, model, policy.shards.of_adapters())
    with policy.on_host():
        pass
    assert equal(straight, copies(policy))
    if other is not None:
        checkpoint.load(policy, other)
        policy.train_step(rows, loss_of)
        report["resharded"] = exported(policy, model, policy.shards.of_adapters())
    return report


@pytest.fixture(scope="module")
def serial(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen2")
    model = make_tiny_model(folder / "model", "qwen2", tied=False, vocab=VOCAB, layers=5)
    return model, run_distributed(train_and_report, 1, model, {}, folder / "saved", ALL)[0], folder / "saved"


@pytest.fixture(scope="module")
def serial_moe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("moe")
    model = make_tiny_model(folder / "model", "qwen3_moe", tied=False, vocab=VOCAB, layers=4, dense_layers=(1,))
    return model, run_distributed(train_and_report, 1, model, {}, folder / "saved", EVERYTHING)[0], folder / "saved"


def check_layout(given, layout, targets, tmp_path):
    model, expected, checkpoint = given
    ranks, parallel = layout
    for found in run_distributed(train_and_report, ranks, model, parallel, tmp_path / "saved", targets, checkpoint):
        assert found["base"] == expected["base"], "the base's checksum does not depend on the layout"
        assert equal(found["drawn"], expected["drawn"]), "nor do the numbers that new adapters start with"
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        for name, value in expected["trained"].items():
            # Adam divides a gradient by its own size: where that is nearly zero, rounding decides.
            assert float((found["trained"][name] - value).abs().median()) <= 1e-5, name
            torch.testing.assert_close(found["resharded"][name], value, rtol=0, atol=2e-4, msg=name)


@pytest.mark.parametrize("layout", [name if name == "tp2 sp" else pytest.param(name, marks=SLOW) for name in LAYOUTS])
def test_adapters_are_kept_in_every_layout(serial, layout, tmp_path):
    check_layout(serial, LAYOUTS[layout], ALL, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("layout", MOE_LAYOUTS)
def test_adapters_of_experts_are_kept_in_every_layout(serial_moe, layout, tmp_path):
    check_layout(serial_moe, MOE_LAYOUTS[layout], EVERYTHING, tmp_path)


@pytest.mark.slow
def test_a_bf16_run_resumes_bit_for_bit(tmp_path):
    model = make_tiny_model(tmp_path / "model", "qwen3", tied=True, vocab=VOCAB, layers=2, dtype=torch.bfloat16)
    run_distributed(train_and_report, 2, model, LAYOUTS["tp2 sp"][1], tmp_path / "saved", ALL, None, "bfloat16")


def convert(*arguments, **options):
    from megatron_srpo.conversion.to_hf import megatron_to_hf

    megatron_to_hf(*arguments, **options)


@pytest.mark.parametrize("given", ["serial", pytest.param("serial_moe", marks=SLOW)])
def test_a_checkpoint_becomes_an_adapter_or_a_merged_model(given, request, tmp_path):
    model, report, saved = request.getfixturevalue(given)
    targets = EVERYTHING if given == "serial_moe" else ALL
    settings = {"rank": 4, "alpha": 8.0, "targets": targets}
    (saved / "config.json").write_text(json.dumps({"lora": settings, "model": {"path": str(model)}}))
    other = make_tiny_model(tmp_path / "other", "qwen2", tied=False, vocab=VOCAB, layers=5, seed=1)
    with fresh_process() as process:
        process.submit(convert, saved, tmp_path / "adapter").result()
        process.submit(convert, saved, tmp_path / "merged", merge=True).result()
        if given == "serial":
            with pytest.raises(
                UserError, match="adapters of another base model: its weights have the checksum float32"
            ):
                process.submit(convert, saved, tmp_path / "wrong", hf_dir=other, merge=True).result()
            with pytest.raises(UserError, match="and was not kept"):
                against = {"merge": True, "verify_against": model}  # the base, which the adapters have changed
                process.submit(convert, saved, tmp_path / "wrong", **against).result()
            assert not (tmp_path / "wrong").exists()
    config, tensors = read_folder(tmp_path / "adapter")
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 8, "LORA")
    assert equal({name.removeprefix("base_model.model."): value for name, value in tensors.items()}, report["saved"])
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert merged.keys() == report["merged"].keys()
    for name, value in report["merged"].items():
        torch.testing.assert_close(merged[name], value, rtol=0, atol=1e-7, msg=name)
    if given == "serial":  # transformers with peft computes the same from both
        adapted = load_adapted(model, tmp_path / "adapter")
        ids = torch.arange(1, 25)[None]
        expected = load(tmp_path / "merged")(ids).logits
        torch.testing.assert_close(adapted(ids).logits, expected, rtol=0, atol=5e-5)


def save_both(model, folder):
    """A checkpoint of adapters and one of all weights."""
    from megatron_srpo.mcore import groups

    save(make_policy(model, None, {}), folder / "adapters")
    groups.parallel_state.destroy_model_parallel()
    save(make_policy(model, None, {}, lora={"rank": 0}), folder / "all")


def refused(other, folder):
    """Why each of them is not loaded into a run on another base model, and into one of the other kind."""
    from megatron_srpo.mcore import checkpoint, groups

    reasons = []
    for lora, kind in (({}, "adapters"), ({}, "all"), ({"rank": 0}, "adapters")):
        policy = make_policy(other, None, {}, lora=lora)
        try:
            checkpoint.load(policy, folder / kind)
        except UserError as error:
            reasons.append(str(error))
        groups.parallel_state.destroy_model_parallel()
    return reasons


def test_other_weights_are_refused(tmp_path):
    model, other = (make_tiny_model(tmp_path / str(seed), vocab=VOCAB, seed=seed) for seed in (0, 1))
    run_distributed(save_both, 1, model, tmp_path)
    ((base, everything, adapters),) = run_distributed(refused, 1, other, tmp_path)
    assert "holds adapters of another base model: its weights have the checksum float32:" in base
    assert "holds all weights, and this run trains adapters" in everything
    assert "holds adapters, and this run trains all weights (lora.rank = 0)" in adapters
