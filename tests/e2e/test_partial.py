"""Training with partial rollouts: torchrun, Megatron Core, colocated vLLM engines."""

from __future__ import annotations

import json

import pytest

from megatron_srpo.checkpoints.folder import damage, published, read_manifest
from tests import tiny_run
from tests.e2e.test_resume import RANKS, killed_after

# A random model ends one of a hundred responses at each token: a fourth of them reach the limit.
LONG = (
    "--rollout.max_response_length=128", "--rollout.n_samples_per_prompt=2", "--train.max_tokens_per_gpu=512",
    "--observe.rollout_texts=99",
)  # fmt: skip
PARTIAL = ("--rollout.partial_tokens=8", "--rollout.partial_groups=4", "--rollout.max_staleness=2")
EVALUATED = ("--eval.every=3", "--checkpoint.every=3", "--checkpoint.keep=9")
ONE_ENGINE = (
    "--parallel.tensor_model_parallel_size=2", "--parallel.sequence_parallel=true", "--rollout.tensor_parallel_size=2",
)  # fmt: skip
PROMPTS = 64  # so many that none comes twice
STANDSTILL = ("--optimizer.lr=1e-30", "--optimizer.weight_decay=0")  # too little to change a weight


def make_run(folder):
    config = tiny_run.make_run(folder, prompts=PROMPTS)
    (folder / "held_out.jsonl").write_text((folder / "data.jsonl").read_text())
    return config


def groups(out) -> list[list[dict]]:
    """By iteration, what rollouts.jsonl says of its groups."""
    return [json.loads(line)["groups"] for line in (out / "rollouts.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    config = make_run(folder)
    tiny_run.train(config, *LONG, *PARTIAL, *EVALUATED, f"--data.test={folder}/held_out.jsonl", ranks=RANKS)
    return folder


@pytest.mark.slow
def test_iterations_train_whole_groups_within_the_bound_and_the_log_says_how_old_they_are(straight):
    _, *lines = tiny_run.records(straight / "out")  # the first is the evaluation before the training
    trained = groups(straight / "out")
    assert [line["step"] for line in lines] == list(range(1, 9)) and [len(found) for found in trained] == [4] * 8
    oldest = 0
    for iteration, (line, found) in enumerate(zip(lines, trained, strict=True)):
        versions = [versions for group in found for versions in group["versions"]]
        assert len(versions) == 8 and all(one == sorted(one) and one[-1] <= iteration for one in versions)
        ages = [iteration - one[0] for one in versions]
        assert line["rollout/staleness_max"] == max(ages) <= 2
        assert line["rollout/staleness_mean"] == pytest.approx(sum(ages) / len(ages))
        assert line["rollout/stale_samples"] == 0
        assert line["rollout/groups_under_way"] == min(4, 4 * (7 - iteration))
        oldest = max(oldest, *ages)
    assert oldest == 2 and any(len(one) > 1 for found in trained for group in found for one in group["versions"])
    uids = [group["uid"] for found in trained for group in found]
    assert len(set(uids)) == len(uids) == 32
    # The policy has moved since a token was sampled, and the importance weights see it.
    assert max(line["rollout_corr/logprob_diff_max"] for line in lines) > 1e-3
    assert (
        max(line["rollout_corr/logprob_diff_max"] for line in lines if not line["rollout/older_token_fraction"]) < 1e-4
    )
    assert any(line["rollout/older_token_fraction"] > 0.2 for line in lines)
    assert all("eval/accuracy" in lines[number] for number in (2, 5, 7))


@pytest.mark.slow
def test_a_run_killed_between_two_checkpoints_goes_on_with_the_same_groups_bit_for_bit(straight, tmp_path):
    config = make_run(tmp_path)
    options = (*LONG, *PARTIAL, *EVALUATED, f"--data.test={tmp_path}/held_out.jsonl")
    killed_after(config, 5, *options)
    assert "going on from" in tiny_run.train(config, *options, ranks=RANKS)
    assert tiny_run.records(tmp_path / "out") == tiny_run.records(straight / "out")
    assert groups(tmp_path / "out") == groups(straight / "out")
    exported = [(folder / "out/hf/model.safetensors").read_bytes() for folder in (straight, tmp_path)]
    assert exported[0] == exported[1]
    kept = [published(folder / "out/checkpoints") for folder in (straight, tmp_path)]
    for mine, theirs in zip(*kept, strict=True):
        assert damage(mine) == []
        files = [read_manifest(folder)["files"] for folder in (mine, theirs)]
        assert files[0]["run.json"] == files[1]["run.json"]
    states = [json.loads((folder / "run.json").read_text())["loader"]["under_way"] for folder in kept[0]]
    carried = [group for state in states for group in state["groups"]]
    assert any(group["begun"] for group in carried) and any(group["attempts"] for group in carried)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [(), ONE_ENGINE], ids=["two engines", "one engine over two ranks"])
def test_with_weights_that_stand_still_every_response_is_that_of_a_run_without_partial_rollouts(tmp_path, layout):
    found = {}
    for name, options in (("plain", ()), ("partial", PARTIAL)):
        (tmp_path / name).mkdir()
        config = make_run(tmp_path / name)
        tiny_run.train(config, *LONG, *STANDSTILL, *layout, *options, ranks=RANKS)
        found[name] = groups(tmp_path / name / "out")
    plain, partial = (
        {group["uid"]: group for iteration in found[name] for group in iteration} for name in ("plain", "partial")
    )
    assert plain.keys() == partial.keys() and len(plain) == 32
    for uid, group in plain.items():
        for key in ("responses", "lengths", "scores", "finish_reasons"):
            assert partial[uid][key] == group[key], (uid, key)
    assert max(len(versions) for group in partial.values() for versions in group["versions"]) > 1
    assert [group["uid"] for group in plain.values()] != [group["uid"] for group in partial.values()]
    lengths = {length for group in plain.values() for length in group["lengths"]}
    assert max(lengths) == 128 and min(lengths) < 20
