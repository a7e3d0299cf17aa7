"""Both conversion tools on tiny folders: bit for bit, in bounded memory, complete or absent, and what is refused."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import threading
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_srpo.conversion.report import written_aside
from megatron_srpo.conversion.store_group import StoreGroup
from tests.distributed_harness import free_port
from tests.fresh_process import fresh_process, run_as_torchrun_does
from tests.tiny_models import make_tiny_model

ODD = {"hidden": 40, "layers": 4, "heads": 6, "kv_heads": 2, "head_dim": 10, "ffn": 54, "vocab": 103}
LLAMA_3_1 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 128}
MODELS = {
    "qwen3 tied fp32": ("qwen3", {"tied": True, **ODD}),
    "qwen3 untied bf16": ("qwen3", {"tied": False, "dtype": torch.bfloat16, **ODD}),
    "llama untied fp32": ("llama", {"tied": False, **ODD, "hidden": 42}),
    "qwen2 untied bf16 in files": (
        "qwen2", {"tied": False, "dtype": torch.bfloat16, "vocab": 99, "layers": 2, "max_shard_size": "40KB"}
    ),
    "llama with the rope of 3.1": ("llama", {"tied": False, **ODD, "hidden": 42, "rope": LLAMA_3_1}),
    "ministral's form, with YaRN": ("mistral", {"tied": False, **ODD, "hidden": 42, "rope": YARN}),
    "qwen2 tied fp32": ("qwen2", {"tied": True, "layers": 3}),
    "qwen3 moe untied bf16": (
        "qwen3_moe", {"tied": False, "dtype": torch.bfloat16, **ODD, "layers": 3, "dense_layers": (1,), "experts": 6}
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def process():
    with fresh_process() as pool:
        yield pool


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            family, options = MODELS[name]
            made[name] = make_tiny_model(tmp_path_factory.mktemp("model") / "hf", family, **options)
        return made[name]

    return folder


def _run(tool: str, arguments: list[str]) -> tuple[int, str, str]:
    """A tool's exit code and what it prints; runs in the fresh process."""
    import importlib

    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = importlib.import_module(f"tools.{tool}").main(arguments)
    return code, out.getvalue(), err.getvalue()


@pytest.fixture
def to_megatron(process):
    def run(hf, out, *more):
        return process.submit(
            _run, "convert_hf_to_megatron", ["--hf", str(hf), "--out", str(out), *map(str, more)]
        ).result()

    return run


@pytest.fixture
def to_hf(process):
    def run(megatron, out, *more):
        arguments = ["--megatron", str(megatron), "--out", str(out), *map(str, more)]
        return process.submit(_run, "convert_megatron_to_hf", arguments).result()

    return run


def layout(tp: int, pp: int) -> list[str]:
    return ["--tensor-model-parallel-size", str(tp), "--pipeline-model-parallel-size", str(pp)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2)])
@pytest.mark.parametrize("name", MODELS)
def test_a_round_trip_over_any_layout_is_bitwise(folders, to_megatron, to_hf, tmp_path, name, tp, pp):
    source = folders(name)
    code, printed, _ = to_megatron(source, tmp_path / "megatron", *layout(tp, pp))
    assert code == 0 and "peak host memory" in printed
    assert len(list((tmp_path / "megatron").glob("*.distcp"))) == tp * pp
    code, *said = to_hf(tmp_path / "megatron", tmp_path / "back", "--verify-against", source, "--max-shard-gb", 1e-4)
    assert code == 0, said
    before, after = weights(source), weights(tmp_path / "back")
    assert before.keys() == after.keys()
    for tensor, expected in ((after[key], before[key]) for key in before):
        assert tensor.dtype == expected.dtype and torch.equal(tensor, expected)
    kept = {path.name for path in source.iterdir()} - {path.name for path in source.glob("model*")}
    for file in kept - {"config.json"}:
        assert (tmp_path / "back" / file).read_bytes() == (source / file).read_bytes()
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "back", source))
    assert ours == theirs


@pytest.mark.parametrize(("tp", "pp", "ep", "ranks"), [(1, 1, 3, 3), (2, 1, 2, 2), (2, 3, 6, 18)])
def test_experts_are_dealt_to_the_ranks_that_share_them_and_come_back(
    folders, to_megatron, to_hf, tmp_path, tp, pp, ep, ranks
):
    source = folders("qwen3 moe untied bf16")
    sizes = [*layout(tp, pp), "--expert-model-parallel-size", str(ep)]
    _, listed, _ = to_megatron(source, tmp_path / "megatron", *sizes, "--dry-run")
    for expert in range(6):
        line = next(line for line in listed.splitlines() if f"layers.2.mlp.experts.{expert}.up_proj" in line)
        assert "→ GatedMLP →" in line and f"layers.2.mlp.experts.local_experts.{expert}.linear_fc1.weight" in line
    assert to_megatron(source, tmp_path / "megatron", *sizes)[0] == 0
    files = {file.name for file in (tmp_path / "megatron").glob("*.distcp")}
    assert files == {f"__{rank}_0.distcp" for rank in range(ranks)}
    code, *said = to_hf(tmp_path / "megatron", tmp_path / "back", "--verify-against", source)
    assert code == 0, said


def test_several_files_come_with_an_index_that_transformers_reads(folders, to_megatron, to_hf, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = folders("qwen2 untied bf16 in files")
    to_megatron(source, tmp_path / "megatron", *layout(2, 1))
    assert to_hf(tmp_path / "megatron", tmp_path / "back", "--dtype", "float32", "--max-shard-gb", 1e-4)[0] == 0
    index = json.loads((tmp_path / "back/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == len(list((tmp_path / "back").glob("*.safetensors"))) > 3
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert model.dtype == torch.float32
    reference = AutoModelForCausalLM.from_pretrained(source)
    for (name, ours), theirs in zip(model.state_dict().items(), reference.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs.float()), name
    assert AutoTokenizer.from_pretrained(tmp_path / "back").encode("a1") == [13, 4]  # of tests/tiny_models.py


def test_two_processes_make_the_same_checkpoint_and_folder_as_one(folders, to_megatron, to_hf, tmp_path):
    source = folders("qwen3 untied bf16")
    to_megatron(source, tmp_path / "alone", *layout(2, 2))
    (tmp_path / ".shared.writing").mkdir()  # what a killed conversion has left
    (tmp_path / ".shared.writing/__7_0.distcp").touch()
    arguments = ["--hf", str(source), "--out", str(tmp_path / "shared"), *layout(2, 2)]
    assert run_as_torchrun_does(_run_alone, 2, free_port(), "convert_hf_to_megatron", arguments) == [0, 0]
    assert {path.name for path in tmp_path.iterdir()} == {"alone", "shared"}
    assert {file.name for file in (tmp_path / "alone").iterdir()} == {f.name for f in (tmp_path / "shared").iterdir()}
    for file in (tmp_path / "alone").glob("*.distcp"):
        assert file.read_bytes() == (tmp_path / "shared" / file.name).read_bytes()
    arguments = ["--megatron", str(tmp_path / "shared"), "--out", str(tmp_path / "back")]
    arguments += ["--verify-against", str(source), "--max-shard-gb", "1e-4"]
    assert run_as_torchrun_does(_run_alone, 2, free_port(), "convert_megatron_to_hf", arguments) == [0, 0]
    assert weights(tmp_path / "back").keys() == weights(source).keys()


def test_ctrl_c_ends_the_wait_for_another_process():
    processes = StoreGroup()
    processes.size, processes._store = (
        2,
        torch.distributed.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False),
    )
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        processes.gather("mine")


def test_ctrl_c_is_not_taken_for_a_full_disk(tmp_path):
    """torch's writer raises an error of its own when it is interrupted, which says the same as on a full disk."""
    with pytest.raises(KeyboardInterrupt), written_aside(tmp_path / "out", StoreGroup()):
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("[enforce fail at inline_container.cc:668] . unexpected pos 7 vs 1")
    assert list(tmp_path.iterdir()) == []


def _run_alone(tool: str, arguments: list[str]) -> int:
    return _run(tool, arguments)[0]


def test_memory_stays_below_one_layer_and_the_largest_tensor(process, to_megatron, to_hf, tmp_path):
    large = {"tied": False, "vocab": 30_001, "hidden": 256, "layers": 2, "heads": 4, "kv_heads": 2, "ffn": 512}
    source = make_tiny_model(tmp_path / "hf", "llama", **large)
    report = process.submit(_convert, source, tmp_path / "megatron", tmp_path / "back").result()
    head = 30_001 * 256 * 4
    for peak, bound, total in report:
        assert head <= bound < 1.2 * head and total > 2 * head
        assert peak < bound + 2**21  # the largest tensor twice, or both at once, would be above


def _convert(source: Path, megatron: Path, back: Path) -> list[tuple[int, int, int]]:
    from megatron_srpo.config import ParallelConfig
    from megatron_srpo.conversion.to_hf import megatron_to_hf
    from megatron_srpo.conversion.to_megatron import hf_to_megatron

    reports = [hf_to_megatron(source, megatron, ParallelConfig(tensor_model_parallel_size=2))]
    reports.append(megatron_to_hf(megatron, back))
    return [(report.peak, report.bound, report.nbytes) for report in reports]


def test_a_dry_run_lists_every_tensor_with_its_shape_and_rule_and_writes_nothing(folders, to_megatron, to_hf, tmp_path):
    source = folders("qwen3 tied fp32")
    code, printed, _ = to_megatron(source, tmp_path / "megatron", "--dry-run", *layout(2, 2))
    assert code == 0 and not list(tmp_path.iterdir())
    for name, tensor in weights(source).items():
        assert f"{name} {list(tensor.shape)}" in printed
    assert "→ QKV →  rank 3: decoder.layers.2.self_attention.linear_qkv.weight [50, 40]" in printed
    assert "→ Vocab →  rank 1: embedding.word_embeddings.weight [52, 40]" in printed
    to_megatron(source, tmp_path / "megatron")
    code, printed, _ = to_hf(tmp_path / "megatron", tmp_path / "back", "--dry-run")
    assert code == 0 and not (tmp_path / "back").exists()
    for name, tensor in weights(source).items():
        assert f"{name} {list(tensor.shape)}" in printed


@pytest.fixture
def broken(folders, tmp_path):
    """A copy of a source folder, to be damaged."""
    return shutil.copytree(folders("qwen3 tied fp32"), tmp_path / "source")


def rewrite(folder: Path, change) -> None:
    held = load_file(folder / "model.safetensors")
    change(held)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})


REFUSED = {
    "a tensor is missing": (
        lambda folder: rewrite(folder, lambda held: held.pop("model.layers.3.mlp.up_proj.weight")), [],
        "has no tensor 'model.layers.3.mlp.up_proj.weight', which config.json implies. The nearest known name is",
    ),
    "a tensor has no rule": (
        lambda folder: rewrite(folder, lambda held: held.update({"model.layers.0.mlp.up_proj.wait": torch.ones(1)})),
        [], "does not know, the first is 'model.layers.0.mlp.up_proj.wait'. The nearest known name is 'model.layers.0",
    ),
    "the index is cut off": (
        lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": '), [],
        "model.safetensors.index.json is damaged: expected",
    ),
    "the index is of something else": (
        lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": ["a"]}'), [],
        "model.safetensors.index.json is damaged: expected",
    ),
    "no experts": (lambda folder: None, ["--expert-model-parallel-size", "2"], "the model has no experts"),
    "more stages than layers": (lambda folder: None, layout(1, 5), "5 pipeline stages take at least 5 layers"),
    "heads do not divide": (lambda folder: None, layout(4, 1), "does not divide the model's num_attention_heads = 6"),
    "no such option": (lambda folder: None, ["--tensor-parallel", "2"], "No such option"),
    "no such folder": (shutil.rmtree, [], "has no config.json: expected a Hugging Face model folder"),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_a_source_that_cannot_be_converted_is_refused_in_one_message(broken, to_megatron, tmp_path, reason):
    damage, more, message = REFUSED[reason]
    damage(broken)
    code, _, said = to_megatron(broken, tmp_path / "megatron", *more)
    assert code == 2 and message in said and said.startswith("error: ") and "Traceback" not in said
    assert {path.name for path in tmp_path.iterdir()} <= {"source"}


def test_what_exists_is_not_replaced(folders, to_megatron, to_hf, tmp_path):
    source = folders("qwen2 tied fp32")
    (tmp_path / "there").mkdir()
    for convert in (lambda: to_megatron(source, tmp_path / "there"), lambda: to_hf(source, tmp_path / "there")):
        code, _, said = convert()
        assert code == 2 and "error: " in said
    assert not list((tmp_path / "there").iterdir())


@pytest.fixture
def converted(folders, to_megatron, tmp_path):
    """A checkpoint, to be damaged."""
    to_megatron(folders("qwen3 tied fp32"), tmp_path / "megatron", *layout(2, 1))
    return tmp_path / "megatron"


def test_a_runs_newest_checkpoint_is_found_with_its_model_folder_and_its_tokenizer(folders, converted, to_hf, tmp_path):
    source = folders("qwen3 tied fp32")
    shutil.rmtree(converted / "hf")  # checkpoints of training have none
    newest = tmp_path / "run/checkpoints/step_00000012"
    newest.parent.mkdir(parents=True)
    converted.rename(newest)
    (newest / "manifest.json").write_text("{}")
    (newest / "config.json").write_text(json.dumps({"model": {"path": str(source)}}))
    (newest.parent / "step_00000004").mkdir()
    for given in (tmp_path / "run", newest.parent, newest):
        code, *said = to_hf(given, tmp_path / "back", "--verify-against", source)
        assert code == 0, said
        shutil.rmtree(tmp_path / "back")
    own = tmp_path / "tokenizer"
    own.mkdir()
    (own / "tokenizer.json").write_text("another one")
    (newest / "config.json").write_text(json.dumps({"model": {"path": str(source), "tokenizer": str(own)}}))
    assert to_hf(newest, tmp_path / "back")[0] == 0
    assert (tmp_path / "back/tokenizer.json").read_text() == "another one"
    shutil.rmtree(tmp_path / "back")
    shutil.rmtree(own)
    code, _, said = to_hf(newest, tmp_path / "back")
    assert code == 2 and "which is not there" in said and "--hf DIR" in said
    (newest / "config.json").write_text(json.dumps({"model": {"path": "models/moved"}}))
    code, _, said = to_hf(newest, tmp_path / "back")
    assert code == 2 and "models/moved" in said and "--hf DIR" in said
    assert to_hf(newest, tmp_path / "back", "--hf", source, "--verify-against", source)[0] == 0


def flip_a_byte(folder: Path) -> None:
    file = folder / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def reconfigure(folder: Path, **changes) -> None:
    file = folder / "hf/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


DAMAGED = {
    "a bit has changed": (flip_a_byte, "__0_0.distcp cannot be read"),
    "a file is gone": (lambda folder: (folder / "__1_0.distcp").unlink(), "__1_0.distcp cannot be read"),
    "the index is gone": (lambda folder: (folder / ".metadata").unlink(), "has no .metadata"),
    "it is no checkpoint": (lambda folder: (folder / "metadata.json").unlink(), "no checkpoint in"),
    "the model's configuration is gone": (
        lambda folder: shutil.rmtree(folder / "hf"), "name its Hugging Face folder with --hf DIR"
    ),
    "fewer layers than it has": (
        lambda folder: reconfigure(folder, num_hidden_layers=3), "has shape [4, 40], config.json implies [3, 40]"
    ),
    "another family": (
        lambda folder: reconfigure(folder, architectures=["LlamaForCausalLM"], model_type="llama"),
        "that no rule reads, the first is 'decoder.layers.self_attention.k_layernorm.weight'. The nearest known name",
    ),
    "a tensor that it has not": (
        lambda folder: reconfigure(folder, tie_word_embeddings=False),
        "has no tensor 'output_layer.weight', which config.json implies",
    ),
    "a larger vocabulary": (lambda folder: reconfigure(folder, vocab_size=105), "config.json implies [105, 40]"),
}  # fmt: skip


@pytest.mark.parametrize("reason", DAMAGED)
def test_a_checkpoint_that_cannot_be_converted_is_refused_in_one_message(converted, to_hf, tmp_path, reason):
    damage, message = DAMAGED[reason]
    damage(converted)
    code, _, said = to_hf(converted, tmp_path / "back")
    assert code == 2 and message in said and "Traceback" not in said
    assert said.count("\n") <= 2 and said.splitlines()[-1].startswith("error: ")  # after the bar, where it had begun
    assert {path.name for path in tmp_path.iterdir()} == {"megatron"}


def test_verification_names_the_tensor_that_differs_and_keeps_nothing(converted, broken, to_hf, tmp_path):
    def change(held):
        held["model.layers.1.self_attn.k_proj.weight"][3, 4] += 0.5

    rewrite(broken, change)
    code, _, said = to_hf(converted, tmp_path / "back", "--verify-against", broken)
    assert code == 2
    assert "in 1 tensor(s)" in said and "model.layers.1.self_attn.k_proj.weight: other values, by at most 0.5" in said
    assert not (tmp_path / "back").exists()


def test_verification_looks_at_a_head_that_a_tied_source_has_of_its_own(converted, broken, to_hf, tmp_path):
    rewrite(broken, lambda held: held.update({"lm_head.weight": held["model.embed_tokens.weight"].clone()}))
    assert to_hf(converted, tmp_path / "back", "--verify-against", broken)[0] == 0  # a copy is no difference
    rewrite(broken, lambda held: held["lm_head.weight"].mul_(2))
    code, _, said = to_hf(converted, tmp_path / "again", "--verify-against", broken)
    assert code == 2 and "lm_head.weight: missing" in said and not (tmp_path / "again").exists()
