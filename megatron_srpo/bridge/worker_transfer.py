"""The engine's half of a publish to a server: our backend of vLLM's weight-transfer API, in its workers.

POST /init_weight_transfer_engine   join the driver's group
POST /start_weight_update           give the layers their loading form back
POST /update_weights                receive, load, check and repack everything
POST /finish_weight_update          the version is the new one
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from megatron_srpo.bridge.wire import Group, Meeting, receive_stream
from megatron_srpo.bridge.worker import PublishExtension, WeightLoader

BACKEND = "megatron_srpo"


@dataclass
class JoinInfo(WeightTransferInitInfo):
    """See wire.Meeting; a dict, because it comes as JSON."""

    meeting: dict[str, Any]


@dataclass
class PublishInfo(WeightTransferUpdateInfo):
    """One publish. Workers leave their report in the store under `report`; checksums in it with `verify`."""

    report: str
    verify: bool = False


class StreamedTransferEngine(WeightTransferEngine[JoinInfo, PublishInfo]):
    """Receives a whole publish in one update. What went wrong is reported through the store, word for word."""

    init_info_cls, update_info_cls = JoinInfo, PublishInfo
    supports_draft_weight_update = False
    _group: Group | None = None
    _loader: WeightLoader | None = None

    @property
    def _rank(self) -> int:
        parallel = self.parallel_config
        return parallel.data_parallel_index * parallel.world_size + parallel.rank

    def init_transfer_engine(self, init_info: JoinInfo) -> None:
        self.shutdown()
        self._group = Group(Meeting(**init_info.meeting), 1 + self._rank, self.device)

    def start_weight_update(self) -> None:
        """Everything is done in the update: a failure there leaves the engine in order."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def receive_weights(self, update_info: PublishInfo) -> None:
        """Raises what the loader raises, after the driver has said all it has to say: it must not wait for us."""
        assert self._group is not None, "start_weight_update before init_weight_transfer_engine"
        if self._loader is None:
            self._loader = WeightLoader(self.model, self.vllm_config)
        stream, error, report = receive_stream(self._group, self.device), None, {}
        try:
            self._loader.begin(verify=update_info.verify)
            self._loader.load(stream)
            self._loader.finish()
            report = {"checksums": self._loader.report()}
        except Exception as failure:
            error = failure
            self._drain(stream)
            report = {"error": f"{type(error).__name__}: {error}"}
        self._group.report(f"{update_info.report}/{self._rank}", json.dumps(report))
        if error is not None:
            raise error

    @staticmethod
    def _drain(stream: Any) -> None:
        for _ in stream:
            pass

    def finish_weight_update(self) -> None: ...

    def shutdown(self) -> None:
        self._group = None


class ServerExtension(PublishExtension):
    """`worker_extension_cls` of servers. vLLM imports this module in every worker before the model is there, and so the
    backend is known when it is asked for."""


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, StreamedTransferEngine)
