"""A vocabulary of real tokens, shared by all tests of the session."""

from __future__ import annotations

import pytest

from modelpack.testing.weights import smollm2_gguf
from modelpack_engine.models.gguf_file import GGUFFile
from modelpack_engine.models.gguf_tokenizer import tokenizer_of
from modelpack_engine.models.tokenizer import Tokenizer
from modelpack_server.structured_output import GrammarVocabulary, grammar_vocabulary

#: The width of the logits: more than the tokenizer has, as models are padded.
WIDTH = 49152 + 64


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return tokenizer_of(GGUFFile.open([smollm2_gguf()]).metadata)


@pytest.fixture(scope="session")
def vocabulary(tokenizer: Tokenizer) -> GrammarVocabulary:
    return grammar_vocabulary(tokenizer, WIDTH)
