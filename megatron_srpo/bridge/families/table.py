"""What a family's table is made of, and the lookup of one model's names in it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_srpo.bridge.errors import BridgeError, nearest
from megatron_srpo.bridge.rules import QKV, Column, GatedMLP, Replicated, Row, Rule, Vocab

LAYER = "{layer}"  # in a name: the global layer number, from 0
EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"


@dataclass(frozen=True)
class Dims:
    """The numbers of a model that rules need."""

    layers: int
    heads: int
    groups: int  # key-value heads
    head_dim: int
    vocab_size: int
    padded_vocab_size: int
    tied: bool  # the output layer is the embedding

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], padded_vocab_size: int) -> Dims:
        """From a config.json. Raises BridgeError when the padded vocabulary is smaller than the model's."""
        heads, vocab = config["num_attention_heads"], config["vocab_size"]
        if padded_vocab_size < vocab:
            raise BridgeError(f"padded vocabulary {padded_vocab_size}: expected at least vocab_size, {vocab}")
        return cls(
            layers=config["num_hidden_layers"],
            heads=heads,
            groups=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            vocab_size=vocab,
            padded_vocab_size=padded_vocab_size,
            tied=bool(config.get("tie_word_embeddings", False)),
        )


def replicated(dims: Dims) -> Rule:
    return Replicated()


def column(dims: Dims) -> Rule:
    return Column()


def row(dims: Dims) -> Rule:
    return Row()


def vocab(dims: Dims) -> Rule:
    return Vocab(dims.vocab_size, dims.padded_vocab_size)


def qkv(dims: Dims) -> Rule:
    return QKV(dims.heads, dims.groups, dims.head_dim)


def gated_mlp(dims: Dims) -> Rule:
    return GatedMLP()


@dataclass(frozen=True)
class Line:
    """One line of a table: a Megatron name, the Hugging Face names behind it, and the rule between them."""

    megatron: str
    hf: tuple[str, ...]
    rule: Callable[[Dims], Rule]

    def match(self, name: str) -> str | None:
        """The layer number when `name` is this line's ('' for a line without one), else None."""
        pattern = re.escape(self.megatron).replace(re.escape(LAYER), r"(\d+)")
        found = re.fullmatch(pattern, name)
        return None if found is None else (found[1] if found.groups() else "")


@dataclass(frozen=True)
class Family:
    """A model family: what its config.json calls it, and its table. Both Megatron layer namings are in the table."""

    name: str
    architectures: tuple[str, ...]  # architectures[0] of config.json
    model_types: tuple[str, ...]  # model_type, for configs without architectures
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Mapped:
    """One Megatron parameter of one model."""

    hf_names: tuple[str, ...]
    rule: Rule
    exported: bool  # False for the tied copy of the embedding on the last pipeline stage


class WeightTable:
    """The table of one model: its family, with its layer numbers and dimensions filled in."""

    def __init__(self, family: Family, dims: Dims) -> None:
        self.family, self.dims = family, dims

    def lookup(self, name: str) -> Mapped:
        """The rule of a Megatron parameter (global layer number in its name). Raises BridgeError when there is none."""
        if name == OUTPUT and self.dims.tied:
            return Mapped(self.lookup(EMBEDDING).hf_names, vocab(self.dims), exported=False)
        for line in self.family.lines:
            layer = line.match(name)
            if layer is not None and (not layer or int(layer) < self.dims.layers):
                names = tuple(hf.replace(LAYER, layer) for hf in line.hf)
                return Mapped(names, line.rule(self.dims), exported=True)
        number = re.search(r"\d+", name)
        known = [line.megatron.replace(LAYER, number[0] if number else "0") for line in self.family.lines]
        raise BridgeError(
            f"no rule of family {self.family.name!r} ({self.dims.layers} layers) maps the Megatron parameter {name!r}."
            f"{nearest(name, known)} A new kind of parameter needs a line in bridge/families/{self.family.name}.py."
        )

    def hf_names(self) -> set[str]:
        """All Hugging Face names that a folder of this model may hold; optional ones, such as biases, included."""
        return {
            name.replace(LAYER, str(layer))
            for line in self.family.lines
            for name in line.hf
            for layer in (range(self.dims.layers) if LAYER in name else (0,))
        }
