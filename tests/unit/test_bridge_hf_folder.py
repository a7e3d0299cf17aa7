"""What an export becomes on disk: a folder that transformers loads, complete or absent."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_srpo.bridge import BridgeError, read_config, write_hf_folder
from tests.tiny_models import make_tiny_model


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = make_tiny_model(tmp_path_factory.mktemp("source"), tied=False)
    (folder / "notes.json").write_text("{}")
    return folder


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def logits(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.arange(3, 20)[None]).logits


@pytest.mark.parametrize("limit", [10**9, 40_000], ids=["one file", "several files"])
def test_transformers_loads_what_was_written(source, tmp_path, limit):
    out = write_hf_folder(weights_of(source).items(), source, tmp_path / "out", max_shard_bytes=limit)
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert (files == ["model.safetensors"]) == (limit > 10**6)
    assert torch.equal(logits(out), logits(source))
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(source).chat_template
    assert (out / "generation_config.json").exists() and not (out / "notes.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # nothing is left aside
    modes = {path.stat().st_mode for path in [*out.glob("*.safetensors"), out / "config.json"]}
    assert len(modes) == 1  # whoever may read the config may read the weights


def test_several_files_stay_under_the_limit_and_the_index_names_each_tensor(source, tmp_path):
    out = write_hf_folder(weights_of(source).items(), source, tmp_path / "out", max_shard_bytes=40_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(weights_of(source))
    assert index["metadata"]["total_size"] == sum(w.nbytes for w in weights_of(source).values())
    for file in set(index["weight_map"].values()):
        held = load_file(out / file)
        assert sum(w.nbytes for w in held.values()) <= 40_000 and held.keys() <= index["weight_map"].keys()


def test_conversion_to_bfloat16_reaches_weights_and_config(source, tmp_path):
    out = write_hf_folder(weights_of(source).items(), source, tmp_path / "out", dtype="bfloat16")
    assert all(torch.equal(w, weights_of(source)[name].bfloat16()) for name, w in weights_of(out).items())
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_views_are_written_without_what_they_are_views_of(source, tmp_path):
    whole = torch.randn(10, 1000)
    out = write_hf_folder([("a", whole[0]), ("b", whole[:, 1])], source, tmp_path / "out")
    assert (out / "model.safetensors").stat().st_size < 8000
    assert torch.equal(weights_of(out)["b"], whole[:, 1])


def test_an_old_export_is_replaced(source, tmp_path):
    write_hf_folder([("a", torch.zeros(3))], source, tmp_path / "out")
    write_hf_folder([("b", torch.ones(3))], source, tmp_path / "out")
    assert list(weights_of(tmp_path / "out")) == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_error_leaves_the_old_folder_and_drains_the_export(source, tmp_path):
    write_hf_folder([("a", torch.zeros(3))], source, tmp_path / "out")
    seen = []

    def items():
        for i in range(4):
            seen.append(i)
            yield f"w{i}", torch.ones(2) if i != 1 else None  # the second one cannot be written

    with pytest.raises(AttributeError):
        write_hf_folder(items(), source, tmp_path / "out")
    assert seen == [0, 1, 2, 3]
    assert list(weights_of(tmp_path / "out")) == ["a"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_is_no_model_is_not_replaced(source, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    with pytest.raises(BridgeError, match="no model folder"):
        write_hf_folder([("a", torch.zeros(3))], source, tmp_path / "thesis")
    with pytest.raises(BridgeError, match="its own source"):
        write_hf_folder([("a", torch.zeros(3))], source, source)
    assert (tmp_path / "thesis" / "chapter1.tex").exists() and (source / "model.safetensors").exists()


def test_files_are_those_that_the_safetensors_library_writes(source, tmp_path):
    mixed = {
        "b": torch.randn(3, 5),
        "a": torch.randn(7).bfloat16(),
        "c": torch.randn(2, 2).double(),
        "é": torch.ones(1),
    }
    out = write_hf_folder(mixed.items(), source, tmp_path / "out")
    save_file(mixed, tmp_path / "library", metadata={"format": "pt"})
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "library").read_bytes()


def test_the_export_has_the_tokenizer_that_was_trained_with_and_nothing_of_the_other(source, tmp_path):
    other = tmp_path / "tokenizer"
    other.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja"):
        (other / name).write_text(f"other {name}")
    (other / "config.json").write_text("{}")
    out = write_hf_folder([("a", torch.zeros(3))], source, tmp_path / "out", tokenizer=other)
    assert (out / "tokenizer.json").read_text() == "other tokenizer.json"
    assert (out / "chat_template.jinja").read_text() == "other chat_template.jinja"
    assert not (out / "tokenizer_config.json").exists() and (source / "tokenizer_config.json").exists()
    assert read_config(out)["hidden_size"] == read_config(source)["hidden_size"]


def test_an_output_that_is_a_link_to_another_disk_stays_a_link(source, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk/hf")
    for value in (1.0, 2.0):  # the folder is not there yet, and is there
        write_hf_folder([("a", torch.full((3,), value))], source, tmp_path / "out")
        assert (tmp_path / "out").is_symlink() and not (tmp_path / "disk/hf").is_symlink()
        assert load_file(tmp_path / "disk/hf/model.safetensors")["a"].eq(value).all()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["hf"]
