"""Parcels: pickles whose arrays are copied once."""

import io
from array import array

import numpy as np

from megatron_srpo.batching import plan_batch
from megatron_srpo.core.records import Sample, Stream
from megatron_srpo.mcore.parcel import read_parcel, write_parcel


def _samples():
    prompt, rows = array("i", [9, 8, 7]), []
    for number in range(3):
        response = array("i", range(number * 5))
        trained = np.arange(number * 5) % 2 == 0
        streams = [Stream(start, response, trained) for start in (prompt, array("i", [1, number]))]
        logprobs = np.linspace(-1, 0, int(trained.sum()), dtype=np.float32)
        rows.append(Sample("train:0", number, streams[0], logprobs, 0.5, {"policy": 1.0}, teacher=streams[1]))
    return rows


def _through(value, box=None):
    return read_parcel(memoryview(bytearray(write_parcel(box or io.BytesIO(), value))))


def test_what_goes_in_comes_out_with_what_it_shares():
    sent = _samples()
    found = _through(sent)
    assert len({id(sample.student.prompt_ids) for sample in found}) == 1
    for mine, theirs in zip(sent, found, strict=True):
        assert theirs.student.response_ids is theirs.teacher.response_ids
        assert theirs.student.trained is theirs.teacher.trained
        for stream in ("student", "teacher"):
            assert np.array_equal(theirs.stream(stream).token_ids, mine.stream(stream).token_ids)
            assert np.array_equal(theirs.stream(stream).targets, mine.stream(stream).targets)
        assert np.array_equal(theirs.rollout_logprobs, mine.rollout_logprobs)
        assert theirs.rollout_logprobs.flags.aligned and theirs.rollout_logprobs.flags.writeable
        assert (theirs.uid, theirs.sample, theirs.weights) == (mine.uid, mine.sample, mine.weights)


def test_a_smaller_parcel_in_the_same_memory_has_nothing_of_the_one_before():
    box = io.BytesIO()
    assert len(_through(_samples() * 50, box)) == 150
    assert _through({"tokens": array("f", [0.5])}, box) == {"tokens": array("f", [0.5])}
    assert _through([], box) == []


def test_planning_computes_no_positions_which_would_fill_the_memory_of_rank_0():
    samples = _samples()
    plan_batch([samples], dp_size=1, max_tokens=64)
    assert not [sample for sample in samples if "targets" in vars(sample.student) or "targets" in vars(sample.teacher)]


def test_positions_that_were_computed_do_not_travel():
    samples = _samples()
    size = len(write_parcel(io.BytesIO(), samples))
    assert all(len(sample.student.targets) == sample.length for sample in samples)
    assert len(write_parcel(io.BytesIO(), samples)) == size
