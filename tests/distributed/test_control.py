"""The control channel on real gloo ranks: each model copy gets its own part of what the driver has."""

from array import array
from types import SimpleNamespace

from tests.distributed_harness import run_distributed


def _dealt(dp_of_rank):
    import torch.distributed as dist

    from megatron_srpo.mcore.control import Control

    rank = dist.get_rank()
    topology = SimpleNamespace(
        rank=rank, world_size=len(dp_of_rank), is_driver=rank == 0, dp_rank=dp_of_rank[rank],
        control_group=dist.new_group(backend="gloo"),
    )  # fmt: skip
    control, made = Control(topology), []
    take = (lambda: control.deal(part)) if rank == 0 else control.receive_share

    def part(dp_rank):
        made.append(dp_rank)
        return {"rank": dp_rank, "tokens": array("i", range(dp_rank * 1000))}

    first = take()
    return first, take() == first, made


def test_every_rank_of_a_model_copy_gets_its_data_parallel_ranks_part_made_once_on_the_driver():
    dp_of_rank = [0, 1, 2, 0, 1, 2]  # two pipeline stages of three copies: a copy's ranks are not neighbours
    found = run_distributed(_dealt, 6, dp_of_rank)
    for rank, (part, again, made) in enumerate(found):
        dp_rank = dp_of_rank[rank]
        assert part == {"rank": dp_rank, "tokens": array("i", range(dp_rank * 1000))} and again
        assert sorted(made) == ([0, 0, 1, 1, 2, 2] if rank == 0 else [])


def _told():
    import torch.distributed as dist

    from megatron_srpo.mcore.control import Control

    rank = dist.get_rank()
    group = dist.new_group(backend="gloo")
    control = Control(SimpleNamespace(rank=rank, world_size=2, is_driver=rank == 0, control_group=group))
    heard = [control.share(lambda: 7)]
    if rank == 0:
        control.broadcast("hello")
    else:
        heard.append(control.receive())
    try:
        if rank == 0:
            with control.failing_together():
                raise ValueError("no more prompts")
        else:
            control.receive()
    except ValueError as error:
        heard.append(str(error))
    return heard


def test_what_fails_on_rank_0_is_raised_where_the_others_receive():
    assert run_distributed(_told, 2) == [[7, "no more prompts"], [7, "hello", "no more prompts"]]
