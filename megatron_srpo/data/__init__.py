"""Data: files → examples → prompts → batches, and the prompts that the self-teacher reads.

    dataset.py              reads and checks the rows of jsonl and parquet files
    tokenizer.py            loads a tokenizer from a local folder
    sentencepiece_folder.py loads a tokenizer from a folder with tokenizer.model alone
    prompts.py              applies the chat template and drops prompts that are too long
    loader.py               makes batches in a deterministic order, at which a checkpoint can resume
    conversation.py         the token stream of a conversation in several turns
    control_tokens.py       tokens that mark turns, which text of others must not contain
    demonstrations.py       answers as a teacher reads them, tokenized in the background
    teacher_prompt.py       builds question + demonstration + feedback, cut to length

A mistake of the user is a DataError, which says what was expected, what came, and the cure.
"""

from megatron_srpo.data.conversation import Chat, Conversation
from megatron_srpo.data.dataset import (
    DataError,
    Example,
    LoadReport,
    drop_null_fields,
    load_rows,
    look_up,
    read_records,
)
from megatron_srpo.data.demonstrations import Demonstrations, strip_thinking
from megatron_srpo.data.loader import PromptLoader
from megatron_srpo.data.prompts import hides_system, render_prompts
from megatron_srpo.data.teacher_prompt import TeacherPrompt, TeacherPromptBuilder
from megatron_srpo.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_from

__all__ = [
    "Chat",
    "Conversation",
    "DataError",
    "Demonstrations",
    "Example",
    "LoadReport",
    "PromptLoader",
    "TeacherPrompt",
    "TeacherPromptBuilder",
    "Tokenizer",
    "drop_null_fields",
    "hides_system",
    "load_rows",
    "load_tokenizer",
    "look_up",
    "read_records",
    "render_prompts",
    "strip_thinking",
    "tokenizer_from",
]
