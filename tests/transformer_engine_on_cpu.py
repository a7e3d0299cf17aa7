"""Transformer Engine's real Python modules on a CPU, with torch in place of its compiled kernels.

`sources` fetches the pinned package by pip (Python files only), and `install` makes it importable in a fresh process,
before Megatron Core is imported. What stays real: how Megatron builds the layers, their parameters, names, marks and
sharded states, TE's fused Adam, its autograd functions of rotary embedding and expert permutation, and all arguments
that Megatron passes. What torch replaces: the products, norms and attention of the modules' forward passes, and the
kernels of Adam, rotary embedding and permutation. So this shows the plumbing, not the kernels' numbers.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import subprocess
import sys
import types
import zipfile
from collections import Counter
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CALLS: Counter[str] = Counter()  # of what stands in for a kernel
CAPABILITY = (9, 0)  # of the GPU that the modules believe in: H100


def sources(cache: Path) -> Path:
    """A folder with the Python sources of the pinned release. Raises RuntimeError if pip cannot get it."""
    pinned = re.search(
        r"^transformer-engine\[pytorch\](==\S+)", (ROOT / "requirements/gpu.txt").read_text(), re.MULTILINE
    )
    assert pinned, "requirements/gpu.txt has no transformer-engine"
    folder = cache / f"transformer-engine{pinned[1]}"
    if not folder.exists():
        wheels = cache / "wheels"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        done = subprocess.run(
            [*command, "--dest", str(wheels), f"transformer-engine{pinned[1]}"],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"pip cannot download transformer-engine{pinned[1]}: {done.stderr.strip()[-300:]}")
        (wheel,) = wheels.glob(f"transformer_engine-{pinned[1][2:]}-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(partial := folder.with_suffix(".partial"))
        partial.rename(folder)
    return folder


def install(folder: Path) -> None:
    """Make `transformer_engine` importable from `folder`, and our device path that of Transformer Engine on a CPU."""
    assert "megatron.core" not in sys.modules, "Megatron Core looks for Transformer Engine when it is imported"
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # it loads no shared library
    sys.path.insert(0, str(folder))
    extension = _Extension("transformer_engine_torch")
    sys.modules["transformer_engine_torch"] = extension
    sys.modules["transformer_engine.pytorch.onnx_extensions"] = _Extension("onnx")  # it would need onnxscript

    import torch

    torch.cuda.get_device_capability = lambda *device: CAPABILITY
    common = importlib.import_module("transformer_engine.common")
    common.load_framework_extension = lambda *framework: None
    _replace_optimizer_kernels(extension)
    _replace_rotary_kernel(extension)
    importlib.import_module("transformer_engine.pytorch")
    _replace_permutation_kernels()

    from megatron_srpo.mcore import cpu_shim, device

    cpu_shim.install()
    _replace_modules()
    base = importlib.import_module("transformer_engine.pytorch.module.base")
    base.torch = _Proxy(torch, cuda=_Proxy(torch.cuda, is_available=lambda: True))  # it refuses a machine without a GPU
    path = device.DevicePath(torch.device("cpu"), "gloo", True, "Transformer Engine's modules with torch's operations")
    device.choose_device = lambda requested, local_rank: path


class _Proxy(types.SimpleNamespace):
    """A module in which some names have another value for one of its users."""

    def __init__(self, module: types.ModuleType, **other: object) -> None:
        super().__init__(**other)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _Extension(types.ModuleType):
    """The compiled extension: it has every class, as an empty one, and every function, which must not be called."""

    class DType(IntEnum):
        kByte, kInt32, kFloat32, kFloat16, kBFloat16, kFloat8E4M3, kFloat8E5M2, kFloat4E2M1 = 0, 2, 4, 5, 6, 7, 8, 10

    class NVTE_Fused_Attn_Backend(IntEnum):
        NVTE_No_Backend, NVTE_F16_arbitrary_seqlen, NVTE_FP8 = -1, 1, 2

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name.startswith("get_"):  # versions and counts
            return lambda *arguments: 100_000
        value = _Placeholder(name, (), {"__init__": lambda self, *a, **k: None}) if name[0].isupper() else _absent(name)
        setattr(self, name, value)
        return value


class _Placeholder(type):
    """A class of the extension; an enumeration's members are numbers."""

    def __getattr__(cls, name: str) -> Any:
        if name == "__members__":
            return {}
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(cls, name, len(vars(cls)))
        return getattr(cls, name)


def _absent(name: str) -> Callable[..., Any]:
    def call(*arguments: object, **named: object) -> None:
        raise RuntimeError(f"the kernel {name} was called, and nothing stands in for it")

    return call


def _replace_optimizer_kernels(extension: types.ModuleType) -> None:
    import torch

    def multi_tensor_adam(
        chunk: int, overflow: Any, lists: list, lr: float, beta1: float, beta2: float, eps: float, step: int, mode: int,
        bias_correction: int, weight_decay: float,
    ) -> None:  # fmt: skip
        """Adam on lists of (gradient, parameter, first moment, second moment). Mode 1 is AdamW."""
        CALLS["adam"] += 1
        CALLS["adam step"] = int(step)
        first, second = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1.0, 1.0)
        for gradient, parameter, mean, square in zip(*lists, strict=True):
            given = gradient.float() if mode else gradient.float() + weight_decay * parameter
            mean.mul_(beta1).add_(given, alpha=1 - beta1)
            square.mul_(beta2).addcmul_(given, given, value=1 - beta2)
            update = (mean / first) / ((square / second).sqrt() + eps)
            parameter.add_(update + weight_decay * parameter if mode else update, alpha=-lr)

    def multi_tensor_l2norm(chunk: int, overflow: Any, lists: list, per_tensor: bool = False) -> tuple:
        (tensors,) = lists
        norms = torch.stack([torch.linalg.vector_norm(tensor.float()) for tensor in tensors])
        return torch.linalg.vector_norm(norms).reshape(1), norms if per_tensor else torch.zeros(0)

    def multi_tensor_scale(chunk: int, overflow: Any, lists: list, scale: Any) -> None:
        for given, result in zip(*lists, strict=True):
            result.copy_(given * scale)

    extension.multi_tensor_adam, extension.multi_tensor_l2norm = multi_tensor_adam, multi_tensor_l2norm
    extension.multi_tensor_scale = extension.multi_tensor_scale_tensor = multi_tensor_scale


def _replace_rotary_kernel(extension: types.ModuleType) -> None:
    import torch

    def rotated(
        t: torch.Tensor, freqs: torch.Tensor, cu_seqlens: torch.Tensor, ranks: int, rank: int, sign: int
    ) -> Any:
        """Rotary embedding of a packed row's part [T / ranks, heads, d] on one context-parallel rank: of each sequence
        it has two of 2 · `ranks` chunks. `sign` −1 rotates back, which is the gradient."""
        CALLS["rotary"] += 1
        positions = []
        for start, stop in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
            chunks = torch.arange(stop - start).chunk(2 * ranks) if ranks > 1 else [torch.arange(stop - start)]
            positions += [chunks[rank], chunks[2 * ranks - 1 - rank]] if ranks > 1 else chunks
        angles = freqs[torch.cat(positions)].reshape(-1, 1, freqs.shape[-1])
        turned, kept = t[..., : angles.shape[-1]].float(), t[..., angles.shape[-1] :]
        low, high = turned.chunk(2, -1)
        result = turned * angles.cos() + sign * torch.cat([-high, low], -1) * angles.sin()
        return torch.cat([result.to(t.dtype), kept], -1)

    def fused_rope_forward(
        t: Any, freqs: Any, starts: Any, layout: Any, interleaved: bool, cu: Any, ranks: int, rank: int
    ) -> Any:
        assert starts is None and not interleaved and cu is not None and cu.dtype == torch.int32
        return rotated(t, freqs, cu, ranks, rank, 1)

    def fused_rope_backward(
        t: Any, freqs: Any, starts: Any, layout: Any, interleaved: bool, cu: Any, ranks: int, rank: int
    ) -> Any:
        return rotated(t, freqs, cu, ranks, rank, -1)

    extension.fused_rope_forward, extension.fused_rope_backward = fused_rope_forward, fused_rope_backward


def _replace_permutation_kernels() -> None:
    """Our map of a token's copies: [tokens, experts] → row among the permuted ones, or −1; padded to TE's width."""
    import torch
    import transformer_engine.pytorch.permutation as permutation

    kernels = permutation.triton_permutation
    # Its functions refuse tensors that are not on a GPU. Everybody else hears the truth.
    torch.Tensor.is_cuda = property(lambda tensor: sys._getframe(1).f_code.co_filename == permutation.__file__)

    def make_row_id_map(routing_map: Any, tokens: int, experts: int) -> Any:
        CALLS["permute"] += 1
        chosen = routing_map.bool().T  # rows are in the order of experts, then of tokens
        rows = torch.where(chosen, chosen.flatten().cumsum(0).view_as(chosen) - 1, -1).T
        return torch.cat([rows, rows.new_zeros(tokens, experts + 1)], 1).int()

    def places(row_id_map: Any, experts: int) -> tuple[Any, Any, Any]:
        rows = row_id_map[:, :experts].long()
        token, expert = (rows >= 0).nonzero(as_tuple=True)
        return token, expert, rows[token, expert]

    def permute_with_mask_map(
        inp: Any, row_id_map: Any, probs: Any, scale: Any, pad_offsets: Any, tokens: int, experts: int, out: int,
        hidden: int, scale_hidden: Any,
    ) -> tuple:  # fmt: skip
        assert scale is None and pad_offsets is None
        token, expert, row = places(row_id_map, experts)
        output = inp.new_empty(out, hidden)
        output[row] = inp[token]
        if probs is None:
            return output, None, None
        permuted = probs.new_empty(out)
        permuted[row] = probs[token, expert]
        return output, None, permuted

    def unpermute_with_mask_map(
        inp: Any,
        row_id_map: Any,
        merging: Any,
        permuted_probs: Any,
        pad_offsets: Any,
        tokens: int,
        experts: int,
        hidden: int,
    ) -> tuple:
        assert merging is None and pad_offsets is None
        token, expert, row = places(row_id_map, experts)
        output = inp.new_zeros(tokens, hidden).index_add_(0, token, inp[row])
        if permuted_probs is None:
            return output, None
        probs = permuted_probs.new_zeros(tokens, experts)
        probs[token, expert] = permuted_probs[row]
        return output, probs

    def make_chunk_sort_map(sizes: Any, order: Any, tokens: int, count: int) -> Any:
        CALLS["sort"] += 1
        chunks = torch.arange(tokens).split(sizes.tolist())
        return torch.cat([chunks[i] for i in order.tolist()]).int()  # where each row of the result comes from

    def sort_chunks_by_map(inp: Any, row_map: Any, probs: Any, tokens: int, hidden: int, is_forward: bool) -> tuple:
        index = row_map.long() if is_forward else row_map.long().argsort()
        return inp[index], None if probs is None else probs[index]

    for function in (
        make_row_id_map, permute_with_mask_map, unpermute_with_mask_map, make_chunk_sort_map, sort_chunks_by_map
    ):  # fmt: skip
        assert list(inspect.signature(getattr(kernels, function.__name__)).parameters)  # the kernel has this name
        setattr(kernels, function.__name__, function)


def _replace_modules() -> None:
    """The forward passes of the modules that Megatron builds: products, RMS norms and packed causal attention."""
    import torch
    import torch.nn.functional as F
    import transformer_engine.pytorch as te
    from megatron.core.tensor_parallel import mappings

    from megatron_srpo.mcore.attention import context_parallel_attention, packed_causal_attention

    def rms(x: Any, weight: Any, eps: float) -> Any:
        return (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight

    def enter(module: Any, x: Any) -> Any:
        """The input of a column-parallel product on all of its rows."""
        if module.parallel_mode != "column" or module.tp_size == 1:
            return x
        if module.sequence_parallel:
            return mappings.gather_from_sequence_parallel_region(x, group=module.tp_group)
        return mappings.copy_to_tensor_model_parallel_region(x, group=module.tp_group)

    def leave(module: Any, y: Any) -> Any:
        """The sum of a row-parallel product over the ranks."""
        if module.parallel_mode != "row" or module.tp_size == 1:
            return y
        if module.sequence_parallel:
            return mappings.reduce_scatter_to_sequence_parallel_region(y, group=module.tp_group)
        return mappings.reduce_from_tensor_model_parallel_region(y, group=module.tp_group)

    def linear(self: Any, inp: Any, is_first_microbatch: Any = None, **more: Any) -> Any:
        CALLS["linear"] += 1
        return leave(self, F.linear(enter(self, inp), self.weight))  # Megatron adds biases itself

    def norm_linear(self: Any, inp: Any, is_first_microbatch: Any = None, **more: Any) -> Any:
        CALLS["norm and linear"] += 1
        assert self.normalization == "RMSNorm" and not self.zero_centered_gamma
        x = enter(self, rms(inp, self.layer_norm_weight, self.eps))
        return F.linear(x, self.weight, self.bias if self.use_bias and self.apply_bias else None)

    def grouped(self: Any, inp: Any, m_splits: Any, is_first_microbatch: Any = None, **more: Any) -> Any:
        CALLS["grouped"] += 1
        sizes = [int(size) for size in m_splits]
        parts = [F.linear(x, getattr(self, f"weight{i}")) for i, x in enumerate(inp.split(sizes))]
        return torch.cat(parts)

    def norm(self: Any, inp: Any, *more: Any, **also: Any) -> Any:
        CALLS["norm"] += 1
        return rms(inp, self.weight, self.eps)

    def bottom_right(
        query: Any,
        key: Any,
        value: Any,
        bounds: Any,
        key_bounds: Any,
        longest: int,
        longest_key: int,
        scale: Any,
        shift: int,
    ) -> Any:
        """Each sequence's queries see its keys so that the last one sees all. [T, heads, d] → [T, heads·d]."""
        parts = []
        for i in range(len(bounds) - 1):
            q = query[bounds[i] : bounds[i + 1]].transpose(0, 1)
            k, v = (x[key_bounds[i] : key_bounds[i + 1]].transpose(0, 1) for x in (key, value))
            assert q.size(1) <= longest and k.size(1) <= longest_key
            mask = torch.ones(q.size(1), k.size(1), dtype=torch.bool).tril(
                k.size(1) - q.size(1) + (shift if k.size(1) > q.size(1) else 0)
            )
            mixed = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.size(0) != k.size(0)
            )
            parts.append(mixed.transpose(0, 1).flatten(1))
        return torch.cat(parts)

    real = inspect.signature(te.DotProductAttention.forward)

    def attention(self: Any, *given: Any, **named: Any) -> Any:
        CALLS["attention"] += 1
        found = real.bind(self, *given, **named).arguments  # an argument that TE does not have is an error
        assert found["qkv_format"] == "thd", found
        cu = found["cu_seqlens_q"]
        packed = (found["query_layer"], found["key_layer"], found["value_layer"], cu)
        scale = self.softmax_scale if hasattr(self, "softmax_scale") else None
        if found["attn_mask_type"].startswith("padding_causal_bottom_right"):
            CALLS["attention behind prompts"] += 1
            most = found["max_seqlen_q"], found["max_seqlen_kv"]
            shift = -1 if found["attn_mask_type"].endswith("shifted") else 0
            return bottom_right(*packed, found["cu_seqlens_kv"], *most, scale, shift)
        assert found["attn_mask_type"] == "padding_causal", found
        assert cu.dtype == torch.int32 and torch.equal(cu, found["cu_seqlens_kv"])
        if self.cp_group is not None and torch.distributed.get_world_size(self.cp_group) > 1:
            out = context_parallel_attention(*packed, self.cp_group, scale=scale, dropout=0.0)
        else:
            out = packed_causal_attention(*packed, scale=scale, dropout=0.0)
        return out.reshape(out.size(0), -1)

    for cls, forward in (
        (te.Linear, linear), (te.LayerNormLinear, norm_linear), (te.GroupedLinear, grouped), (te.RMSNorm, norm),
        (te.DotProductAttention, attention),
    ):  # fmt: skip
        cls.forward = forward

    from megatron.core.transformer.moe import moe_utils

    def te_general_gemm(a: Any, b: Any, dtype: Any, layout: str = "TN", bias: Any = None, grad: bool = False) -> list:
        """The router's products; the letters say whether a and b are transposed, as a column-major library sees it."""
        CALLS["router"] += 1
        product = {"TN": lambda: b @ a.T, "NN": lambda: b @ a, "NT": lambda: b.T @ a}[layout]().to(dtype)
        return [product if bias is None else product + bias]

    if getattr(moe_utils, "te_general_gemm", None) is not None:
        moe_utils.te_general_gemm = te_general_gemm
