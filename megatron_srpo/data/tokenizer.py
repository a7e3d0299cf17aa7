"""Loads a tokenizer for chat training from a local folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_srpo.data.dataset import DataError
from megatron_srpo.data.sentencepiece_folder import MODEL, load_sentencepiece

_DESCRIBED = ("tokenizer.json", "tokenizer_config.json")  # with one of these transformers knows what it loads
_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


class Tokenizer(Protocol):
    """What this package uses of a transformers tokenizer (PreTrainedTokenizerBase)."""

    chat_template: Any
    eos_token_id: int | None
    unk_token: str | None
    unk_token_id: int | None

    @property
    def all_special_tokens(self) -> list[str]: ...

    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]: ...

    def __call__(self, text: str | list[str], **options: bool) -> Mapping[str, Any]: ...

    def get_added_vocab(self) -> dict[str, int]: ...

    def apply_chat_template(self, conversation: Sequence[Mapping[str, object]], **options: object) -> str: ...

    def convert_tokens_to_ids(self, tokens: list[str]) -> list[int]: ...

    def encode(self, text: str, **options: bool) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], **options: bool) -> str: ...


def load_tokenizer(path: str) -> Tokenizer:
    """The transformers tokenizer of the folder `path`, which must have a chat template and an end-of-sequence token.

    It never uses the network and never runs code from the folder. DataError with the cure if something is missing.
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


def tokenizer_from(folder: Path) -> Tokenizer:
    """The tokenizer of a folder, also without a chat template. DataError if it cannot be loaded."""
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in _FILES):
        raise DataError(f"{folder} has no tokenizer (tokenizer.json): copy it from the model's repository")
    for path in sorted(folder.iterdir()):
        if path.exists() and not path.is_file() and not path.is_dir():
            raise DataError(f"{path} is a named pipe or a device: expected files only; remove it")
    if (folder / MODEL).is_file() and not any((folder / name).is_file() for name in _DESCRIBED):
        return load_sentencepiece(folder)
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library raises almost any exception for a broken folder
        if not any((folder / name).is_file() for name in _FILES if name != "tokenizer_config.json"):
            cure = "it has no tokenizer.json; copy the tokenizer's files from the model's repository"
            raise DataError(f"the tokenizer in {folder} cannot be loaded: {cure}") from error
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"the tokenizer in {folder} cannot be loaded: {reason[:300]}") from error
