"""Keeps the token ids of a run's prompts in its folder, for the next start.

Rendering and encoding 100,000 prompts takes minutes, at every start, resume and evaluation. The file is a digest, where
each prompt ends [n] int64, and all ids int32. The digest is of the ids and of everything that they depend on: the
messages, the tokenizer, its chat template with its options, and the libraries' versions. If anything differs, or the
file is damaged or absent, the ids are made again.
"""

from __future__ import annotations

import hashlib
import json
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
        with suppress(OSError):
            data = self._path.read_bytes()
            digest, body = data[: hashlib.blake2b.MAX_DIGEST_SIZE], data[hashlib.blake2b.MAX_DIGEST_SIZE :]
            if digest == self._digest(body):
                ends = np.frombuffer(body, "<i8", self._count)
                return [part.tolist() for part in np.split(np.frombuffer(body, "<i4", offset=ends.nbytes), ends[:-1])]
        return None

    def write(self, ids: Sequence[Sequence[int]]) -> None:
        """Keep the ids, if there is room for them."""
        if self._path is None:
            return
        joined = np.fromiter((token for one in ids for token in one), "<i4")
        ends = np.cumsum([len(one) for one in ids], dtype="<i8")
        body = ends.tobytes() + joined.tobytes()
        with suppress(OSError):
            self._path.parent.mkdir(exist_ok=True)
            with atomic_file(self._path) as aside:
                aside.write_bytes(self._digest(body) + body)

    def _digest(self, body: bytes) -> bytes:
        """Of what the ids depend on, and of the ids."""
        return hashlib.blake2b(self._key.encode() + body).digest()
