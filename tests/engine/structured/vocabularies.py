"""Tokenizers of single bytes with additional special tokens."""

from __future__ import annotations

from collections.abc import Sequence

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from modelpack_engine.models.tokenizer import Tokenizer, TokenText


def byte_tokenizer(special: Sequence[str], added: Sequence[str] = ()) -> Tokenizer:
    """A token for each byte, then `<eos>`, special tokens, and added tokens that are text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    order = {character: at for at, character in enumerate(alphabet)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=order, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<eos>", *special])
    backend.add_tokens([AddedToken(text, normalized=False, special=False) for text in added])
    return Tokenizer(backend, text=TokenText.BYTE_LEVEL, eos_token_ids=[256])


def sentencepiece_tokenizer() -> Tokenizer:
    """A tokenizer with a mark for spaces, which adds a space before each text."""
    pieces = ["<unk>", "</s>", "▁", "a", "b", "▁a", "ab", "{", '"', "é", "▁ab", ":", "}", "1"]
    vocab = {piece: at for at, piece in enumerate(pieces)}
    vocab |= {f"<0x{byte:02X}>": len(pieces) + byte for byte in range(256)}
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b")]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True)
    )
    backend.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.add_special_tokens(["<unk>", "</s>"])
    return Tokenizer(
        backend, text=TokenText.SENTENCEPIECE, eos_token_ids=[1], strip_leading_space=True
    )
