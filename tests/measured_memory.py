"""What a policy really holds, in bytes: buffers, optimizer state, and activations that autograd keeps alive."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Held:
    """A saved tensor; its bytes are free again when autograd lets go of it."""

    def __init__(self, tensor: torch.Tensor, key: int, owner: SavedBytes) -> None:
        self.tensor, self._key, self._owner = tensor, key, owner

    def __del__(self) -> None:
        self._owner.release(self._key)


class SavedBytes:
    """Counts the storages that autograd keeps for backward passes, each once, and their peak; `ignored` are the
    parameters'."""

    def __init__(self, ignored: set[int]) -> None:
        self._ignored, self._uses, self._size = ignored, Counter(), {}
        self.live = self.peak = 0

    def pack(self, tensor: torch.Tensor) -> Any:
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key in self._ignored:
            return tensor
        if not self._uses[key]:
            self._size[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
        self._uses[key] += 1
        return _Held(tensor, key, self)

    def release(self, key: int) -> None:
        self._uses[key] -= 1
        if not self._uses[key]:
            self.live -= self._size[key]

    @staticmethod
    def unpack(held: Any) -> torch.Tensor:
        return held.tensor if isinstance(held, _Held) else held

    def watching(self) -> Any:
        return torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack)


def nbytes(tensors: Any) -> int:
    """Of all storages behind the tensors, each once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def measured(model: Any, settings: dict, rows: int, tokens: int) -> dict[str, Any]:
    """One real train step of `rows` rows of `tokens` tokens (two sequences each) on this rank; `settings` are sections
    of the configuration. Returns bytes by line, and where the rank stands."""
    from megatron_srpo.bridge import load_weights, read_config
    from megatron_srpo.config import Config
    from megatron_srpo.core.tensors import PackedBatch
    from megatron_srpo.losses import LinearHead
    from megatron_srpo.mcore import groups
    from megatron_srpo.mcore.device import choose_device
    from megatron_srpo.mcore.policy import Policy

    given = {"model": {"path": str(model), **settings.get("model", {})}, "parallel": settings.get("parallel", {})}
    given["lora"] = settings.get("lora", {})
    config = Config.model_validate({**given, "data": {"train": "unused"}})
    path = choose_device("auto", 0)
    topology = groups.initialize(config.parallel, path, seed=1, timeout_minutes=2)
    load = partial(load_weights, hf_dir=model, lora=config.lora)
    policy = Policy(config, read_config(model), topology, path, load, total_steps=10)

    def row(number: int) -> PackedBatch:
        ids = torch.randint(0, 101, (tokens,), generator=torch.Generator().manual_seed(number))
        bounds = torch.tensor([0, tokens // 2, tokens], dtype=torch.int32)
        zeros = torch.zeros(tokens)
        return PackedBatch(ids, ids.roll(-1), torch.arange(tokens), bounds, torch.ones(tokens), *[zeros] * 3)

    def loss(head: Any, batch: PackedBatch) -> Any:
        return -LinearHead(**vars(head)).gather_logprobs(batch.targets[:, None])[0].sum() / tokens, {}

    parameters = {p.untyped_storage().data_ptr() for piece in policy.model for p in piece.parameters()}
    saved = SavedBytes(parameters)
    with saved.watching():
        policy.train_step([row(number) for number in range(rows)], loss)
    buffers = [b for piece in policy.model for b in (*piece.buffers, *piece.expert_parallel_buffers)]
    shards = list(policy.optimizer.shards())
    state = [t for shard in shards for t in (shard.main, *shard.state.values()) if t.numel() > 1]
    result = {
        "stage": topology.pp_rank,
        "weights": nbytes(p for piece in policy.model for p in piece.parameters()),
        "gradients": nbytes(b.grad_data for b in buffers),
        "optimizer": nbytes(t for t in state if t.untyped_storage().data_ptr() not in parameters),
        "shadow": nbytes(policy.shadows["teacher"].slices),
        "activations": saved.peak,
        "left": saved.live,
    }
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    return result


class HostPeak(TorchDispatchMode):
    """Inside the block it counts the bytes of tensors that operations make in host memory: `peak` is the largest sum
    that was alive at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: list[tuple[StorageWeakRef, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage.device.type == "cpu" and storage.nbytes() and storage.data_ptr() not in given:
                self._alive = [(other, size) for other, size in self._alive if not other.expired()]
                self._alive.append((StorageWeakRef(storage), storage.nbytes()))
                self.peak = max(self.peak, sum(size for _, size in self._alive))
        return result


def _tensors(values: Any) -> list[torch.Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]
