"""Our backend of vLLM's weight-transfer API: how a server's workers receive a publish.

POST /init_weight_transfer_engine   join the process group of the trainer's rank 0
POST /start_weight_update           nothing to do yet
POST /update_weights                receive, load, check and repack all weights
POST /finish_weight_update          the server's weight version is the new one
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from megatron_srpo.bridge.weight_stream import Group, GroupAddress, WorkerReport, receive_stream
from megatron_srpo.config import LoraConfig
from megatron_srpo.rollout.vllm.adapter_loader import AdapterLoader
from megatron_srpo.rollout.vllm.loaders import AnyLoader, make_loader


@dataclass
class JoinInfo(WeightTransferInitInfo):
    """The fields of a weight_stream.GroupAddress, as a mapping because it comes as JSON."""

    group: Mapping[str, Any]


@dataclass
class PublishInfo(WeightTransferUpdateInfo):
    """One publish. Workers store their report under the key `report`; with `verify` it has checksums."""

    report: str
    verify: bool = False
    adapters: Mapping[str, Any] | None = None  # the [lora] section if the publish has adapters alone


class WeightReceiver(WeightTransferEngine[JoinInfo, PublishInfo]):
    """Receives a whole publish in one update. It reports errors through the store of the group, with their full
    text."""

    init_info_cls, update_info_cls = JoinInfo, PublishInfo
    supports_draft_weight_update = False
    _group: Group | None = None
    _loader: AnyLoader | None = None

    @property
    def _rank(self) -> int:
        parallel = self.parallel_config
        return parallel.data_parallel_index * parallel.world_size + parallel.rank

    def init_transfer_engine(self, init_info: JoinInfo) -> None:
        self.shutdown()
        self._group = Group(GroupAddress(**init_info.group), 1 + self._rank, self.device)

    def start_weight_update(self) -> None:
        """All work is done in the update, so that a failure there leaves the engine in order."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def receive_weights(self, update_info: PublishInfo) -> None:
        """Raises what the loader raises, but only after the whole stream was received: the sender must not wait for
        this worker."""
        assert self._group is not None, "start_weight_update before init_weight_transfer_engine"
        if self._loader is None:
            self._loader = self._make_loader(update_info.adapters)
        stream, error = receive_stream(self._group, self.device), None
        report: WorkerReport
        try:
            self._loader.begin(verify=update_info.verify)
            self._loader.load(stream)
            self._loader.finish()
            report = {"checksums": self._loader.report()}
        except Exception as failure:
            error = failure
            for _ in stream:
                pass
            report = {"error": f"{type(error).__name__}: {error}"}
        self._group.report(f"{update_info.report}/{self._rank}", json.dumps(report))
        if error is not None:
            raise error

    def _make_loader(self, adapters: Mapping[str, Any] | None) -> AnyLoader:
        settings = None if adapters is None else LoraConfig.model_validate(adapters)
        loader = make_loader(self.model, self.vllm_config, settings)
        if isinstance(loader, AdapterLoader):
            loader.outlive_reset()
        return loader

    def finish_weight_update(self) -> None: ...

    def shutdown(self) -> None:
        self._group = None
