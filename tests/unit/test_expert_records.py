"""The experts that an engine used, on their way to the trainer's rows: what is refused, and where each one lands."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_srpo.algorithms.routing import route
from megatron_srpo.algorithms.section import algorithm
from megatron_srpo.batching.rows import pack_rows, token_positions
from megatron_srpo.batching.source import require_experts
from megatron_srpo.config import RolloutConfig
from megatron_srpo.core.errors import UserError
from megatron_srpo.core.records import Attempt, Group, Padding, Prompt, Reward, Rollout, Row
from megatron_srpo.families import ModelShape
from megatron_srpo.mcore.replay import DIFFERENT, FREE, NOT_REPLAYED, SAME, RowReplay
from megatron_srpo.observe.watches import watches
from megatron_srpo.rollout import GenerateRequest, RolloutError, SamplingSettings
from megatron_srpo.rollout.engine import experts_of_turns
from megatron_srpo.rollout.http import BadAnswer, UnacceptableRequest
from megatron_srpo.rollout.vllm.client import read_answer
from megatron_srpo.rollout.vllm.expert_records import decode_rows, expert_record
from megatron_srpo.rollout.vllm.settings import (
    CPU_WORKER,
    RECORDING_WORKER,
    EngineSettings,
    check_model,
    command_line,
    engine_arguments,
)
from tests.fake_server import answer, packed
from tests.made_samples import make_sample
from tests.unit.test_config_check import QWEN3_30B_A3B

SHAPE = ModelShape.from_hf({**QWEN3_30B_A3B, "num_hidden_layers": 4, "mlp_only_layers": [1], "num_experts_per_tok": 2})
RNG = np.random.default_rng(0)


def rows_of_vllm(tokens: int, experts: int = 128) -> np.ndarray:
    """What vLLM returns for a sequence of `tokens` tokens."""
    found = RNG.permuted(np.tile(np.arange(experts), (tokens - 1, 4, 1)), axis=-1)[..., :2]
    found[:, 1] = 0  # the dense layer
    return found.astype(np.uint8 if experts <= 256 else np.uint16)


def encoded(rows: np.ndarray) -> str:
    """As vLLM's server puts it into JSON (`vllm.utils.serial_utils.numpy2base64`)."""
    file = io.BytesIO()
    np.save(file, rows)
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize(("experts", "dtype"), [(128, np.uint8), (256, np.uint8), (257, np.uint16)])
def test_a_record_has_the_layers_with_experts_in_the_smallest_type(experts, dtype):
    shape = ModelShape(**{**vars(SHAPE), "experts": experts})
    rows = rows_of_vllm(7, experts)
    record = expert_record(rows.astype(np.int32), 7, shape)  # whatever integers an engine returns
    assert record.dtype == dtype and record.flags.c_contiguous
    assert np.array_equal(record, rows[:, [0, 2, 3]])
    assert record[0].nbytes == shape.expert_bytes


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda rows: None, "no experts came"),
        (lambda rows: rows[:-1], "shape"),
        (lambda rows: rows[:, :3], "shape"),
        (lambda rows: rows.astype(np.float32), "float32"),
        (lambda rows: np.where(rows == rows[0, 0, 0], 128, rows), "expected 0 to 127"),
        (lambda rows: rows.astype(np.int32) - 128, "expected 0 to 127"),
    ],
)
def test_what_is_no_record_is_refused(damage, message):
    with pytest.raises(ValueError, match=message):
        expert_record(damage(rows_of_vllm(7)), 7, SHAPE)


@pytest.mark.parametrize("text", [3, "?", encoded(np.arange(3))[:20], base64.b64encode(b"{}").decode()])
def test_what_is_no_array_is_refused(text):
    with pytest.raises(ValueError, match="experts"):
        decode_rows(text)


def test_a_pickle_in_place_of_an_array_is_not_loaded():
    with pytest.raises(ValueError, match="experts that are no array"):
        decode_rows(encoded(np.array([{}], dtype=object)))


def test_a_servers_answer_brings_the_record_and_a_server_without_them_stops_the_run():
    request, asked = GenerateRequest(0, 0, [5, 6], seed=3), {"sampling_params": {"seed": 3, "max_tokens": 5}}
    sampling, found = SamplingSettings(max_tokens=5, experts=True), answer(asked)
    (choice,) = found["choices"]
    tokens = 2 + len(choice["token_ids"])
    with pytest.raises(UnacceptableRequest, match=r'does not return the experts .* rollout.routing_replay = "old"'):
        read_answer(packed(found), request, sampling, str, SHAPE)
    rows = rows_of_vllm(tokens)
    choice["routed_experts"] = encoded(rows)
    json.dumps(found)
    assert np.array_equal(read_answer(packed(found), request, sampling, str, SHAPE).experts, rows[:, [0, 2, 3]])
    assert read_answer(packed(found), request, SamplingSettings(max_tokens=5), str, SHAPE).experts is None
    choice["routed_experts"] = encoded(rows[:-1])
    with pytest.raises(BadAnswer, match="shape"):
        read_answer(packed(found), request, sampling, str, SHAPE)


@pytest.mark.parametrize("replay", ["auto", "rollout", "old", "off"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_engine_is_started_to_return_experts_where_the_trainer_uses_them(tmp_path: Path, replay, device):
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_30B_A3B))
    rollout = RolloutConfig(routing_replay=replay)
    settings = EngineSettings(str(tmp_path), str(tmp_path), "bfloat16", rollout, 100, 0, device)
    arguments, wanted = engine_arguments(settings), replay in ("auto", "rollout")
    assert settings.records_experts is wanted
    assert arguments.get("enable_return_routed_experts", False) is (wanted and device == "cuda")
    assert ("scheduler_cls" in arguments) is (wanted and device == "cpu")
    worker = {("cpu", True): RECORDING_WORKER, ("cpu", False): CPU_WORKER}.get((device, wanted))
    assert arguments.get("worker_cls") == worker
    assert arguments["enable_prefix_caching"] is True  # vLLM's recording needs it
    assert ("--enable-return-routed-experts" in command_line(arguments)) is (wanted and device == "cuda")


def test_vllms_older_runner_is_refused_on_a_gpu_before_it_starts(tmp_path: Path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_30B_A3B))
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    for replay, device in (("old", "cuda"), ("auto", "cpu")):
        check_model(str(tmp_path), RolloutConfig(routing_replay=replay), 100, device)
    with pytest.raises(RolloutError, match=r'Unset it, or set rollout.routing_replay = "old"'):
        check_model(str(tmp_path), RolloutConfig(), 100, "cuda")


def test_a_width_that_no_layer_has_need_not_be_divided_among_an_engines_ranks(tmp_path: Path):
    folder = tmp_path / "config.json"
    folder.write_text(json.dumps({**QWEN3_30B_A3B, "intermediate_size": 6145}))
    check_model(str(tmp_path), RolloutConfig(tensor_parallel_size=2), 100, "cuda")
    folder.write_text(json.dumps({**QWEN3_30B_A3B, "intermediate_size": 6145, "mlp_only_layers": [1]}))
    with pytest.raises(RolloutError, match=r"intermediate_size \(6145\)"):
        check_model(str(tmp_path), RolloutConfig(tensor_parallel_size=2), 100, "cuda")


def test_a_response_without_experts_is_not_trained_in_silence():
    record = np.zeros((2, 1, 2), dtype=np.uint8)
    found = [Rollout(0, s, [5], [-1.0], "", "stop", 0, experts=record if s else None) for s in range(2)]

    def groups(rollouts):
        return [Group(Prompt("train:0", (), [3, 4], "", "exact"), [Attempt(r, Reward(0.0), False) for r in rollouts])]

    require_experts(groups(found[1:]))
    require_experts(groups([Rollout(0, 0, [], [], "", "stop", 0)]))  # nothing of it is trained
    with pytest.raises(UserError, match=r"1 of 2 responses came without the experts.*sample 0 of prompt 0"):
        require_experts(groups(found))


def test_experts_of_several_turns_are_those_of_the_first_computation():
    turns = [np.full((length, 1, 1), number, dtype=np.uint8) for number, length in enumerate((3, 7, 8))]
    assert experts_of_turns(turns)[:, 0, 0].tolist() == [0] * 3 + [1] * 4 + [2]
    assert experts_of_turns(turns[:1]) is not None and len(experts_of_turns(turns[:1])) == 3


def test_a_dense_model_has_nothing_to_replay():
    assert RolloutConfig().replay(0) == "off" and RolloutConfig().replay(128) == "rollout"
    assert RolloutConfig(routing_replay="old").replay(128) == "old"


def taught(prompt: int, response: int, teacher: int):
    return make_sample(
        "train:0", 0, list(range(1, prompt + 1)), [7] * response, [-0.5] * response, advantage=0.0,
        weights={"distill": 1.0}, teacher_ids=list(range(20, 20 + teacher)),
    )  # fmt: skip


@pytest.mark.parametrize("padding", [Padding(), Padding(sequence=4, row=8)])
def test_every_token_of_a_row_finds_its_experts_and_what_the_engine_never_computed_is_free(padding):
    samples = [taught(3, 4, 6), taught(2, 2, 5), taught(1, 3, 2)]
    records = [RNG.integers(0, 128, (s.student_length - 1, 3, 2)).astype(np.uint8) for s in samples]
    records[1] = None
    row = Row((0, 1, 2), sum(s.student_length for s in samples))
    (student,) = pack_rows([row], samples, padding=padding, experts=records)
    expected = torch.full((len(student.targets), 3, 2), FREE, dtype=torch.int16)
    for index, at in token_positions(row, samples, padding=padding):
        assert student.input_ids[at].tolist() == samples[index].student.token_ids.tolist()
        if records[index] is not None:
            expected[at[:-1]] = torch.from_numpy(records[index].astype(np.int16))
    assert torch.equal(student.experts, expected)
    (teacher,) = pack_rows([row], samples, padding=padding, stream="teacher", experts=records)
    expected = torch.full((len(teacher.targets), 3, 2), FREE, dtype=torch.int16)
    for index, at in token_positions(row, samples, padding=padding, stream="teacher"):
        if records[index] is not None:
            own = records[index][len(samples[index].student.prompt_ids) :].astype(np.int16)
            expected[at[-1 - len(own) : -1]] = torch.from_numpy(own)
    assert torch.equal(teacher.experts, expected)
    assert pack_rows([row], samples, padding=padding)[0].experts is None
    assert pack_rows([Row((), 0)], samples, padding=padding, experts=records)[0].experts is None


@pytest.mark.parametrize(("agree", "shared"), [(20, 19), (12, 12), (5, 0)])  # fewer than 8 tokens are not shared
def test_a_prompt_is_shared_as_far_as_the_engine_used_the_same_experts(agree, shared):
    prompt = Prompt("train:0", (), list(range(1, 21)), "", "exact")
    base = RNG.integers(0, 128, (20, 3, 2)).astype(np.uint8)
    attempts = []
    for sample in range(3):
        record = RNG.integers(0, 128, (24, 3, 2)).astype(np.uint8)
        record[: agree if sample == 2 else 20] = base[: agree if sample == 2 else 20]
        if agree < 20 and sample == 2:
            record[agree] = base[agree] + 1
        rollout = Rollout(0, sample, [7] * 5, [-1.0] * 5, "", "stop", 0, experts=record)
        attempts.append(Attempt(rollout, Reward(float(sample)), sample > 0))
    group = Group(prompt, attempts)
    route([group], algorithm("grpo"), seed=0, iteration=1, teacher_prompt=None)
    samples, padding = group.samples, Padding(shares=True)
    (row,) = pack_rows([Row((0, 1, 2), 0)], samples, padding=padding, experts=[s.experts for s in samples])
    assert len(row.targets) == 3 * 25 - 2 * shared
    for index, at in token_positions(Row((0, 1, 2), 0), samples, padding=padding):
        assert row.input_ids[at].tolist() == samples[index].student.token_ids.tolist()
        assert torch.equal(row.experts[at[:-1]], torch.from_numpy(samples[index].experts.astype(np.int16)))


def top2(scores, topk, num_groups=None, group_topk=None):
    return scores.topk(topk, 1)


def test_a_router_uses_each_rows_experts_also_when_rows_are_computed_again_in_another_order():
    """As a pipeline does: two rows forward, then backward, with recomputation in between."""
    scores = torch.tensor([[4.0, 3.0, 2.0, 1.0]] * 2, requires_grad=True)
    replay = RowReplay()
    rows = [torch.tensor([[1, 0], [2, 3]], dtype=torch.int16), None, torch.tensor([[FREE] * 2] * 2, dtype=torch.int16)]
    replay.begin(rows, record=True)
    with torch.no_grad():
        first = [replay.get_replay_topk(scores, 2, default_compute_topk=top2)[1] for _ in range(2)]
    values, again = replay.get_replay_topk(scores, 2, default_compute_topk=top2)  # row 0, recomputed
    assert again.tolist() == first[0].tolist() == [[1, 0], [2, 3]] and first[1].tolist() == [[0, 1]] * 2
    values.sum().backward()
    assert scores.grad.tolist() == [[1, 1, 0, 0], [0, 0, 1, 1]]  # through the gate's values
    with pytest.raises(AssertionError, match="called"):
        replay.end()  # a row is missing
    with torch.no_grad():
        replay.get_replay_topk(scores, 2, default_compute_topk=top2)
    for _ in range(2):
        replay.get_replay_topk(scores, 2, default_compute_topk=top2)
    assert [row.tolist() for row in replay.compared] == [[SAME, DIFFERENT], [NOT_REPLAYED] * 2, [NOT_REPLAYED] * 2]
    replay.end()
    assert torch.equal(replay.get_replay_topk(scores, 2, default_compute_topk=top2)[1], torch.tensor([[0, 1]] * 2))


def test_padding_goes_to_all_experts_in_turn():
    scores = torch.tensor([[4.0, 3.0, 2.0, 1.0]] * 9)
    replay = RowReplay()
    replay.begin([], padding=[torch.arange(9) > 0, None])
    values, chosen = replay.get_replay_topk(scores, 2, default_compute_topk=top2)
    assert chosen[0].tolist() == [0, 1] and torch.equal(values, scores.gather(1, chosen))
    assert chosen[1:].flatten().bincount().tolist() == [4] * 4 and bool((chosen[:, 0] != chosen[:, 1]).all())
    assert replay.padded == 8
    assert replay.get_replay_topk(scores, 2, default_compute_topk=top2)[1].tolist() == [[0, 1]] * 9
    assert replay.padding is None and replay.padded == 0
    replay.end()


@pytest.mark.parametrize("replay", ["auto", "off"])
def test_the_alarm_for_a_mismatch_names_the_experts(replay):
    from tests.unit.test_start_check import configured

    config = configured(rollout__routing_replay=replay)
    (watch,) = [watch for watch in watches(config) if watch.name == "mismatch_warned"]
    metrics = {"rollout_corr/logprob_diff_mean": 0.2}
    if replay == "auto":
        metrics["rollout_corr/experts_differ"] = 0.25
    text, is_warning = watch.look(metrics)
    assert is_warning
    assert ("In 25% of the tokens they would choose different experts" in text) is (replay == "auto")
    assert ('rollout.routing_replay = "off", the experts that they choose' in text) is (replay == "off")
    assert "again" in watch.look({"rollout_corr/logprob_diff_mean": 0.001})[0]
