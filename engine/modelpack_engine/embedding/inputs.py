"""Inputs: texts, token ids or pairs of texts become what the model reads, within its limit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from modelpack_engine.errors import ContextLengthError, RequestError
from modelpack_engine.loaders.tokenizer import Tokenizer

#: A text, or its token ids, which are taken as they are.
Input = str | Sequence[int]


@dataclass(frozen=True, slots=True)
class Prepared:
    """Token ids with their types; the first `skipped` are a prompt that pooling leaves out."""

    token_ids: tuple[int, ...]
    type_ids: tuple[int, ...]
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class InputReader:
    """Turns inputs into tokens. Thread-safe; makes no call to MLX."""

    tokenizer: Tokenizer
    vocab_size: int
    max_length: int
    lowers_text: bool = False

    def read(
        self,
        index: int,
        given: Input,
        *,
        noun: str = "input",
        prompt: str = "",
        truncate: bool = False,
    ) -> Prepared:
        """Return the tokens of input number `index`, `prompt` before a text.

        `noun` is what errors call it, and the field that they name.
        Raises `RequestError` for one that is empty, and `ContextLengthError`, unless `truncate`
        cuts it, for one that is longer than `max_length`; both name the index.
        """
        if isinstance(given, str):
            if not given:
                raise RequestError(f"{noun} {index} is empty", param=noun)
            ids, types = self._encode(prompt + given, None, truncate)
        else:
            ids = list(given)[: self.max_length] if truncate else list(given)
            types = [0] * len(ids)
            for token_id in ids:
                if not 0 <= token_id < self.vocab_size:
                    raise RequestError(
                        f"{noun} {index} holds the token {token_id};"
                        f" the vocabulary has {self.vocab_size}",
                        param=noun,
                    )
        self._check(f"{noun} {index}", len(ids), noun)
        return Prepared(tuple(ids), tuple(types))

    def read_pair(
        self, index: int, query: str, document: str, *, truncate: bool = False
    ) -> Prepared:
        """Return the tokens of a pair, as `read` does; the longer of the two is cut."""
        ids, types = self._encode(query, document, truncate)
        self._check(f"the query with document {index}", len(ids), "documents")
        return Prepared(tuple(ids), tuple(types))

    def prompt_length(self, prompt: str) -> int:
        """Return how many tokens at the beginning are the prompt's."""
        ids, _ = self._encode(prompt, None, False)
        return len(ids) - (ids[-1] in self.tokenizer.special_token_ids if ids else 0)

    def _encode(self, text: str, pair: str | None, truncate: bool) -> tuple[list[int], list[int]]:
        if self.lowers_text:
            text, pair = text.lower(), pair.lower() if pair is not None else None
        limit = self.max_length if truncate else None
        return self.tokenizer.encode_typed(text, pair, max_length=limit)

    def _check(self, what: str, count: int, param: str) -> None:
        if not count:
            raise RequestError(f"{what} has no tokens", param=param)
        if count > self.max_length:
            raise ContextLengthError(
                f"{what} has {count} tokens, the limit of the model is {self.max_length}",
                param=param,
                hint="split the text, or ask for it to be truncated",
            )
