"""What a family's table is made of, and the lookup of one model's names in it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megatron_srpo.bridge.errors import BridgeError, nearest
from megatron_srpo.bridge.rules import QKV, Column, GatedMLP, Replicated, Row, Rule, Vocab

LAYER, EXPERT = "{layer}", "{expert}"  # in a name: the global number of the layer or expert, from 0
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
    experts: int = 0  # of a layer that has any

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
            experts=config.get("num_experts") or config.get("num_local_experts") or 0,
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

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        pattern = re.escape(self.megatron)
        for number in (LAYER, EXPERT):
            pattern = pattern.replace(re.escape(number), rf"(?P<{number[1:-1]}>\d+)")
        return re.compile(pattern)

    def match(self, name: str) -> dict[str, int] | None:
        """The numbers in `name` ("layer", "expert", as far as there are any) when it is this line's, else None."""
        found = self._pattern.fullmatch(name)
        return None if found is None else {number: int(digits) for number, digits in found.groupdict().items()}


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
    expert: int | None = None  # the expert it belongs to: split over expert tensor-parallel ranks, not over all


def _without_numbers(name: str) -> str:
    return re.sub(r"\d+", "#", name)


class WeightTable:
    """The table of one model: its family, with its layer numbers and dimensions filled in."""

    def __init__(self, family: Family, dims: Dims) -> None:
        self.family, self.dims = family, dims
        self._alike: dict[str, list[Line]] = {}  # large models have 10⁵ names: only lines that may match are tried
        for line in family.lines:
            self._alike.setdefault(_without_numbers(line.megatron.format(layer=0, expert=0)), []).append(line)

    def lookup(self, name: str) -> Mapped:
        """The rule of a Megatron parameter (global layer and expert numbers in its name). Raises BridgeError when there
        is none."""
        if name == OUTPUT and self.dims.tied:
            return Mapped(self.lookup(EMBEDDING).hf_names, vocab(self.dims), exported=False)
        line, numbers = self._line(name)
        return self._mapped(line, numbers)

    def over_expert_ranks(self, name: str, ep_size: int) -> tuple[Mapped, ...]:
        """What each expert-parallel rank has in the place of `name`: for an expert's parameter the rank's own expert's,
        for any other the one that all have."""
        if name == OUTPUT and self.dims.tied:
            return (self.lookup(name),)
        line, numbers = self._line(name)
        if "expert" not in numbers:
            return (self._mapped(line, numbers),)
        run = self.dims.experts // ep_size
        places = range(numbers["expert"] % run, self.dims.experts, run)
        return tuple(self._mapped(line, numbers | {"expert": expert}) for expert in places)

    def _line(self, name: str) -> tuple[Line, dict[str, int]]:
        counts = {"layer": self.dims.layers, "expert": self.dims.experts}
        for line in self._alike.get(_without_numbers(name), ()):
            numbers = line.match(name)
            if numbers is not None and all(number < counts[kind] for kind, number in numbers.items()):
                return line, numbers
        layer, expert, *_ = [*re.findall(r"\d+", name), "0", "0"]
        known = [line.megatron.format(layer=layer, expert=expert) for line in self.family.lines]
        size = f"{self.dims.layers} layers" + (f", {self.dims.experts} experts" if self.dims.experts else "")
        raise BridgeError(
            f"no rule of family {self.family.name!r} ({size}) maps the Megatron parameter {name!r}."
            f"{nearest(name, known)} A new kind of parameter needs a line in bridge/families/{self.family.name}.py."
        )

    def _mapped(self, line: Line, numbers: dict[str, int]) -> Mapped:
        names = tuple(hf.format(**numbers) for hf in line.hf)
        return Mapped(names, line.rule(self.dims), exported=True, expert=numbers.get("expert"))

    def hf_names(self) -> set[str]:
        """All Hugging Face names that a folder of this model may hold; optional ones, such as biases, included."""
        return {
            name.format(layer=layer, expert=expert)
            for line in self.family.lines
            for name in line.hf
            for layer in (range(self.dims.layers) if LAYER in name else (0,))
            for expert in (range(self.dims.experts) if EXPERT in name else (0,))
        }
