"""The lookup of one model's parameters in its family's table of names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from megatron_srpo.bridge.errors import BridgeError
from megatron_srpo.bridge.rules import QKV, Column, GatedMLP, Replicated, Row, Rule, Vocab
from megatron_srpo.core.errors import nearest
from megatron_srpo.families import Family, HfConfig, Line, ModelShape, Split, family_of
from megatron_srpo.families.family import EMBEDDING, EXPERT, LAYER, OUTPUT


@dataclass(frozen=True)
class Mapped:
    """One Megatron parameter of one model."""

    hf_names: tuple[str, ...]
    rule: Rule
    exported: bool  # False for the tied copy of the embedding on the last pipeline stage
    expert: int | None = None  # its expert; the parameter is then split over expert tensor-parallel ranks only


def _without_numbers(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def adapter_lines(lines: Iterable[Line]) -> Iterator[Line]:
    """The lines of LoRA adapters (mcore/lora.py), which follow from those of the weights: every projection has its own
    factors. Hugging Face's names are peft's without their prefix "base_model.model."."""
    splits = {
        Split.QKV: (Split.REPLICATED, Split.COLUMN),
        Split.GATED_MLP: (Split.REPLICATED, Split.COLUMN),
        Split.ROW: (Split.ROW, Split.REPLICATED),
    }
    for line in lines:
        layer, _, kind = line.megatron.rpartition(".")
        if kind != "weight" or line.split not in splits:
            continue
        for hf in line.hf:
            projection = hf.removesuffix(".weight")
            for factor, split in zip(("lora_A", "lora_B"), splits[line.split], strict=True):
                name = f"{layer}.adapters.{projection.rpartition('.')[2]}.{factor}"
                yield Line(name, (f"{projection}.{factor}.weight",), split)


class WeightTable:
    """The table of one model: that of its family, with the model's layers, experts and sizes filled in."""

    def __init__(self, family: Family, shape: ModelShape, padded_vocab_size: int) -> None:
        if padded_vocab_size < shape.vocab:
            raise BridgeError(f"padded vocabulary {padded_vocab_size}: expected at least vocab_size, {shape.vocab}")
        self.family, self.shape = family, shape
        self._rules: dict[Split, Rule] = {
            Split.REPLICATED: Replicated(),
            Split.COLUMN: Column(),
            Split.ROW: Row(),
            Split.VOCAB: Vocab(shape.vocab, padded_vocab_size),
            Split.QKV: QKV(shape.heads, shape.groups, shape.head_dim),
            Split.GATED_MLP: GatedMLP(),
        }
        # Large models have 10⁵ names, so a name is only tried on the lines that differ from it in numbers at most.
        self._alike: dict[str, list[Line]] = {}
        for line in (*family.lines, *adapter_lines(family.lines)):
            self._alike.setdefault(_without_numbers(line.megatron.format(layer=0, expert=0)), []).append(line)

    def lookup(self, name: str) -> Mapped:
        """The rule of a Megatron parameter, whose name has global layer and expert numbers. Raises BridgeError when
        there is none."""
        if name == OUTPUT and self.shape.tied:
            return Mapped(self.lookup(EMBEDDING).hf_names, self._rules[Split.VOCAB], exported=False)
        line, numbers = self._line(name)
        return self._mapped(line, numbers)

    def over_expert_ranks(self, name: str, ep_size: int) -> tuple[Mapped, ...]:
        """What each expert-parallel rank has in the place of `name`: an expert's parameter is another expert's on each
        rank, any other parameter is the same on all of them and comes once."""
        if name == OUTPUT and self.shape.tied:
            return (self.lookup(name),)
        line, numbers = self._line(name)
        if "expert" not in numbers:
            return (self._mapped(line, numbers),)
        run = self.shape.experts // ep_size
        places = range(numbers["expert"] % run, self.shape.experts, run)
        return tuple(self._mapped(line, numbers | {"expert": expert}) for expert in places)

    def _line(self, name: str) -> tuple[Line, dict[str, int]]:
        shape = self.shape
        counts = {"layer": shape.layers, "expert": shape.experts}
        for line in self._alike.get(_without_numbers(name), ()):
            numbers = line.match(name)
            if numbers is not None and all(number < counts[kind] for kind, number in numbers.items()):
                return line, numbers
        layer, expert, *_ = [*re.findall(r"\d+", name), "0", "0"]
        known = [line.megatron.format(layer=layer, expert=expert) for line in self.family.lines]
        size = f"{shape.layers} layers" + (f", {shape.experts} experts" if shape.experts else "")
        raise BridgeError(
            f"no rule of family {self.family.name!r} ({size}) maps the Megatron parameter {name!r}."
            f"{nearest(name, known)} A new kind of parameter needs a line in families/{self.family.name}.py."
        )

    def _mapped(self, line: Line, numbers: dict[str, int]) -> Mapped:
        names = tuple(hf.format(**numbers) for hf in line.hf)
        return Mapped(names, self._rules[line.split], exported=True, expert=numbers.get("expert"))

    def line_names(self, megatron: str) -> tuple[str, ...]:
        """The Hugging Face names that the family has for a parameter outside the layers, whether the model uses it or
        not."""
        return next(line.hf for line in self.family.lines if line.megatron == megatron)

    def hf_names(self) -> set[str]:
        """All Hugging Face names that a folder of this model may hold, a tied head included."""
        return self._all_names(self.family.lines)

    def _all_names(self, lines: Iterable[Line]) -> set[str]:
        return {
            name.format(layer=layer, expert=expert)
            for line in lines
            for name in line.hf
            for layer in (self._layers_of(line) if LAYER in name else (0,))
            for expert in (range(self.shape.experts) if EXPERT in name else (0,))
        }

    def adapter_names(self, projections: Iterable[str], *, experts: bool) -> set[str]:
        """The names of all factors of a model with adapters on these projections, and on those of experts. They are
        peft's without the prefix."""
        lines = [
            line
            for line in adapter_lines(self.family.lines)
            if (experts if line.of_experts else line.hf[0].split(".")[-3] in projections)
        ]
        return self._all_names(lines)

    def _layers_of(self, line: Line) -> list[int]:
        """The layers that have this line's parameter: a layer has experts or a dense MLP, not both."""
        experts = self.shape.expert_layers
        if line.of_experts or line.of_dense_mlp:
            return [layer for layer, has in enumerate(experts) if has == line.of_experts]
        return list(range(len(experts)))


def weight_table(hf: HfConfig, padded_vocab_size: int) -> WeightTable:
    """The names and rules of the model that this config.json describes. Raises UserError for an unknown family, and
    BridgeError when the padded vocabulary is smaller than the model's."""
    return WeightTable(family_of(hf), ModelShape.from_hf(hf), padded_vocab_size)
