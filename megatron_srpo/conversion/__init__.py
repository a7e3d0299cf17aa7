"""Hugging Face folders ↔ Megatron's sharded checkpoints, streamed: one tensor in memory at a time.

    source.py       where a checkpoint's model configuration and tokenizer are
    store_group.py  the processes that share a conversion, without process groups
    memory.py       the peak of host memory, measured
    report.py       a conversion in numbers; a folder that appears complete or not at all
    to_megatron.py  Hugging Face folder → checkpoint of any layout
    to_hf.py        checkpoint (also one of training) → Hugging Face folder
    verify.py       two folders compared bit for bit
    console.py      the progress bar and the summary

Here the bridge (names, rules, safetensors) meets mcore (Megatron's layout and files).
"""
