"""What a run does when its last checkpoint is lost."""

from __future__ import annotations

import errno
from types import SimpleNamespace

import pytest

from megatron_srpo.config import Config
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
    assert tried == [f"out/{name}", f"other/{name}"][: len(full) + 1]
    if len(full) == 2:
        assert told == (
            f"Its weights could not be exported either: out/{name}: No space left on device; "
            f"other/{name}: No space left on device."
        )
    else:
        assert told == f"The weights of iteration {iteration} are in {tried[-1]}, without the optimizer's state."
