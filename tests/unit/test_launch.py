"""What a run does when its last checkpoint is lost."""

from __future__ import annotations

import errno
import json
from types import SimpleNamespace

import pytest

from megatron_srpo.config import Config
from megatron_srpo.core.errors import UserError
from megatron_srpo.run import launch

ALONE = SimpleNamespace(share=lambda compute: compute(), is_driver=True)


@pytest.mark.parametrize(("iteration", "name"), [(8, "hf"), (3, "hf_iteration_00000003")])
@pytest.mark.parametrize("full", [(), ("out",), ("out", "other")])
def test_weights_that_no_checkpoint_holds_are_exported_to_the_first_folder_that_takes_them(
    monkeypatch, iteration, name, full
):
    config = Config(
        run={"output_dir": "out", "iterations": 8}, model={"path": "m"}, data={"train": "t"},
        checkpoint={"fallback_dir": "other"},
    )  # fmt: skip
    tried = []

    def write(config, weights, target, *, is_driver):
        tried.append(str(target))
        if target.parts[0] in full:
            raise OSError(errno.ENOSPC, "No space left on device", str(target))

    monkeypatch.setattr(launch, "_write_hf", write)
    told = launch._rescue_weights(config, ALONE, [], iteration)
    other = config.fallback_folder
    assert tried == [f"out/{name}", f"{other}/{name}"][: len(full) + 1]
    if len(full) == 2:
        assert told == (
            f"Its weights could not be exported either: out/{name}: No space left on device; "
            f"{other}/{name}: No space left on device."
        )
    else:
        assert told == f"The weights of iteration {iteration} are in {tried[-1]}, without the optimizer's state."


@pytest.mark.parametrize(
    ("stored", "mine", "complaint"),
    [
        ({"rank": 8}, {"rank": 8, "alpha": 1.0}, r"lora.alpha = 32.0 \(here 1.0\)"),
        ({"rank": 8}, {"rank": 4}, r"lora.rank = 8 \(here 4\)"),
        ({"rank": 8}, {"rank": 8, "rslora": True}, r"lora.rslora = False \(here True\)"),
        ({"rank": 8}, {"rank": 8, "targets": ["q_proj"]}, "lora.targets"),
        ({"rank": 8}, {}, r"lora.rank = 8 \(here 0\)"),
        ({}, {"rank": 8}, r"lora.rank = 0 \(here 8\): evaluate it with the same"),
        ({}, {}, ""),
        ({"rank": 8}, {"rank": 8, "publish": "merged", "dropout": 0.1}, ""),
    ],
)
def test_a_checkpoint_is_evaluated_with_the_adapters_that_it_was_trained_with(tmp_path, stored, mine, complaint):
    (tmp_path / "config.json").write_text(json.dumps({"lora": stored}))
    config = Config(model={"path": "m"}, data={"train": "t"}, lora=mine)
    if not complaint:
        launch._require_same_adapters(config, tmp_path)
        return
    with pytest.raises(UserError, match=complaint):
        launch._require_same_adapters(config, tmp_path)


def test_two_runs_that_share_a_fallback_folder_have_one_each_and_a_resumed_run_keeps_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def folder(output):
        shared = {"model": {"path": "m"}, "data": {"train": "t"}, "checkpoint": {"fallback_dir": "/disk"}}
        return Config(run={"output_dir": output}, **shared).fallback_folder

    assert folder("runs/a/out") != folder("runs/b/out") and folder("runs/a/out") == folder(str(tmp_path / "runs/a/out"))
    assert folder("runs/a/out").startswith("/disk/out-")
    assert Config(model={"path": "m"}, data={"train": "t"}).fallback_folder == ""
