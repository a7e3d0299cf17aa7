"""A run with adapters from the command line: trained, resumed bit for bit, served by vLLM, continued."""

import shutil

import pytest
import torch

from tests import tiny_run
from tests.fresh_process import fresh_process
from tests.lora_reference import load_adapted, read_folder

LORA = (
    "--lora.rank=4",
    "--lora.alpha=8",
    "--optimizer.lr=1e-2",
    "--algorithm.kl_loss_coef=0.01",
    "--train.prompts_per_mini_batch=0",  # one step a batch, which then is the policy that has sampled
)
SERVED = {"dtype": "float32", "enforce_eager": True, "max_model_len": 64, "seed": 0}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    config = tiny_run.make_run(folder)
    tiny_run.train(config, *LORA, "--checkpoint.keep=9")
    return folder


def test_adapters_learn_and_are_published_alone(trained):
    records = tiny_run.records(trained / "out")
    assert len(records) == 8
    assert max(record["rollout_corr/logprob_diff_max"] for record in records) < 1e-4  # the engine has what is trained
    assert records[0]["actor/kl_loss"] < records[-1]["actor/kl_loss"]
    config, tensors = read_folder(trained / "out/hf")
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert all(value.any() for value in tensors.values())
    adapted = load_adapted(trained / "model", trained / "out/hf")
    with torch.no_grad():
        found = adapted(torch.arange(1, 20)[None]).logits
        with adapted.disable_adapter():
            assert not torch.allclose(found, adapted(torch.arange(1, 20)[None]).logits, atol=1e-3)


PARALLEL = ("--parallel.tensor_model_parallel_size=2", "--parallel.sequence_parallel=true")
LAYOUTS = {
    "merged": (1, "--lora.publish=merged"),
    "servers": (1, "--rollout.placement=servers"),
    "engine over two ranks": (2, *PARALLEL, "--rollout.tensor_parallel_size=2"),
    "an engine for each rank": (2, "--parallel.pipeline_model_parallel_size=2"),
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_engines_have_the_adapters_that_are_trained(tmp_path, layout):
    """In every kind of publish, which each is verified by checksums."""
    ranks, *options = LAYOUTS[layout]
    config = tiny_run.make_run(tmp_path)
    few = ("--run.iterations=4", "--bridge.verify_every=1")
    tiny_run.train(config, *LORA, *few, *options, ranks=ranks)
    records = tiny_run.records(tmp_path / "out")
    assert len(records) == 4 and records[0]["actor/kl_loss"] < records[-1]["actor/kl_loss"]
    assert max(record["rollout_corr/logprob_diff_max"] for record in records) < 1e-4


@pytest.mark.slow
def test_a_run_goes_on_bit_for_bit_and_refuses_other_weights(trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "resumed")
    shutil.rmtree(folder / "out/checkpoints/step_00000008")
    shutil.rmtree(folder / "out/hf")
    (folder / "out/checkpoints/latest").write_text("step_00000004\n")
    paths = (f"--run.output_dir={folder}/out", "--checkpoint.keep=9")
    code, output = tiny_run.finish(tiny_run.start(folder / "config.toml", *paths))
    assert code != 0 and "its lora.rank is 4, this run's is 0" in output
    tiny_run.train(folder / "config.toml", *paths, *LORA)
    expected, found = read_folder(trained / "out/hf")[1], read_folder(folder / "out/hf")[1]
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert tiny_run.records(folder / "out") == tiny_run.records(trained / "out")


def greedy(model, adapter=None):
    """Greedy tokens and log-probs of vLLM, in a process of its own."""
    import os

    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1"}
    from megatron_srpo.rollout import prepare_environment

    prepare_environment("cpu")
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(str(model), enable_lora=adapter is not None, **SERVED)
    prompts = [{"prompt_token_ids": list(range(3 + i, 23 + i))} for i in range(4)]
    params = SamplingParams(max_tokens=8, temperature=0.0, logprobs=0, ignore_eos=True)
    request = LoRARequest("trained", 1, str(adapter)) if adapter is not None else None
    outputs = [answer.outputs[0] for answer in llm.generate(prompts, params, lora_request=request)]
    logprobs = [[next(iter(step.values())).logprob for step in output.logprobs] for output in outputs]
    return [list(output.token_ids) for output in outputs], torch.tensor(logprobs)


def convert(*arguments, **options):
    from megatron_srpo.conversion.to_hf import megatron_to_hf

    megatron_to_hf(*arguments, **options)


@pytest.mark.slow
def test_vllm_serves_the_adapter_as_the_merged_model(trained, tmp_path):
    with fresh_process() as process:
        process.submit(convert, trained / "out", tmp_path / "merged", merge=True).result()
    served = []
    for model, adapter in ((trained / "model", trained / "out/hf"), (tmp_path / "merged", None)):
        with fresh_process() as process:
            served.append(process.submit(greedy, model, adapter).result())
    assert served[0][0] == served[1][0]
    torch.testing.assert_close(served[0][1], served[1][1], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_a_run_starts_from_an_adapter(trained, tmp_path):
    """It begins with the adapter's policy: the reference is that policy, and the divergence from it begins at zero."""
    folder = tiny_run.make_run(tmp_path / "other").parent
    shutil.copytree(trained / "model", folder / "model", dirs_exist_ok=True)
    start = f"--lora.path={trained}/out/hf"
    code, output = tiny_run.finish(tiny_run.start(folder / "config.toml", *LORA, start, "--lora.rank=8"))
    assert code != 0 and "the adapter has lora.rank = 4 (this run: 8)" in output
    few = ("--run.iterations=2", "--checkpoint.every=1", "--optimizer.lr=1e-9")
    tiny_run.train(folder / "config.toml", *LORA, start, *few)
    before, after = read_folder(trained / "out/hf")[1], read_folder(folder / "out/hf")[1]
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=1e-6)
    for record in tiny_run.records(folder / "out"):
        assert abs(record["actor/kl_loss"]) < 1e-9
        assert record["rollout_corr/logprob_diff_max"] < 1e-4
