"""Small tokenizers of every kind that the detokenizer meets, trained in the tests. No files, no network."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

SPECIAL = ["<s>", "</s>", "<|ümlaut und leer|>"]
"""The last one is written with characters that byte-level vocabularies use for bytes, and with a space."""

_TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the dog doesn't mind.",
    "Ein hübscher Fuchs springt über den faulen Hund, größer als je zuvor!",
    "你好，世界。这是一个测试。日本語のテキストもあります。",
    "😀 😁 🎉 👩‍👩‍👧‍👦 emoji and text, then more text",
]
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level_bpe() -> Tokenizer:
    """As GPT-2, Llama 3 and Qwen have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_TEXTS, trainer)
    return tokenizer


def byte_fallback_bpe() -> Tokenizer:
    """As Llama 2 has it: pieces with "▁" for a space, bytes for what is not in the vocabulary."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"], show_progress=False)
    trained.train_from_iterator(_TEXTS[:2], trainer)
    vocab = {piece: i for piece, i in trained.get_vocab().items() if len(piece) == 1 or piece == "<unk>"}
    vocab = {piece: i for i, piece in enumerate(["<unk>", *_BYTES, *sorted(set(vocab) - {"<unk>"})])}
    merges = []
    for piece in sorted(trained.get_vocab(), key=len):
        for cut in range(1, len(piece)):
            if piece not in vocab and piece[:cut] in vocab and piece[cut:] in vocab:
                vocab[piece] = len(vocab)
                merges.append((piece[:cut], piece[cut:]))
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def byte_fallback_unigram() -> Tokenizer:
    """As SentencePiece models of the unigram kind have it."""
    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=120, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    trained.train_from_iterator(_TEXTS[:2], trainer)
    pieces = sorted(set(trained.get_vocab()) - {"<unk>"})
    vocab = [("<unk>", 0.0), *((byte, -20.0) for byte in _BYTES), *((piece, -float(len(piece))) for piece in pieces)]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return tokenizer


def wordpiece() -> Tokenizer:
    """As BERT has it: the decoder puts a space before every token that doesn't go on with a word."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]"], show_progress=False)
    tokenizer.train_from_iterator(_TEXTS[:2], trainer)
    return tokenizer


def wrapped(tokenizer: Tokenizer) -> Any:
    """The tokenizer in Hugging Face's class, with the special tokens added."""
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )


def python_bytes() -> Any:
    """A tokenizer without a Rust backend: one token per byte."""
    return ByT5Tokenizer(extra_ids=3)
