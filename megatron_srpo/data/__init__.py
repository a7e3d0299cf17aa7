"""Data: files → examples → prompts → batches, and the prompts that the self-teacher reads.

    dataset.py          rows of jsonl and parquet files, checked
    tokenizer.py        a tokenizer from a local folder
    prompts.py          the chat template applied, over-length prompts dropped
    loader.py           batches in a deterministic order that a checkpoint can continue
    teacher_prompt.py   question + demonstration + feedback, cut to length

A user's mistake is a DataError: what was expected, what came, the cure.
"""

from megatron_srpo.data.dataset import DataError, Example, LoadReport, load_rows, read_records
from megatron_srpo.data.loader import PromptLoader
from megatron_srpo.data.prompts import hides_system, render_prompts
from megatron_srpo.data.teacher_prompt import TeacherPrompt, TeacherPromptBuilder, strip_thinking
from megatron_srpo.data.tokenizer import load_tokenizer, tokenizer_from

__all__ = [
    "DataError",
    "Example",
    "LoadReport",
    "PromptLoader",
    "TeacherPrompt",
    "TeacherPromptBuilder",
    "hides_system",
    "load_rows",
    "load_tokenizer",
    "read_records",
    "render_prompts",
    "strip_thinking",
    "tokenizer_from",
]
