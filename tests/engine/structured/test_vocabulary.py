"""The bytes of tokens, for all kinds of tokenizers."""

from __future__ import annotations

import gc
import weakref

import pytest

from modelpack_engine.errors import RequestError
from modelpack_engine.models.tokenizer import Tokenizer, TokenText
from modelpack_server.structured_output import (
    Constraint,
    GrammarVocabulary,
    compile_constraint,
    grammar_vocabulary,
)
from tests.engine.structured.vocabularies import byte_tokenizer, sentencepiece_tokenizer
from tests.engine.structured.walking import bits_of, walk


def first(tokenizer: Tokenizer, regex: str) -> set[bytes]:
    """The tokens that may begin a text."""
    grammar = compile_constraint(Constraint("regex", regex), grammar_vocabulary(tokenizer))
    return {tokenizer.token_bytes(token) for token in bits_of(grammar.mask().allowed())}


def test_sentencepiece_puts_no_space_before_what_goes_on() -> None:
    tokenizer = sentencepiece_tokenizer()
    assert first(tokenizer, "(ab|é)x") == {b"a", b"ab", "é".encode(), b"\xc3"}
    assert first(tokenizer, "abx") == {b"ab"}  # as in the tokenizer, without a space before it
    assert first(tokenizer, "( ab| b)x") == {b" ", b" a", b" ab"}


@pytest.mark.parametrize("seed", range(4))
def test_bytes_stand_in_for_characters_without_a_piece(seed: int) -> None:
    tokenizer = sentencepiece_tokenizer()
    grammar = compile_constraint(Constraint("regex", "[東京]{3}"), grammar_vocabulary(tokenizer))
    text = walk(grammar, tokenizer, seed)
    assert text is not None
    assert len(text) == 3
    assert set(text) <= set("東京")


def test_added_tokens_that_are_no_special_ones_are_text() -> None:
    tokenizer = byte_tokenizer(["<|a|>"], ["<tool_call>"])
    assert first(tokenizer, "<.*") == {b"<", b"<tool_call>"}
    vocabulary = grammar_vocabulary(tokenizer)
    assert vocabulary.markup('<|a|>"é<tool_call>') == '<[257]> "\\"é<tool_call>"'
    assert vocabulary.markup("") == '""'
    assert vocabulary.special_token("<|a|>") == 257
    assert vocabulary.special_token("<tool_call>") is None


def test_a_tokenizer_with_holes_and_no_special_tokens() -> None:
    tokenizer = byte_tokenizer([])
    holes = grammar_vocabulary(tokenizer, 300)
    grammar = compile_constraint(Constraint("regex", "[ab]+"), holes)
    assert {tokenizer.token_bytes(t) for t in bits_of(grammar.mask().allowed())} == {b"a", b"b"}


def test_a_model_without_an_end_is_refused() -> None:
    plain = byte_tokenizer([])
    endless = Tokenizer(plain._backend, text=TokenText.BYTE_LEVEL, eos_token_ids=[])
    with pytest.raises(RequestError, match="end-of-text token"):
        grammar_vocabulary(endless)


def test_a_vocabulary_lives_as_long_as_its_tokenizer() -> None:
    tokenizer = byte_tokenizer([])
    vocabulary = grammar_vocabulary(tokenizer, 257)
    assert grammar_vocabulary(tokenizer, 257) is vocabulary
    assert grammar_vocabulary(tokenizer, 258) is not vocabulary
    kept: weakref.ref[GrammarVocabulary] = weakref.ref(vocabulary)
    owner = weakref.ref(tokenizer)
    del tokenizer, vocabulary
    gc.collect()
    assert owner() is None
    assert kept() is None
