"""TextLogprobs: match log-probabilities with the text of a reply, token by token.

A reply's text lacks parts of its tokens: the end token, special tokens, SentencePiece's first
space, the stop string, and markers around reasoning and calls. Text is held back while it may begin
a stop string. `Answer` and the completions route report only the tokens that the text contains.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Iterable
from dataclasses import replace

from modelpack_engine.models.tokenizer import Tokenizer
from modelpack_engine.outputs import TokenLogprob
from modelpack_server.tool_parsers.parts import Part, Reasoning, Text


class TextLogprobs:
    """The log-probabilities of one choice. The `data` of those returned joins to its text.

    Bytes that are not UTF-8 stay as they are in `data`, and are U+FFFD in the text. If
    `skips_special`, the engine has left special tokens out of the text.
    """

    def __init__(self, tokenizer: Tokenizer, *, skips_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_token_ids if skips_special else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._incomplete: list[TokenLogprob] = []  # tokens that begin a character
        #: Tokens, usually one, that make whole characters, which the text was not searched for yet.
        self._waiting: deque[tuple[list[TokenLogprob], str]] = deque()
        self._text = ""  # final text whose tokens are not found yet
        self._is_content = True

    def take(
        self, logprobs: Iterable[TokenLogprob], parts: Iterable[Part], *, ended: bool
    ) -> tuple[TokenLogprob, ...]:
        """Add tokens, and parts of the text that are final; return the tokens of the content."""
        for item in logprobs:
            if item.token_id not in self._skipped:
                self._add(replace(item, data=self._tokenizer.token_bytes(item.token_id)))
        if ended:
            self._add(None)
        found: list[TokenLogprob] = []
        for part in parts:
            if isinstance(part, Text | Reasoning):
                if isinstance(part, Text) != self._is_content:
                    self._match(found, ended=True)
                    self._text, self._is_content = "", not self._is_content
                self._text += part.text
        self._match(found, ended=ended)
        return tuple(found)

    def _add(self, item: TokenLogprob | None) -> None:
        """Add a token with its bytes; None ends an incomplete character."""
        text = self._utf8.decode(item.data or b"" if item else b"", final=item is None)
        if item is not None and item.data:
            self._incomplete.append(item)
        if text and self._incomplete:
            self._waiting.append((self._incomplete, text))
            self._incomplete = []

    def _match(self, found: list[TokenLogprob], *, ended: bool) -> None:
        """Move the tokens of the text to `found`, and drop those that the text does not contain.

        The text begins with a token or with the end of one. A token that reaches beyond the text
        waits for more of it, unless it has `ended`.
        """
        while self._waiting and self._text:
            items, whole = self._waiting.popleft()
            for start in range(len(whole)):
                text = whole[start:]
                if self._text.startswith(text):
                    break
                if text.startswith(self._text):
                    if not ended:
                        self._waiting.appendleft((items, whole))
                        return
                    rest, text = text[len(self._text) :], self._text
                    self._waiting.appendleft((items[-1:], rest))  # of a part of the other kind
                    break
            else:
                continue
            self._text = self._text[len(text) :]
            if self._is_content:
                cut = text != whole
                found += [replace(items[-1], data=text.encode())] if cut else items
