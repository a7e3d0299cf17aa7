"""The comparison of trainer and engine before the first iteration, in every layout of the trainer."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.distributed_harness import run_distributed
from tests.tiny_models import make_tiny_model

LAYOUTS = {  # on two ranks
    "tp2_sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2_interleaved": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    "cp2": {"context_parallel_size": 2},
    "dp2": {},
}
TEMPERATURE, PROMPT, RESPONSE = 0.7, 7, 12


def _answers(folder: Path) -> list:
    """Five sequences as an engine with the weights of `folder` scores them, by transformers."""
    from transformers import AutoModelForCausalLM

    from megatron_srpo.core.records import Rollout

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for number in range(5):
        ids = torch.randint(0, 101, (PROMPT + RESPONSE,), generator=torch.Generator().manual_seed(number))
        with torch.no_grad():
            logprobs = (model(ids[None]).logits[0] / TEMPERATURE).log_softmax(-1)
        own = logprobs[PROMPT - 1 : -1].gather(1, ids[PROMPT:, None])[:, 0].tolist()
        found.append((ids[:PROMPT].tolist(), Rollout(number, 0, ids[PROMPT:].tolist(), own, "", "length", 0)))
    return found


def _check(model: Path, parallel: dict, answers: list) -> str:
    """What this rank hears, with the answers of an engine on rank 0."""
    from megatron_srpo.bridge import load_hf_weights, read_config
    from megatron_srpo.config import Config
    from megatron_srpo.core.errors import UserError
    from megatron_srpo.core.records import Prompt
    from megatron_srpo.losses.objective import Objective
    from megatron_srpo.mcore import groups
    from megatron_srpo.mcore.control import Control
    from megatron_srpo.mcore.device import choose_device
    from megatron_srpo.mcore.policy import Policy
    from megatron_srpo.run.start_check import check_start

    config = Config(
        model={"path": str(model), "dtype": "float32"}, data={"train": "unused"}, parallel=parallel,
        rollout={"temperature": TEMPERATURE, "start_mismatch_limit": 1e-4},
    )  # fmt: skip
    topology = groups.initialize(config.parallel, choose_device("cpu", 0), seed=1, timeout_minutes=2)
    load = partial(load_hf_weights, hf_dir=model)
    policy = Policy(config, read_config(model), topology, choose_device("cpu", 0), load, total_steps=1)

    class Engine:
        def generate(self, requests, sampling):
            return [rollout for _, rollout in answers] if topology.rank == 0 else None

    prompts = [Prompt(f"train:{number}", (), ids, "", "exact") for number, (ids, _) in enumerate(answers)]
    try:
        return check_start(config, Control(topology), Engine(), policy, Objective(config), prompts)
    except UserError as error:
        return str(error)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model, and the same weights with another base of the rotary embedding."""
    sound = make_tiny_model(tmp_path_factory.mktemp("model") / "sound", layers=4)
    other = Path(shutil.copytree(sound, sound.parent / "other"))
    config = json.loads((other / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 500.0
    (other / "config.json").write_text(json.dumps(config))
    return sound, other


@pytest.mark.parametrize(
    "layout", [name if name == "pp2_interleaved" else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS]
)
def test_every_layout_agrees_with_the_same_model_and_refuses_another_rotary_base(folders, layout):
    sound, other = folders
    heard = run_distributed(_check, 2, sound, LAYOUTS[layout], _answers(sound))
    assert all("agree on 60 tokens" in text for text in heard), heard
    heard = run_distributed(_check, 2, sound, LAYOUTS[layout], _answers(other))
    assert all("are not the same model" in text and "rope_theta" in text for text in heard), heard
