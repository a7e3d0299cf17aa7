"""Keeps the token ids of a run's prompts in its folder, for the next start.

Rendering and encoding 100,000 prompts takes minutes, at every start, resume and evaluation. The file has a digest of
everything that the ids depend on: the messages, the tokenizer, its chat template with its options, and the libraries'
versions. If anything differs, or the file is damaged or absent, the ids are made again.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import numpy as np

from megatron_srpo.core.atomic import atomic_file
from megatron_srpo.data.dataset import Example
from megatron_srpo.data.tokenizer import Tokenizer

FOLDER = "prompts"  # in run.output_dir
FEWEST = 1024  # examples; fewer are rendered about as fast as they are looked up
LIBRARIES = ("transformers", "tokenizers", "jinja2")


class PromptCache:
    """The token ids of one split, [n] lists. `path` is its file; None: nothing is kept."""

    def __init__(
        self, path: Path | None, examples: Sequence[Example], tokenizer: Tokenizer, kwargs: Mapping[str, object]
    ) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)  # the slow tokenizers of transformers have none
        self._path: Path | None = None
        self._count, self._key = len(examples), ""
        if path is not None and backend is not None and len(examples) >= FEWEST:
            self._path = path
            # A bound method, the day that a template writes, is told by its object.
            options = sorted((name, repr(getattr(value, "__self__", value))) for name, value in kwargs.items())
            names = ("chat_template", "special_tokens_map")
            parts = [backend.to_str(), *map(version, LIBRARIES), options, [str(getattr(tokenizer, n)) for n in names]]
            digest = hashlib.blake2b(json.dumps(parts).encode())
            for example in examples:
                digest.update(json.dumps(example.messages).encode() + b"\n")
            self._key = digest.hexdigest()

    def read(self) -> list[list[int]] | None:
        """The ids, by example; None if they have to be made."""
        if self._path is None:
            return None
        with suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile), np.load(self._path) as found:
            ends, ids = found["ends"], found["ids"]
            if str(found["key"]) == self._key and len(ends) == self._count and ends[-1] == len(ids):
                return [part.tolist() for part in np.split(ids, ends[:-1])]
        return None

    def write(self, ids: Sequence[Sequence[int]]) -> None:
        """Keep the ids, if there is room for them."""
        if self._path is None:
            return
        joined = np.fromiter((token for one in ids for token in one), np.int32)
        ends = np.cumsum([len(one) for one in ids])
        with suppress(OSError):
            self._path.parent.mkdir(exist_ok=True)
            with atomic_file(self._path) as aside:
                np.savez(aside, key=self._key, ends=ends, ids=joined)
