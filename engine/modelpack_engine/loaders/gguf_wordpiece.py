"""WordPiece out of GGUF's metadata, as BERT's encoders have it.

A file marks the pieces that begin a word with ▁ and leaves those that go on bare, where BERT's own
vocabulary marks the latter with ##. Source: llama.cpp's conversion of BertModel, and
llm_tokenizer_wpm in src/llama-vocab.cpp.
"""

from __future__ import annotations

from collections.abc import Sequence

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from modelpack_engine.loaders.gguf_file import Metadata
from modelpack_engine.loaders.tokenizer import Tokenizer, TokenText

_KEY = "tokenizer.ggml."
_UNKNOWN, _CONTROL = 2, 3  # token types of llama.cpp


def wordpiece_of(metadata: Metadata, tokens: Sequence[str], types: Sequence[int]) -> Tokenizer:
    """Return the tokenizer of a vocabulary whose tokenizer.ggml.model is `bert`.

    Raises `ModelLoadError` if it has no tokens to begin and to end a text with.
    """
    pieces = [_piece(token, kind) for token, kind in zip(tokens, types, strict=False)]
    ids = {piece: at for at, piece in enumerate(pieces)}
    if len(ids) != len(pieces):
        raise metadata.error("the vocabulary holds a piece twice")
    first = _named(metadata, pieces, ("cls_token_id", "bos_token_id"), "[CLS]")
    # The key is misspelt in llama.cpp, and so in every file.
    last = _named(metadata, pieces, ("seperator_token_id", "eos_token_id"), "[SEP]")
    unknown = _named(metadata, pieces, ("unknown_token_id",), "[UNK]")
    check_surrounding(metadata, first, last)
    backend = tokenizers.Tokenizer(models.WordPiece(ids, unk_token=unknown))
    # Files do not say whether a model knows case; its vocabulary does.
    lowered = not any(
        piece != piece.lower()
        for piece, kind in zip(pieces, types, strict=False)
        if kind not in (_UNKNOWN, _CONTROL) and not piece.startswith("[")
    )
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowered)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    special = [
        piece for piece, kind in zip(pieces, types, strict=False) if kind in (_UNKNOWN, _CONTROL)
    ]
    backend.add_special_tokens([*dict.fromkeys((*special, first, last, unknown))])
    backend.post_processor = processors.TemplateProcessing(
        # Lists, since a token with spaces would be several parts of a string.
        single=[first, "$A", last],
        pair=[first, "$A", last, "$B:1", f"{last}:1"],
        special_tokens=[(first, ids[first]), (last, ids[last])],
    )
    return Tokenizer(
        backend,
        text=TokenText.OTHER,
        eos_token_ids=[ids[last]],
        bos=ids[first],
        special_tokens={"cls_token": first, "sep_token": last, "unk_token": unknown},
    )


def check_surrounding(metadata: Metadata, *tokens: str) -> None:
    """Raise `ModelLoadError` for a token to put around texts that would stand for the text."""
    for token in tokens:
        if token.startswith("$"):
            raise metadata.error(f"the token {token[:40]!r} cannot be put around a text")


def _piece(token: str, kind: int) -> str:
    """Return a token as BERT's vocabulary has it."""
    if token.startswith("▁"):
        return token[1:]
    bracketed = len(token) > 2 and token.startswith("[") and token.endswith("]")
    if kind in (_UNKNOWN, _CONTROL) or bracketed:
        return token
    return f"##{token}"


def _named(metadata: Metadata, pieces: Sequence[str], keys: Sequence[str], usual: str) -> str:
    """Return the piece that the first of `keys` names, or the usual one."""
    for key in keys:
        if f"{_KEY}{key}" in metadata:
            at = metadata.integer(f"{_KEY}{key}")
            if 0 <= at < len(pieces):
                return pieces[at]
    if usual not in pieces:
        raise metadata.error(f"the vocabulary has no {usual}, and {keys[0]} names none")
    return usual
