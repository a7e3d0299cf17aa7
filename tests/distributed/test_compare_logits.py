"""The comparison tool as users run it: agreement at layouts of two ranks, and a fault traced to its layer."""

from __future__ import annotations

import io
import os
import shutil
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.distributed.test_conversion_megatron import _convert
from tests.distributed_harness import free_port
from tests.fresh_process import fresh_process, run_as_torchrun_does
from tests.tiny_models import make_tiny_model

LAYERS = 5
TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def _compare(said: Path, arguments: list[str]) -> int:
    """The tool's exit code; what rank 0 prints goes to a file."""
    from megatron_srpo.commands.compare_logits import main

    out = io.StringIO()
    with redirect_stdout(out), redirect_stderr(out):
        code = main(arguments)
    if os.environ.get("RANK", "0") == "0":
        said.write_text(out.getvalue())
    return code


def _compare_alone(said: Path, arguments: list[str]) -> int:
    """Without torchrun, whatever an earlier comparison has left in this process's environment."""
    for name in TORCHRUN:
        os.environ.pop(name, None)
    return _compare(said, arguments)


@pytest.fixture(scope="module")
def process():
    with fresh_process() as pool:
        yield pool


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model") / "hf", "qwen3", layers=LAYERS, tied=False)


@pytest.mark.parametrize(
    "layout",
    [
        ["--tensor-model-parallel-size", "2", "--sequence-parallel"],
        pytest.param(["--pipeline-model-parallel-size", "2"], marks=pytest.mark.slow),
    ],
    ids=["tp2", "pp2"],
)
def test_two_ranks_agree_with_transformers_on_prompts_of_any_length(model, tmp_path, layout):
    arguments = ["--hf", str(model), "--no-vllm", "--prompt", "What is 17 + 25?", "--token-ids", "5,6,7", *layout]
    codes = run_as_torchrun_does(_compare, 2, free_port(), tmp_path / "said", arguments)
    said = (tmp_path / "said").read_text()
    assert codes == [0, 0], said
    assert "Megatron: agrees" in said and "DIFFERS" not in said


def test_in_bf16_the_tolerance_is_that_of_transformers_and_a_fault_is_still_found(model, process, tmp_path):
    arguments = ["--hf", str(model), "--no-vllm", "--token-ids", "7,5,6,30,31,8,50", "--dtype", "bfloat16"]
    assert process.submit(_compare_alone, tmp_path / "said", arguments).result() == 0
    said = (tmp_path / "said").read_text()
    assert "transformers in bfloat16: agrees" in said and "Megatron: agrees" in said
    faulty = _damaged(model, tmp_path / "faulty", "model.layers.3.mlp.up_proj.weight", by=4)
    process.submit(_convert, faulty, tmp_path / "megatron", {}).result()
    arguments += ["--megatron", str(tmp_path / "megatron")]
    assert process.submit(_compare_alone, tmp_path / "said", arguments).result() == 1
    assert "first that differs: layer 3" in (tmp_path / "said").read_text()


def test_experts_of_odd_sizes_agree(process, tmp_path):
    moe = make_tiny_model(tmp_path / "moe", "qwen3_moe", tied=False, hidden=30, heads=3, kv_heads=1, expert_ffn=19)
    arguments = ["--hf", str(moe), "--no-vllm", "--token-ids", "7,5,6"]
    assert process.submit(_compare_alone, tmp_path / "said", arguments).result() == 0, (tmp_path / "said").read_text()


def _damaged(model: Path, copy: Path, tensor: str, by: float = 0.3) -> Path:
    """A copy of the folder in which one row of one tensor is off."""
    shutil.copytree(model, copy)
    held = load_file(copy / "model.safetensors")
    held[tensor][7] += by
    save_file(held, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize(
    ("tensor", "where"),
    [
        ("model.layers.3.mlp.up_proj.weight", "layer 3"),
        ("model.embed_tokens.weight", "the embedding"),
        ("lm_head.weight", "the final norm or the head (every layer agrees)"),
    ],
)
def test_a_fault_in_one_tensor_is_traced_to_its_layer(model, process, tmp_path, tensor, where):
    faulty = _damaged(model, tmp_path / "faulty", tensor)
    process.submit(_convert, faulty, tmp_path / "megatron", {"tensor_model_parallel_size": 2}).result()
    arguments = ["--hf", str(model), "--megatron", str(tmp_path / "megatron"), "--no-vllm", "--token-ids", "7,5,6"]
    assert process.submit(_compare_alone, tmp_path / "said", arguments).result() == 1
    said = (tmp_path / "said").read_text()
    assert "Megatron: DIFFERS" in said and f"first that differs: {where}" in said, said


def test_a_comparison_without_prompts_or_ranks_is_refused(model, process, tmp_path):
    for more, message in (
        ([], "nothing to compare on"),
        (["--token-ids", "1,a"], "expected numbers like 1,2,3"),
        (["--token-ids", "1", "--pipeline-model-parallel-size", "2"], "torchrun --nproc-per-node 2"),
        (["--token-ids", "1,101"], "token 101 is not of this model: expected 0 to 100"),
        (["--token-ids", "1,-1"], "token -1 is not of this model"),
        (["--prompts", str(tmp_path / "none")], "none: expected a text file, a prompt a line"),
        (["--prompts", str(model / "model.safetensors")], "model.safetensors: expected a text file, a prompt a line"),
    ):
        assert process.submit(_compare_alone, tmp_path / "said", ["--hf", str(model), *more]).result() == 2
        assert message in (tmp_path / "said").read_text()


def test_a_folder_or_a_checkpoint_that_is_damaged_is_refused(model, process, tmp_path):
    def refused(message: str, hf: Path, *more: str) -> None:
        arguments = ["--hf", str(hf), "--no-vllm", *more]
        assert process.submit(_compare_alone, tmp_path / "said", arguments).result() == 2
        assert message in (tmp_path / "said").read_text()

    cut = shutil.copytree(model, tmp_path / "cut")
    os.truncate(cut / "model.safetensors", 5000)
    refused("is not a complete safetensors file", cut, "--token-ids", "7")
    bare = shutil.copytree(model, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    refused("has no tokenizer (tokenizer.json)", bare, "--prompt", "hello")
    process.submit(_convert, model, tmp_path / "megatron", {}).result()
    other = make_tiny_model(tmp_path / "other", "qwen3", layers=LAYERS + 1, tied=False)
    refused("checkpoint and config.json are of different models", other, "--token-ids", "7", "--megatron",
            str(tmp_path / "megatron"))  # fmt: skip
    adapters = tmp_path / "adapters"
    adapters.mkdir()
    (adapters / "config.json").write_text('{"lora": {"rank": 8}}')
    (adapters / "metadata.json").touch()
    refused("holds LoRA adapters: expected all weights", model, "--token-ids", "7", "--megatron", str(adapters))
    file = next((tmp_path / "megatron").glob("*.distcp"))
    held = bytearray(file.read_bytes())
    held[len(held) // 2] ^= 1
    file.write_bytes(held)
    refused("the checkpoint is damaged", model, "--token-ids", "7", "--megatron", str(tmp_path / "megatron"))


def test_a_value_that_is_no_number_is_never_agreement(model, process, tmp_path):
    faulty = _damaged(model, tmp_path / "faulty", "model.layers.3.mlp.up_proj.weight", by=float("nan"))
    arguments = ["--hf", str(faulty), "--no-vllm", "--token-ids", "7,5", "--dtype", "bfloat16"]
    assert process.submit(_compare_alone, tmp_path / "said", arguments).result() == 1
    assert "Megatron: DIFFERS, worst |Δ log-prob| inf" in (tmp_path / "said").read_text()


@pytest.mark.slow
def test_vllm_agrees_and_a_fault_in_it_is_traced_to_its_layer(model, tmp_path):
    pytest.importorskip("vllm")
    from megatron_srpo.comparison.engine import engine_traces
    from megatron_srpo.comparison.reference import reference_traces
    from megatron_srpo.comparison.trace import HEAD, compare

    prompts = [[7, 5, 6, 30, 31], [8]]
    faulty = _damaged(model, tmp_path / "faulty", "model.layers.3.mlp.up_proj.weight")
    expected = reference_traces(model, prompts, torch.float32)
    for ours, theirs in zip(expected, engine_traces(model, prompts, "float32", "cpu"), strict=True):
        found = compare(ours, theirs, [1e-4] * (1 + LAYERS))
        assert found.worst < 1e-4 and found.where == HEAD
    for ours, theirs in zip(expected, engine_traces(faulty, prompts, "float32", "cpu"), strict=True):
        assert compare(ours, theirs, [1e-4] * (1 + LAYERS)).where == "layer 3"


SCALED = {
    "linear": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
    "llama3": {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
    "yarn": {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 32},
}  # fmt: skip


@pytest.mark.parametrize(("family", "kind"), [("mistral", "linear"), ("llama", "llama3"), ("qwen3", "yarn")])
def test_scaled_rotary_embeddings_agree_within_and_beyond_the_original_length(process, tmp_path, family, kind):
    folder = make_tiny_model(tmp_path / "hf", family, rope=SCALED[kind], layers=3, max_positions=128)
    long = ",".join(str(5 + i % 90) for i in range(100))
    arguments = ["--hf", str(folder), "--no-vllm", "--token-ids", "5,6,7", "--token-ids", long]
    code = process.submit(_compare_alone, tmp_path / "said", arguments).result()
    said = (tmp_path / "said").read_text()
    assert code == 0 and "Megatron: agrees" in said, said


@pytest.mark.slow
@pytest.mark.parametrize(("family", "kind"), [("mistral", "linear"), ("llama", "llama3"), ("qwen3", "yarn")])
def test_vllm_reads_scaled_rotary_embeddings_as_transformers_does(process, tmp_path, family, kind):
    pytest.importorskip("vllm")
    folder = make_tiny_model(tmp_path / "hf", family, rope=SCALED[kind], max_positions=128)  # 4 × 32 for YaRN
    long = ",".join(str(5 + i % 90) for i in range(100))
    arguments = ["--hf", str(folder), "--token-ids", "5,6,7", "--token-ids", long]
    code = process.submit(_compare_alone, tmp_path / "said", arguments).result()
    said = (tmp_path / "said").read_text()
    assert code == 0 and "vLLM: agrees" in said, said
