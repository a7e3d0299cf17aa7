"""Loads a fast tokenizer from a folder that has only SentencePiece's `tokenizer.model`.

transformers loads such a folder too, but it ignores the model's normalisation (the space before the text, repeated
spaces, Unicode forms), so its tokens are not those that the model was trained on. The tokenizer built here gives
SentencePiece's own tokens, which is checked on a few texts when it is loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_srpo.data.dataset import DataError

if TYPE_CHECKING:
    from sentencepiece.sentencepiece_model_pb2 import ModelProto, NormalizerSpec

MODEL = "tokenizer.model"
SPACE = "▁"
PROBES = (
    "What is 17 + 25?", " Two  spaces,\ttabs\nand lines \n\n of text. ", "naïve ﬁ Ⅷ Ｗide 你好 Здравствуйте 🙂", "x",
    "", '{"name": "f", "arguments": {"a": [1, 2.5e-3, null]}}', r"\boxed{\frac{1}{2}}",
)  # fmt: skip


def load_sentencepiece(folder: Path) -> Any:
    """A transformers tokenizer that gives SentencePiece's tokens. DataError if the model cannot be read, or has an
    option that fast tokenizers cannot express."""
    try:
        from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
    except ImportError:
        raise DataError(f"{folder / MODEL} needs the package sentencepiece: pip install sentencepiece") from None
    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString((folder / MODEL).read_bytes())
        reference = SentencePieceProcessor(model_file=str(folder / MODEL))
    except Exception as error:  # protobuf and sentencepiece raise their own exceptions
        raise DataError(f"{folder / MODEL} is no SentencePiece model ({error}): fetch it again") from None
    tokenizer = _fast(folder / MODEL, proto)
    for text in PROBES:
        ours, theirs = tokenizer.encode(text, add_special_tokens=False), reference.encode(text)
        if ours != theirs:
            raise DataError(
                f"{folder / MODEL}: a fast tokenizer would not give SentencePiece's tokens ({text!r}: {ours}, expected "
                f"{theirs}). Put a tokenizer.json of the model into the folder"
            )
    return tokenizer


def _fast(file: Path, proto: ModelProto) -> Any:
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import SpmConverter, generate_merges

    spec, prefixed = proto.trainer_spec, proto.normalizer_spec.add_dummy_prefix
    scores = [(piece.piece, piece.score) for piece in proto.pieces]
    vocabulary = {piece: number for number, (piece, _) in enumerate(scores)}
    if spec.model_type == spec.BPE:
        merges = generate_merges(vocabulary, dict(scores))
        backend = SpmConverter.build_tokenizer_from_spm_proto(proto, vocabulary, merges)
    else:
        backend = SpmConverter.build_tokenizer_from_spm_proto(proto, scores)
    for piece in proto.pieces:
        if piece.type in (piece.CONTROL, piece.USER_DEFINED):
            backend.add_tokens([AddedToken(piece.piece, normalized=False, special=piece.type == piece.CONTROL)])
    backend.normalizer = _normalizer(proto.normalizer_spec)
    backend.pre_tokenizer = _spaces(prefixed)
    backend.decoder = _decoder(prefixed)
    ids = {"bos_token": spec.bos_id, "eos_token": spec.eos_id, "unk_token": spec.unk_id, "pad_token": spec.pad_id}
    special = {name: proto.pieces[index].piece for name, index in ids.items() if index >= 0}
    template = file.with_name("chat_template.jinja")
    if template.is_file():
        special["chat_template"] = template.read_text(encoding="utf-8")
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special)


def _normalizer(spec: NormalizerSpec) -> Any:
    """SentencePiece's normalisation of characters and spaces."""
    from tokenizers import Regex, normalizers

    steps: list[Any] = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    if spec.remove_extra_whitespaces:
        ends = r" +\z" if spec.add_dummy_prefix else r"\A +| +\z"
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Replace(Regex(ends), "")]
    elif spec.add_dummy_prefix:
        steps.append(normalizers.Replace(Regex(r"\A "), f"{SPACE} "))
    return normalizers.Sequence(steps)


def _spaces(prefixed: bool) -> Any:
    """Replaces spaces by the visible sign, and if `prefixed` adds one before the text, not after special tokens."""
    from tokenizers import pre_tokenizers

    return pre_tokenizers.Metaspace(SPACE, prepend_scheme="first" if prefixed else "never", split=False)


def _decoder(prefixed: bool) -> Any:
    from tokenizers import decoders

    strip = [decoders.Strip(" ", 1, 0)] if prefixed else []
    return decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
