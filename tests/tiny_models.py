"""Tiny random Hugging Face models for tests: real configs, safetensors, tokenizer.json and chat template."""

from __future__ import annotations

import string
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

CHARACTERS = string.digits + string.ascii_letters + string.punctuation + " \n"  # 96
SPECIAL = ("<pad>", "<eos>", "<unk>")  # ids 0, 1, 2; then the characters in order
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
FAMILIES = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
}


def tiny_tokenizer(size: int = len(SPECIAL) + len(CHARACTERS)) -> PreTrainedTokenizerFast:
    """One token a character, at most `size` tokens; encoding adds no special tokens."""
    tokens = [*SPECIAL, *CHARACTERS][:size]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def make_tiny_model(
    folder: str | Path,
    family: str = "qwen3",
    *,
    tied: bool = True,
    dtype: torch.dtype = torch.float32,
    vocab: int = 101,
    seed: int = 0,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 32,
    ffn: int = 96,
    max_positions: int = 512,
    initializer_range: float = 0.2,
    max_shard_size: str = "5GB",
    experts: int = 4,
    experts_per_token: int = 2,
    expert_ffn: int = 32,
    dense_layers: tuple[int, ...] = (),
    renormalise: bool = True,
    rope: dict[str, object] | None = None,
) -> Path:
    """Save a random model and its tokenizer in `folder`; returns the folder.

    `vocab` counts the embedding's rows: 101 by default, odd and above the tokenizer's 99, as real models have it.
    head_dim 32 is the smallest that vLLM takes on a CPU. Norm weights and biases are random too, so that a mix-up
    shows; weights are large enough that next-token distributions are far from uniform. Qwen2 has no head_dim of its
    own: there `hidden` is heads · head_dim. The settings of experts are of qwen3_moe alone.
    """
    config_class, model_class = FAMILIES[family]
    special = {"attention_bias": False, "head_dim": head_dim}
    if family == "qwen2":
        hidden, special = heads * head_dim, {}
    if family == "qwen3_moe":
        special |= {
            "num_experts": experts,
            "num_experts_per_tok": experts_per_token,
            "moe_intermediate_size": expert_ffn,
            "mlp_only_layers": list(dense_layers),
            "norm_topk_prob": renormalise,
        }
    tokenizer = tiny_tokenizer(min(vocab, len(SPECIAL) + len(CHARACTERS)))
    if family == "mistral":
        special |= {"sliding_window": None}
    if rope is not None:
        special |= {"rope_parameters": rope}
    config = config_class(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=max_positions,
        rms_norm_eps=1e-6,
        initializer_range=initializer_range,
        tie_word_embeddings=tied,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        **special,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name or name.endswith("bias"):
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    model = model.to(dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(folder)
    return Path(folder)
