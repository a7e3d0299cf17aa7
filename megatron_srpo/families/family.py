"""What a model family is made of: names, Megatron's settings, and what it refuses."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import cached_property

from megatron_srpo.families.shape import HfConfig, ModelShape

LAYER, EXPERT = "{layer}", "{expert}"  # in a name: the global number of the layer or expert, from 0
EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
Settings = dict[str, "str | int | float | bool | list[int]"]


class Split(Enum):
    """How Hugging Face tensors become the shards of a Megatron parameter. bridge/rules.py has the arithmetic."""

    REPLICATED = "replicated"  # one tensor, the same on every rank: norms, routers
    COLUMN = "column"  # one tensor, split by rows: output features
    ROW = "row"  # one tensor, split by columns: input features
    VOCAB = "vocab"  # one tensor, split by rows and padded with zeros
    QKV = "qkv"  # query, key and value, split by query groups and interleaved as Megatron has them
    GATED_MLP = "gated_mlp"  # gate and up, each split by rows, one below the other


@dataclass(frozen=True)
class Line:
    """One line of a family's table: a Megatron name, the Hugging Face names behind it, and the split between them."""

    megatron: str
    hf: tuple[str, ...]
    split: Split

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        pattern = re.escape(self.megatron)
        for number in (LAYER, EXPERT):
            pattern = pattern.replace(re.escape(number), rf"(?P<{number[1:-1]}>\d+)")
        return re.compile(pattern)

    @property
    def of_experts(self) -> bool:
        """Whether only layers with experts have this parameter."""
        return ".mlp.experts." in self.megatron or ".mlp.router." in self.megatron

    @property
    def of_dense_mlp(self) -> bool:
        """Whether only layers without experts have this parameter."""
        layer, _, kind = self.megatron.partition(".mlp.linear_")[2].partition(".")
        return layer in ("fc1", "fc2") and kind.startswith(("weight", "adapters."))

    def match(self, name: str) -> dict[str, int] | None:
        """The numbers in `name` ("layer", "expert", as far as it has them) if the name is this line's, else None."""
        found = self._pattern.fullmatch(name)
        return None if found is None else {number: int(digits) for number, digits in found.groupdict().items()}


@dataclass(frozen=True)
class Family:
    """One model family."""

    name: str  # the name of its file
    architectures: tuple[str, ...]  # architectures[0] of config.json
    model_types: tuple[str, ...]  # model_type, for a config.json without architectures
    lines: tuple[Line, ...]  # names; both of Megatron's layer namings
    config: Callable[[ModelShape], Settings]  # fields of Megatron's TransformerConfig
    model: Callable[[ModelShape], Settings]  # arguments of Megatron's GPTModel: positions
    numbers: tuple[str, ...]  # keys that config.json must have
    refusals: Callable[[HfConfig], list[str]]  # what a config.json asks for and we would compute wrongly, a line each
