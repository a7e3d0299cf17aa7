"""Predicts the bytes of saved activations of one packed row on one rank.

The terms are the tensors that autograd saves in the layers of `mcore/`, as saved-tensor hooks show them. Three paths
are known. "local" is Megatron's own layers with torch SDPA on a CPU; tests compare it with measured bytes (Megatron
Core 0.16.1). "gpu" is the same layers on a GPU, where torch's norm is fused; it was equal to what an H200 held (0.19.2,
benchmarks/RESULTS.md). "te" is Transformer Engine's fused layers; it is derived from what they keep for their backward
pass and was not measured.

Legend, per token: H hidden size, q queries, k keys (and as many values), f MLP width, w bytes of an element, t ranks of
tensor parallelism, s ranks that split norms and residuals (t with sequence parallelism, else 1).
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_srpo.plan.architecture import Architecture
from megatron_srpo.plan.layout import Layout, stage_layers
from megatron_srpo.plan.parameters import adapted_projections

LOGITS_MIB = 2048  # the default of train.logits_memory_mib


@dataclass(frozen=True)
class LayerBytes:
    """Saved bytes of one layer for one token of a rank's row, by part."""

    attention: float  # attention and its norm
    mlp: float  # the part that selective recompute does not keep
    mlp_input: float  # the MLP's norm and input, which selective recompute keeps
    checkpoint: float  # what full recompute keeps of the layer

    @property
    def whole(self) -> float:
        return self.attention + self.mlp + self.mlp_input


def layer_bytes(
    arch: Architecture, layout: Layout, *, path: str, padding: float = 1.0, keys: float = 1.0
) -> LayerBytes:  # fmt: skip
    """The saved bytes of a layer. `padding`: tokens of the padded batches of the SDPA path, divided by real tokens.
    `keys`: how many keys attention keeps for each token, more than 1 behind shared prompts (Workload.shared_keys)."""
    w, t = layout.dtype_bytes, layout.tensor
    s = t if layout.sequence_parallel else 1
    q, k = arch.query / t, arch.key / t
    heads, groups = arch.heads / t, arch.groups / t
    if path in ("local", "gpu"):
        # On a CPU torch's RMSNorm of bf16 saves its fp32 input, the fp32 normalised value and one number a row; ours of
        # fp32 and the fused norm of a GPU save their input and that number. The norm of the keys saves a view, which
        # keeps the whole QKV product alive. A frozen norm saves no normalised value.
        fused, frozen = _small_norm(path, w), 4 if layout.lora_rank else 0
        norm = (w if fused else 8 - frozen) * arch.hidden + 4
        kept = w * (2 * q + 2 * k) if fused else (8 - frozen) * (q + k)
        small = kept + 4 * (heads + groups) if arch.qk_norm else 0.0
        attend = padding * (w * (2 * q + 2 * k) + 4 * heads + 9) + 8
        if layout.context > 1:  # keys and values of the whole row, and the mask against its longest sequence
            attend += w * 2 * k * (layout.context - 1)
        attend += w * q  # the output projection's input
    else:
        norm = w * arch.hidden + 4
        small = w * (q + k) + 4 * (heads + groups) if arch.qk_norm else 0.0
        attend = w * (2 * q + 2 * k) + 4 * heads + (0 if arch.qk_norm else w * q)
    attend += w * 2 * k * (keys - 1)
    linear = w * arch.hidden / s
    attention = norm / s + linear + small + attend
    # What each adapter has between its factors. Frozen products keep no input, but their adapters keep the same one.
    adapters = w * layout.lora_rank * len(adapted_projections(arch, layout))
    return LayerBytes(
        attention=attention,
        mlp=_gated(path) * w * arch.ffn / t + _expert_bytes(arch, layout, path) / s + adapters,
        mlp_input=norm / s + linear,
        checkpoint=linear,
    )


def _small_norm(path: str, itemsize: int) -> bool:
    """Whether RMSNorm saves its input and one number a row alone."""
    return path == "gpu" or itemsize == 4


def _gated(path: str) -> int:
    """Values of the MLP's width that it keeps for each token: gate and up, and the second product's input. With
    Transformer Engine as many are assumed as Megatron's activation keeps without fusion."""
    return 5 if path == "te" else 3


def _expert_bytes(arch: Architecture, layout: Layout, path: str) -> float:
    """Of a token's experts, with tokens spread evenly: the router's scores and choices, each copy of it, and what
    its expert's gated MLP keeps."""
    if not arch.experts:
        return 0.0
    w, copies = layout.dtype_bytes, arch.experts_per_token
    router = 5 * arch.experts + 28 * copies
    inner = 3 * w * layout.lora_rank if layout.lora_experts else 0
    return router + copies * (w * arch.hidden + _gated(path) * w * arch.expert_ffn / layout.expert_tensor + inner)


def head_bytes(arch: Architecture, layout: Layout, tokens: int, *, path: str, ids: int, logits_mib: int) -> float:
    """Bytes of the final norm, the head and the loss on the last stage, for `tokens` tokens of a row and log-probs at
    `ids` ids each. Logits are kept if they fit into `logits_mib`; else they are computed in pieces (losses/linear.py).
    """
    w, s = layout.dtype_bytes, layout.tensor if layout.sequence_parallel else 1
    norm = (w if path == "te" or _small_norm(path, w) else 8) * arch.hidden + 4
    width = -(-arch.vocab // layout.tensor)
    logits = min(w * width * tokens, logits_mib * 2**20)
    return logits + tokens * (norm / s + w * arch.hidden + 13 * ids + 8)


def in_flight(layout: Layout, stage: int, rows: int) -> float:
    """Number of rows whose activations a stage holds at once, in units of its stack of layers. In Megatron's 1F1B and
    interleaved schedules these are the warm-up passes of `get_pp_rank_microbatches` and the pass that runs."""
    if layout.pipeline == 1:
        return 1.0
    behind = layout.pipeline - stage - 1
    if layout.virtual == 1:
        return float(min(rows, behind + 1))
    pieces = 2 * behind + (layout.virtual - 1) * layout.pipeline + 1
    return min(rows * layout.virtual, pieces) / layout.virtual


def stage_activations(
    arch: Architecture, layout: Layout, stage: int, tokens: int, rows: int, *, path: str, ids: int = 1,
    logits_mib: int = LOGITS_MIB, padding: float = 1.0, keys: float = 1.0,
) -> tuple[float, float]:  # fmt: skip
    """(peak bytes of the layers, of the head) on a stage that trains `rows` rows of `tokens` local tokens."""
    layer = layer_bytes(arch, layout, path=path, padding=padding, keys=keys)
    layers = stage_layers(arch.layers, layout)[stage]
    again = 0 if layout.recompute == "none" else layers
    if layout.recompute_layers:
        again = min(again, layout.recompute_layers * layout.virtual)
    kept = layer.checkpoint if layout.recompute == "full" else layer.attention + layer.mlp_input
    # Cosines and sines of the rotary embedding, which all layers share; Transformer Engine's kernel makes them anew.
    rotary = 0 if path == "te" else 2 * layout.dtype_bytes * arch.head_dim
    held = in_flight(layout, stage, rows) * tokens * (again * kept + (layers - again) * layer.whole + rotary)
    head = 0.0
    if stage == layout.pipeline - 1:
        head = head_bytes(arch, layout, tokens, path=path, ids=ids, logits_mib=logits_mib)
    if stage == 0:
        held += in_flight(layout, stage, rows) * tokens * 8  # token ids, for the embedding
    if again:  # a recomputed layer is complete during its backward pass; the head and later layers are freed by then
        working = tokens * (layer.whole if layout.recompute == "full" else layer.mlp)
        gone = head + (layers - again) / layout.virtual * tokens * layer.whole
        held += max(0.0, working - gone)
    return held, head
