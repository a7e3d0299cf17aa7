"""A real Hugging Face tokenizer (tokenizer.json and chat template) with one token a character."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"


def character_tokenizer(characters: str, chat_template: str) -> PreTrainedTokenizerFast:
    """Ids: 0 <pad>, 1 <eos>, 2 <unk>, then `characters` in order. Encoding adds no special tokens."""
    if len(set(characters)) != len(characters):
        raise ValueError(f"the alphabet repeats characters: {characters!r}")
    vocabulary = {token: index for index, token in enumerate([PAD, EOS, UNKNOWN, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=chat_template,
    )
