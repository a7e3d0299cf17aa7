"""Memory that goes from hand to hand: taken again when nothing is in it, and never before."""

import torch

from megatron_srpo.bridge.buffers import Buffers


def where(tensor):
    return tensor.data_ptr()


def test_a_buffer_is_taken_again_when_no_tensor_is_in_it():
    buffers = Buffers(torch.device("cpu"))
    first = buffers.take(100)
    address = where(first)
    part = first[:40].view(torch.float32).view(2, 5)
    del first
    assert where(buffers.take(100)) != address  # `part` is in it
    kept = part.t()
    del part
    assert where(buffers.take(100)) != address
    del kept
    assert address in {where(held) for held in (buffers.take(100), buffers.take(100))}


def test_an_idle_buffer_that_is_too_small_makes_room_for_a_larger_one_and_a_used_one_stays():
    buffers = Buffers(torch.device("cpu"))
    used, idle = buffers.take(10), buffers.take(20)
    used.fill_(7)
    del idle
    large = buffers.take(200)
    assert sorted(memory.size for memory in buffers._memory) == [10, 200]
    large.fill_(1)
    assert used.eq(7).all()
    address = where(large)
    del large
    assert where(buffers.take(50)) == address


def test_of_many_that_were_used_at_once_one_and_a_spare_are_kept():
    buffers = Buffers(torch.device("cpu"))
    held = [buffers.take(100 + i) for i in range(10)]
    assert len(buffers._memory) == 10
    del held
    buffers.take(50)
    assert [memory.size for memory in buffers._memory] == [109, 100]


def test_a_tensor_outlives_the_buffers():
    held = Buffers(torch.device("cpu")).take(1000).fill_(3)
    others = [torch.empty(1000, dtype=torch.uint8).fill_(9) for _ in range(10)]
    assert held.eq(3).all() and len(others) == 10
