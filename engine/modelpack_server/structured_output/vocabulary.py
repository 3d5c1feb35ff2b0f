"""GrammarVocabulary: a model's tokens as llguidance knows them."""

from __future__ import annotations

import json
import re
import threading
import weakref

from llguidance import LLTokenizer, TokenizerWrapper

from modelpack_engine.errors import RequestError
from modelpack_engine.loaders.tokenizer import Tokenizer
from modelpack_engine.panics import no_panics

_PREFIX = "\x02"  # never joined with its neighbours


class GrammarVocabulary:
    """The tokens that grammars choose from; make it with `grammar_vocabulary`.

    Ids without a token, and those past the end of the model's logits, are never allowed.
    """

    @no_panics("reading the vocabulary")
    def __init__(self, tokenizer: Tokenizer, vocab_size: int | None = None) -> None:
        """Raises `RequestError` if the model has no token that ends a text."""
        size = min(tokenizer.num_ids, vocab_size or tokenizer.num_ids)
        ends = sorted(at for at in tokenizer.eos_token_ids if 0 <= at < size)
        if not ends:
            raise RequestError(
                "structured output needs a token that ends a text, and the model names none",
                param="response_format",
            )
        special = sorted(at for at in tokenizer.special_token_ids if at < size)
        self._special = {tokenizer.token_text(at): at for at in special}
        texts = sorted(self._special, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, texts))) if texts else None
        source = _Source(tokenizer, size, ends[0], special)
        self.tokenizer = LLTokenizer(TokenizerWrapper(source), n_vocab=size, eos_token=ends)

    def special_token(self, text: str) -> int | None:
        """Return the id of the special token with this text, if there is one."""
        return self._special.get(text)

    def markup(self, text: str) -> str:
        """Return a Lark expression for `text`, in which special tokens stand for themselves."""
        return " ".join(self.markup_parts(text)) or '""'

    def markup_parts(self, text: str) -> list[str]:
        """Return the terms of that expression: special tokens, and strings between them."""
        parts, at = [], 0
        for found in self._pattern.finditer(text) if self._pattern else ():
            parts += [quoted(text[at : found.start()]), f"<[{self._special[found[0]]}]>"]
            at = found.end()
        return [part for part in [*parts, quoted(text[at:])] if part]


def quoted(text: str) -> str:
    """Return text as a Lark string; "" for no text."""
    return json.dumps(text, ensure_ascii=False) if text else ""


class _Source:
    """What llguidance asks of a tokenizer: the bytes of its tokens, and how it cuts a text.

    It must not keep the tokenizer alive, which keeps this alive.
    """

    def __init__(self, tokenizer: Tokenizer, size: int, eos: int, special: list[int]) -> None:
        self._tokenizer = weakref.ref(tokenizer)
        self.eos_token_id = eos
        self.bos_token_id = tokenizer.bos
        self.special_token_ids = special
        self.tokens = [tokenizer.token_bytes(at) for at in range(size)]

    def __call__(self, data: bytes) -> list[int]:
        """Return the tokens of a text that goes on after another.

        SentencePiece puts a space before texts: there, a character before it is cut off again.
        """
        text = data.decode(errors="replace")
        tokenizer = self._tokenizer()
        assert tokenizer is not None, "the model was unloaded while a grammar runs"
        if not tokenizer.strips_leading_space:
            return tokenizer.encode(text, add_special_tokens=False, parse_special=False)
        ids = tokenizer.encode(_PREFIX + text, add_special_tokens=False, parse_special=False)
        prefix = b""
        while ids and not prefix.endswith(_PREFIX.encode()):
            prefix += tokenizer.token_bytes(ids.pop(0))
        return ids


_known: weakref.WeakKeyDictionary[Tokenizer, dict[int | None, GrammarVocabulary]] = (
    weakref.WeakKeyDictionary()
)
_lock = threading.Lock()


def grammar_vocabulary(tokenizer: Tokenizer, vocab_size: int | None = None) -> GrammarVocabulary:
    """Return the vocabulary of a tokenizer; the first call takes a second for a large one.

    `vocab_size` is the width of the model's logits, which may be more or less than the tokenizer
    has. Raises `RequestError` if no token ends a text.
    """
    with _lock:
        made = _known.setdefault(tokenizer, {})
        if vocab_size not in made:
            made[vocab_size] = GrammarVocabulary(tokenizer, vocab_size)
        return made[vocab_size]
