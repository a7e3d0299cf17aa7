"""peft's adapter folder (adapter_config.json, adapter_model.safetensors): written from an export of the adapters, and
read into their shards."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_srpo.bridge.base_checksum import base_checksum
from megatron_srpo.bridge.errors import BridgeError
from megatron_srpo.bridge.load import WeightFolder, load_hf_weights, read_config
from megatron_srpo.bridge.rules import TensorSlice, shape_of
from megatron_srpo.bridge.table import WeightTable, weight_table
from megatron_srpo.config import LoraConfig
from megatron_srpo.core.atomic import atomic_folder
from megatron_srpo.core.json_types import read_json
from megatron_srpo.core.tensors import ModelShards
from megatron_srpo.families import HfConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # peft's, before the name of the module in the base model
# Keys of adapter_config.json that do not change what a plain adapter computes, or that are compared below.
HARMLESS = {
    "alpha", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying", "eva_config",
    "inference_mode", "init_lora_weights", "layers_pattern", "loftq_config", "lora_alpha", "lora_dropout",
    "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "revision", "runtime_config",
    "target_modules", "task_type", "use_rslora",
}  # fmt: skip
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")  # other starts change the base weights as well


def write_adapter_folder(
    items: Iterable[tuple[str, torch.Tensor]], out_dir: str | Path, settings: LoraConfig, base: str
) -> Path:
    """Write an export of the adapters as a folder that peft and `vllm serve --enable-lora` load. `base` is the path of
    the base model. Returns `out_dir`.

    One rank calls this; all others consume their own iterator. On an error it consumes the iterator before it raises.
    The folder appears complete or not at all. Raises BridgeError when `out_dir` is no model folder.
    """
    target, stream = Path(out_dir), iter(items)
    try:
        _refuse_bad_target(target)
        with atomic_folder(target.resolve() if target.is_symlink() else target) as aside:
            tensors = {PREFIX + name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in stream}
            modules = sorted({name.rsplit(".", 3)[1] for name in tensors})
            text = json.dumps(adapter_config(settings, modules, base), indent=2) + "\n"
            (aside / CONFIG).write_text(text, encoding="utf-8")
            save_file(tensors, aside / WEIGHTS, metadata={"format": "pt"})
    except BaseException:
        for _ in stream:
            pass
        raise
    return target


def _refuse_bad_target(target: Path) -> None:
    known = [(target / name).exists() for name in (CONFIG, "config.json")]
    if target.exists() and not (target.is_dir() and (any(known) or not any(target.iterdir()))):
        raise BridgeError(f"{target} exists and is no model folder: it is not replaced. Choose another folder.")


def adapter_config(settings: LoraConfig, modules: list[str], base: str) -> dict[str, Any]:
    """adapter_config.json. `modules` are peft's names of the projections that have an adapter."""
    whole = int(settings.alpha) if settings.alpha == int(settings.alpha) else settings.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": settings.rank,
        "lora_alpha": whole,
        "lora_dropout": settings.dropout,
        "use_rslora": settings.rslora,
        "target_modules": modules,
        "bias": "none",
        "modules_to_save": None,
        "fan_in_fan_out": False,
        "use_dora": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }


def read_adapter_config(folder: str | Path) -> dict[str, Any]:
    """adapter_config.json of a plain LoRA adapter. Raises BridgeError for a folder without one, and for an adapter that
    has more than the two factors of each projection."""
    path = Path(folder) / CONFIG
    try:
        config = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        raise BridgeError(f"{folder} has no {CONFIG}: expected a folder of a peft adapter (lora.path).") from None
    except ValueError as error:
        raise BridgeError(f"{path} is not valid JSON ({error}): fetch the adapter again.") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise BridgeError(f'{path}: peft_type = {kind!r}; expected "LORA".')
    problems = [f"{key} = {value!r}" for key, value in config.items() if key not in HARMLESS and value]
    if config.get("bias", "none") != "none":
        problems.append(f"bias = {config['bias']!r}")
    if config.get("init_lora_weights", True) not in PLAIN_STARTS:
        problems.append(f"init_lora_weights = {config['init_lora_weights']!r}")
    if problems:
        raise BridgeError(
            f"{path}: only plain adapters of linear layers can be trained, and this one has {', '.join(problems)}. "
            "Merge it into its base model (peft's merge_and_unload), and train a new adapter on that model."
        )
    return config


def check_adapter_config(folder: str | Path, settings: LoraConfig) -> None:
    """Raise BridgeError unless the adapter has the rank and scale of the [lora] section."""
    config = read_adapter_config(folder)
    theirs = {"lora.rank": config.get("r"), "lora.alpha": config.get("lora_alpha"),
              "lora.rslora": bool(config.get("use_rslora"))}  # fmt: skip
    ours = {"lora.rank": settings.rank, "lora.alpha": settings.alpha, "lora.rslora": settings.rslora}
    wrong = [f"{key} = {theirs[key]!r} (this run: {ours[key]!r})" for key in ours if theirs[key] != ours[key]]
    if wrong:
        raise BridgeError(
            f"lora.path = {str(folder)!r}: the adapter has {', '.join(wrong)}. Set these keys to its own."
        )


def check_adapter(folder: str | Path, hf_config: HfConfig, settings: LoraConfig) -> None:
    """Raise BridgeError unless an adapter has the [lora] section's rank, scale and projections on this model. It reads
    headers only."""
    check_adapter_config(folder, settings)
    table = weight_table(hf_config, hf_config["vocab_size"])
    files = AdapterFiles(folder)
    with files:
        _check_names(files, table, settings)
        for name in files.names:
            shape = shape_of(files.source(name))
            if shape[0 if name.endswith("lora_A.weight") else 1] != settings.rank:
                raise BridgeError(f"{name} in {folder} has shape {list(shape)}, and lora.rank = {settings.rank}.")


class AdapterFiles(WeightFolder):
    """The tensors of an adapter folder by peft's names without their prefix."""

    def _index(self) -> Mapping[str, str]:
        if not (self.folder / WEIGHTS).is_file():
            cure = " It has adapter_model.bin, a pickle, which is not read: save it with safe_serialization=True."
            found = (self.folder / "adapter_model.bin").exists()
            raise BridgeError(f"{self.folder} has no {WEIGHTS}: expected a peft adapter.{cure if found else ''}")
        return dict.fromkeys(self.stored(WEIGHTS), WEIGHTS)

    @property
    def names(self) -> set[str]:
        return {name.removeprefix(PREFIX) for name in self._file_of}

    def source(self, name: str) -> TensorSlice:
        return super().source(PREFIX + name)


def load_weights(shards: ModelShards, hf_dir: str | Path, lora: LoraConfig) -> str | None:
    """Fill this rank's parameters from a Hugging Face folder, and with lora.path its adapters from a peft folder.
    Returns the checksum of the base weights if there are adapters. Collective then."""
    load_hf_weights(shards, hf_dir)
    if not lora.rank:
        return None
    hf_config = read_config(hf_dir)
    if lora.path:
        load_adapter(shards, hf_config, lora.path, lora)
    return base_checksum(shards, hf_config)


@torch.no_grad()
def load_adapter(shards: ModelShards, hf_config: HfConfig, folder: str | Path, settings: LoraConfig) -> None:
    """Fill this rank's adapters from a peft folder, cast to their dtype, without communication. Raises BridgeError,
    before it changes anything, when rank, scale, projections or shapes are not those of the run."""
    check_adapter_config(folder, settings)
    table = weight_table(hf_config, shards.padded_vocab_size)
    files = AdapterFiles(folder)
    with files:
        _check_names(files, table, settings)
        read = {name: _read(shards, table, files, name) for name in shards.adapters}
    for name, adapter in shards.adapters.items():
        adapter.copy_(read[name])


def _check_names(files: AdapterFiles, table: WeightTable, settings: LoraConfig) -> None:
    wanted = table.adapter_names(settings.projections, experts=settings.experts)
    extra, missing = sorted(files.names - wanted), sorted(wanted - files.names)
    if extra or missing:
        what = f"has {extra[0]!r}, which is no" if extra else f"lacks {missing[0]!r}, a"
        raise BridgeError(
            f"lora.path = {str(files.folder)!r}: the adapter {what} factor of the projections that lora.targets = "
            f"{settings.targets} names in this model. Set lora.targets to the adapter's own projections, and check "
            "that it was trained on this model."
        )


def _read(shards: ModelShards, table: WeightTable, files: AdapterFiles, name: str) -> torch.Tensor:
    mapped, shape = table.lookup(name), tuple(shards.adapters[name].shape)
    expert = mapped.expert is not None
    rank, size = (shards.etp_rank, shards.etp_size) if expert else (shards.tp_rank, shards.tp_size)
    sources = [files.source(hf_name) for hf_name in mapped.hf_names]
    for source, want in zip(sources, mapped.rule.hf_shapes(shape, size), strict=True):
        if shape_of(source) != want:
            raise BridgeError(
                f"{mapped.hf_names[0]} in {files.folder} has shape {list(shape_of(source))}, and {list(want)} fits "
                "model.path and lora.rank: the adapter is of another model or rank."
            )
    shard = mapped.rule.to_shard(sources, rank, size)
    if not torch.isfinite(shard).all():
        raise BridgeError(
            f"{mapped.hf_names[0]} in {files.folder} has values that are not finite: the adapter is broken."
        )
    return shard
