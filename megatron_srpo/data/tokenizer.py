"""A tokenizer from a local folder, fit for chat training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_srpo.data.dataset import DataError
from megatron_srpo.data.sentencepiece_folder import MODEL, load_sentencepiece

_DESCRIBED = ("tokenizer.json", "tokenizer_config.json")  # where transformers knows what it loads
_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def load_tokenizer(path: str) -> Any:
    """The transformers tokenizer of the folder `path`, which needs a chat template and an end-of-sequence token.

    Never asks the network and runs no code from the folder. DataError with the cure for what is missing.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        kind = "a file" if folder.exists() else "not there"
        raise DataError(
            f"tokenizer {path!r}: expected a local Hugging Face folder, it is {kind}. Nothing is downloaded: fetch the "
            "model first and set model.path (or model.tokenizer) to its folder"
        )
    tokenizer = tokenizer_from(folder)
    if not tokenizer.chat_template:
        raise DataError(
            f"the tokenizer in {folder} has no chat template: use the instruct model's, or put its chat_template.jinja "
            "into the folder"
        )
    if tokenizer.eos_token_id is None:
        raise DataError(
            f'the tokenizer in {folder} has no end-of-sequence token: set "eos_token" in its tokenizer_config.json'
        )
    return tokenizer


def tokenizer_from(folder: Path) -> Any:
    """The tokenizer of a folder, chat template or not. DataError if it cannot be loaded."""
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in _FILES):
        raise DataError(f"{folder} has no tokenizer (tokenizer.json): copy it from the model's repository")
    if (folder / MODEL).is_file() and not any((folder / name).is_file() for name in _DESCRIBED):
        return load_sentencepiece(folder)
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library raises nearly everything for a broken folder
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"the tokenizer in {folder} cannot be loaded: {reason[:300]}") from error
