"""Loads a Hugging Face folder into Megatron shards. It reads only the slices that this rank needs."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_srpo.bridge.errors import BridgeError
from megatron_srpo.bridge.rules import TensorSlice, shape_of
from megatron_srpo.bridge.table import WeightTable, weight_table
from megatron_srpo.config.model_folder import two_sets_of_weights
from megatron_srpo.core.errors import nearest
from megatron_srpo.core.json_types import read_json, read_weight_map
from megatron_srpo.core.tensors import ModelShards
from megatron_srpo.families.family import EMBEDDING, OUTPUT

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names of the dtypes in which a weight may be stored
IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)  # computed buffers that old checkpoints carry
COMPARED_ROWS = 8192  # of head and embedding at a time


def read_config(folder: str | Path) -> dict[str, Any]:
    """The folder's config.json. Raises BridgeError when it is missing or not a JSON object."""
    path = Path(folder) / "config.json"
    try:
        config = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        raise BridgeError(
            f"{folder} has no config.json: expected a Hugging Face model folder (config.json, safetensors, tokenizer)."
        ) from None
    except ValueError as error:
        raise BridgeError(f"{path} is not valid JSON ({error}): fetch the model again.") from None
    if not isinstance(config, dict):
        raise BridgeError(f"{path} holds no JSON object: fetch the model again.")
    return config


class WeightFolder:
    """The tensors of a Hugging Face folder by name, in one or several safetensors files; a context manager."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._files = ExitStack()
        self._open: dict[str, safe_open] = {}
        self._file_of = self._index()

    def __enter__(self) -> WeightFolder:
        return self

    def __exit__(self, *error: object) -> None:
        self._files.close()
        self._open.clear()

    @property
    def names(self) -> set[str]:
        return set(self._file_of)

    @property
    def files(self) -> list[str]:
        """The names of the files with tensors, sorted."""
        return sorted(set(self._file_of.values()))

    def stored(self, file: str) -> list[str]:
        """The names of all tensors in a file, whether or not the index names them."""
        return list(self._handle(file).keys())

    def source(self, name: str) -> TensorSlice:
        """A slice of one tensor. Nothing is read until it is indexed."""
        if name not in self._file_of:
            raise BridgeError(
                f"{self.folder} has no tensor {name!r}, which config.json implies.{nearest(name, self._file_of)} "
                "Is the download complete, and is the config.json of this model?"
            )
        try:
            source = self._handle(self._file_of[name]).get_slice(name)
        except SafetensorError as error:
            raise BridgeError(
                f"{self.folder / self._file_of[name]}: cannot read {name!r} ({error}): index and file disagree; fetch "
                "the model again."
            ) from None
        if source.get_dtype() not in FLOATS:
            raise BridgeError(
                f"{name} in {self.folder} is stored as {source.get_dtype()}: expected one of {', '.join(FLOATS)}. "
                "Quantised weights cannot be trained: use the original model."
            )
        return source

    def _handle(self, file: str) -> safe_open:
        if file not in self._open:
            path = self.folder / file
            if not path.is_file():  # nor a named pipe, which would never end
                raise BridgeError(f"{self.folder} lacks {file}, which {INDEX} names: the download is incomplete.")
            try:
                self._open[file] = self._files.enter_context(safe_open(path, framework="pt", device="cpu"))
            except SafetensorError as error:
                raise BridgeError(f"{path} is not a complete safetensors file ({error}): fetch it again.") from None
        return self._open[file]

    def _index(self) -> Mapping[str, str]:
        """Tensor name → file name."""
        if not self.folder.is_dir():
            raise BridgeError(f"{self.folder} is not a folder: expected a Hugging Face model folder (model.path).")
        ambiguous = two_sets_of_weights(self.folder)
        if ambiguous:
            raise BridgeError(f"{self.folder} {ambiguous}")
        if (self.folder / INDEX).exists():
            try:
                return read_weight_map(self.folder / INDEX)
            except ValueError:
                raise BridgeError(
                    f'{self.folder / INDEX} is damaged: expected {{"weight_map": {{tensor: file}}}}; fetch it again.'
                ) from None
        single = self.folder / SINGLE
        files = [single] if single.exists() else sorted(self.folder.glob("*.safetensors"))
        if not files:
            raise BridgeError(self._no_weights())
        found: dict[str, str] = {}
        for file in files:
            for name in self.stored(file.name):
                if name in found:
                    raise BridgeError(
                        f"{self.folder} has {name!r} in both {found[name]} and {file.name}: remove the file that is "
                        "not of this model."
                    )
                found[name] = file.name
        return found

    def _no_weights(self) -> str:
        pickled = sorted(path.name for suffix in ("bin", "pt", "pth") for path in self.folder.glob(f"*.{suffix}"))
        if pickled:
            return (
                f"{self.folder} has its weights only as {pickled[0]}: expected safetensors. Convert them: "
                "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)."
            )
        return f"{self.folder} has no weights: expected {SINGLE}, or {INDEX} and the files that it names."


def check_names(folder: WeightFolder, table: WeightTable) -> None:
    """Refuse a folder with tensors that no rule reads, because the model would be trained without them."""
    known = table.hf_names()
    extra = sorted(name for name in folder.names - known if not name.endswith(IGNORED_SUFFIXES))
    if extra:
        raise BridgeError(
            f"{folder.folder} has {len(extra)} tensor(s) that family {table.family.name!r} with {table.shape.layers} "
            f"layers does not know, the first is {extra[0]!r}.{nearest(extra[0], known)} Training without them would "
            "be wrong: check config.json (num_hidden_layers, architectures, attention_bias, mlp_only_layers)."
        )
    for file in folder.files:
        stray = sorted(n for n in set(folder.stored(file)) - folder.names if not n.endswith(IGNORED_SUFFIXES))
        if stray:
            raise BridgeError(
                f"{folder.folder / file} holds {stray[0]!r}, which {INDEX} does not name: index and file are of "
                "different downloads; fetch the model again."
            )
    _refuse_own_head(folder, table)


def has_own_head(folder: WeightFolder, table: WeightTable) -> bool:
    """Whether a folder of a model with a tied head stores a head that differs from the embedding."""
    (head,), (embedding,) = table.line_names(OUTPUT), table.line_names(EMBEDDING)
    if not table.shape.tied or head not in folder.names:
        return False
    mine, tied = folder.source(head), folder.source(embedding)
    if shape_of(mine) != shape_of(tied):
        return True
    starts = range(0, shape_of(mine)[0], COMPARED_ROWS)
    return not all(torch.equal(mine[i : i + COMPARED_ROWS], tied[i : i + COMPARED_ROWS]) for i in starts)


def _refuse_own_head(folder: WeightFolder, table: WeightTable) -> None:
    if has_own_head(folder, table):
        raise BridgeError(
            f"{folder.folder}: config.json says tie_word_embeddings = true, but the folder has its own lm_head.weight, "
            "which differs from the embedding. If the model was trained with this head, set tie_word_embeddings to "
            "false in config.json; if it was not, remove lm_head.weight from the weights."
        )


class ShardReader:
    """Reads the parameters of `shards` from a Hugging Face folder, one at a time, without communication.

    It is a context manager. Making one checks every name, shape and file header, so that no error comes half-way. It
    raises BridgeError for a folder without complete safetensors, a parameter without a rule, a missing or unknown
    tensor, or a wrong shape, and UserError for an unknown family.
    """

    def __init__(self, shards: ModelShards, hf_dir: str | Path) -> None:
        self._shards = shards
        table = weight_table(read_config(hf_dir), shards.padded_vocab_size)
        self.mapped = {name: table.lookup(name) for name in shards.parameters}
        with ExitStack() as undo:
            self._folder = undo.enter_context(WeightFolder(hf_dir))
            check_names(self._folder, table)
            for name in shards.parameters:
                self.sources(name)
            self._files = undo.pop_all()

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *error: object) -> None:
        self._files.close()

    def _place(self, name: str) -> tuple[int, int]:
        """(rank, size) in the group over which the parameter is split."""
        shards = self._shards
        if self.mapped[name].expert is not None:
            return shards.etp_rank, shards.etp_size
        return shards.tp_rank, shards.tp_size

    def sources(self, name: str) -> list[TensorSlice]:
        """Slices of the Hugging Face tensors behind a parameter. Raises BridgeError when their shapes do not fit."""
        mapped, shape = self.mapped[name], tuple(self._shards.parameters[name].shape)
        sources = [self._folder.source(hf_name) for hf_name in mapped.hf_names]
        expected = mapped.rule.hf_shapes(shape, self._place(name)[1])
        for hf_name, source, want in zip(mapped.hf_names, sources, expected, strict=True):
            if shape_of(source) != want:
                raise BridgeError(
                    f"{hf_name} in {self._folder.folder} has shape {list(shape_of(source))}, config.json implies "
                    f"{list(want)}: weights and config.json are of different models."
                )
        return sources

    def read(self, name: str) -> torch.Tensor:
        """This rank's shard of a parameter, in the dtype of the file."""
        mapped, shape = self.mapped[name], tuple(self._shards.parameters[name].shape)
        rank, size = self._place(name)
        shard = mapped.rule.to_shard(self.sources(name), rank, size)
        if tuple(shard.shape) != shape:
            raise BridgeError(
                f"{', '.join(mapped.hf_names)}: a tensor parallel rank of {size} gets {list(shard.shape)}, its "
                f"Megatron parameter is {list(shape)}. The padded vocabulary or the tensor parallel size does not fit "
                "the model."
            )
        return shard


@torch.no_grad()
def load_hf_weights(shards: ModelShards, hf_dir: str | Path) -> None:
    """Fill this rank's parameters from a Hugging Face folder, cast to each parameter's dtype, without communication.

    It reads only this rank's slices, one parameter at a time. It raises what `ShardReader` raises, before it changes
    any parameter.
    """
    with ShardReader(shards, hf_dir) as reader:
        for name, parameter in shards.parameters.items():
            parameter.copy_(reader.read(name))
