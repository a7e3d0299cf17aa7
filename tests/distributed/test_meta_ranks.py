"""`plan --check`: a job's ranks built on the meta device are the ranks that the job has."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_srpo.bridge import read_config
from megatron_srpo.config import Config
from megatron_srpo.config.load import to_toml_value
from megatron_srpo.core.errors import UserError
from megatron_srpo.run import cli
from tests.distributed_harness import run_distributed
from tests.tiny_models import make_tiny_model

ROOT = Path(__file__).resolve().parents[2]
PARALLEL = {
    "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2,
    "sequence_parallel": True,
}  # fmt: skip


def _config(model):
    return Config.model_validate({"model": {"path": str(model)}, "data": {"train": "unused"}, "parallel": PARALLEL})


def _real_rank(model):
    """Shapes of the rank's parameters, and the names of the whole export."""
    from megatron_srpo.bridge import Exporter
    from megatron_srpo.mcore import groups
    from megatron_srpo.mcore.device import choose_device
    from megatron_srpo.mcore.model import build_model, model_shards

    config, hf = _config(model), read_config(model)
    topology = groups.initialize(config.parallel, choose_device("cpu", 0), seed=1, timeout_minutes=2)
    built = build_model(hf, config.model, config.parallel, topology, transformer_engine=False)
    shards = model_shards(built, topology, hf["vocab_size"])
    shapes = {name: (tuple(p.shape), p.dtype) for name, p in shards.parameters.items()}
    return shapes, Exporter(shards, hf).names()


def _all_meta_ranks(model):
    from megatron_srpo.bridge.inventory import stage_inventory
    from megatron_srpo.mcore.meta_model import meta_ranks

    hf, found = read_config(model), {}
    for built in meta_ranks(_config(model), hf, 4):
        shapes = {name: (tuple(p.shape), p.dtype) for name, p in built.shards.parameters.items()}
        assert {p.device.type for p in built.shards.parameters.values()} == {"meta"}
        found[built.rank] = shapes, built.layers, list(stage_inventory(built.shards, hf).tensors)
    return found


def _meta_ranks_alone(model, file):
    """Every rank's shapes, and what `plan --check` says of a folder whose index names another tensor."""
    import torch.distributed as dist

    from megatron_srpo.mcore.model import uneven_layout
    from megatron_srpo.plan.layout import Layout, stage_layers
    from megatron_srpo.run.planning import check

    for layers, pipeline, virtual in ((94, 8, 1), (94, 4, 2), (9, 4, 1), (36, 4, 3), (7, 2, 2)):
        pieces = uneven_layout(layers, pipeline, virtual)
        if pieces is not None:
            counts = [piece.count("decoder") for piece in pieces]
            stages = [sum(counts[stage::pipeline]) for stage in range(pipeline)]
            assert stage_layers(layers, Layout(pipeline, 1, pipeline, virtual)) == stages
    dist.destroy_process_group()  # the harness's own world
    found = _all_meta_ranks(model)
    assert check([file], 4, [], None) == 0
    index = {"weight_map": {"model.embed_tokens.weight": "a", "model.surprise.weight": "a"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="names differ"):
        check([file], 4, [], None)
    dist.init_process_group("gloo", rank=0, world_size=1)
    return found


def write_run(folder, model):
    file = folder / "run.toml"
    keys = "".join(f"{key} = {to_toml_value(value)}\n" for key, value in PARALLEL.items())
    file.write_text(
        f'[model]\npath = "{model}"\n[data]\ntrain = "rows.jsonl"\nmax_prompt_length = 64\n'
        f"[rollout]\nmax_response_length = 64\n[parallel]\n{keys}"
    )
    return file


def test_meta_ranks_have_the_parameters_of_real_ones_and_all_stages_export_the_model(tmp_path):
    model = make_tiny_model(tmp_path / "model", layers=4, tied=False)
    real = run_distributed(_real_rank, 4, model)
    (built,) = run_distributed(_meta_ranks_alone, 1, model, write_run(tmp_path, model))
    assert sorted(built) == [0, 1, 2, 3]
    for rank, (shapes, _, _) in built.items():
        assert shapes == real[rank][0]
    assert [built[rank][1] for rank in (0, 2)] == [[0, 2], [1, 3]]
    assert built[0][2] + built[2][2] == real[0][1]


def test_a_configuration_that_does_not_divide_is_refused_before_anything_is_built(tmp_path, capfd):
    file = write_run(tmp_path, make_tiny_model(tmp_path / "model", layers=6))
    assert cli.main(["plan", "--gpus", "6", "--check", str(file)]) == 2
    assert "6 ranks were started" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("model", ["Qwen3-8B", "Qwen3-32B", "Qwen3-30B-A3B", "Qwen3-235B-A22B"])
def test_the_papers_configurations_are_checked_on_512_gpus(model):
    file = ROOT / "examples/science" / f"srpo_{model.lower().replace('-', '_')}.toml"
    command = [sys.executable, "-m", "megatron_srpo", "plan", model, "--gpus", "512", "--check", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "exported, as config.json implies" in done.stdout
