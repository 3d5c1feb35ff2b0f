"""Tokenizer: text to token ids and back, for tokenizer.json and GGUF metadata alike.

It wraps the `tokenizers` library and adds the bytes of every token, so that text can be assembled
during generation, and the chat template.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from functools import cached_property, partial
from types import MappingProxyType
from typing import Any

import tokenizers

from modelpack_engine.errors import RequestError, no_panics
from modelpack_engine.models.chat_template import ChatTemplate

Message = Mapping[str, Any]

_guarded = no_panics("the tokenizer")

# Requests have their own threads; the library's pool adds nothing, and warns of every fork.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

#: Bytes of text per token that are allowed for any tokenizer: some drop blanks, or turn a long
#: unknown word into one token.
_LEAST_BYTES = 128
# Texts of fewer bytes, or of fewer bytes per token, are encoded without counting tokens first.
_SHORT_TEXT = 64 * 1024
_USUAL_BYTES = 4
# `check_length` counts the tokens of parts of `_PART` characters. A cut between two parts adds at
# most `_SLACK` tokens.
_PART = 8192
_SLACK = 16


class TextTooLongError(Exception):
    """A text has too many tokens: `at_least` is a lower bound of their number."""

    def __init__(self, at_least: int) -> None:
        super().__init__(f"at least {at_least} tokens")
        self.at_least = at_least


class TokenText(Enum):
    """How a vocabulary writes the bytes of a token."""

    BYTE_LEVEL = "byte-level"  # GPT-2: every byte is a character
    SENTENCEPIECE = "sentencepiece"  # ▁ is a space, <0x0A> a byte
    OTHER = "other"  # only the library's own decoder knows


class Tokenizer:
    """A tokenizer for any thread. Ids are the model's; `vocab_size` counts those that have text.

    `eos_token_ids` end a text; `bos` is the id that prompts start with, or None.
    """

    @_guarded
    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        text: TokenText,
        eos_token_ids: Iterable[int],
        bos: int | None = None,
        special_tokens: Mapping[str, str] | None = None,
        chat_template: ChatTemplate | None = None,
        strip_leading_space: bool = False,
    ) -> None:
        self._backend = backend
        self._mode = _Mode(backend)
        self._chat_template = chat_template
        self._special_tokens = dict(special_tokens or {})
        #: Whether decoding removes a text's first space, which SentencePiece adds.
        self.strips_leading_space = strip_leading_space
        self.eos_token_ids = frozenset(eos_token_ids)
        self.bos = bos
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        added = backend.get_added_tokens_decoder()
        self.special_token_ids = frozenset(at for at, token in added.items() if token.special)
        self._bytes = {at: token.content.encode() for at, token in added.items()}
        self._text = text

    def __reduce__(self) -> tuple[Callable[[], Tokenizer], tuple[()]]:
        """Pickle the arguments: locks and caches stay here."""
        made = partial(
            Tokenizer,
            self._backend,
            text=self._text,
            eos_token_ids=self.eos_token_ids,
            bos=self.bos,
            special_tokens=self._special_tokens,
            chat_template=self._chat_template,
            strip_leading_space=self.strips_leading_space,
        )
        return made, ()

    @property
    @_guarded
    def num_ids(self) -> int:
        """One more than the highest id: more than `vocab_size` where ids have no token."""
        ids: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        return max(ids.values(), default=-1) + 1

    @property
    def has_chat_template(self) -> bool:
        """Whether the model has a chat template."""
        return self._chat_template is not None

    @property
    def chat_template(self) -> str | None:
        """The text of the model's chat template; if it has two, of the one for tools."""
        if self._chat_template is None:
            return None
        return self._chat_template.tool_use or self._chat_template.source

    @cached_property
    @_guarded
    def longest_token(self) -> int:
        """The most bytes that a token of the vocabulary stands for, or a little more."""
        pieces = self._backend.get_vocab(with_added_tokens=True)
        if self._text is TokenText.BYTE_LEVEL:
            return max(map(len, pieces), default=1)
        return max((len(piece.encode()) for piece in pieces), default=1)

    def max_text_bytes(self, max_tokens: int) -> int:
        """Return the size in bytes above which every text has more than `max_tokens` tokens."""
        return max_tokens * max(self.longest_token, _LEAST_BYTES)

    @_guarded
    def encode(
        self, text: str, *, add_special_tokens: bool = True, parse_special: bool = True
    ) -> list[int]:
        """Return the token ids of `text`; releases the GIL.

        `add_special_tokens` adds the tokens that the model expects around every prompt (often the
        beginning of sequence). Without `parse_special`, `<|im_end|>` is encoded as ordinary text:
        use that for the text of users.
        """
        with self._mode.of(parse_special):
            # Only the calls for batches release the GIL.
            [encoded] = self._backend.encode_batch_fast(
                [_clean(text)], add_special_tokens=add_special_tokens
            )
        ids: list[int] = encoded.ids
        return ids

    @_guarded
    def check_length(self, text: str, max_tokens: int) -> None:
        """Raise `TextTooLongError` for a text that certainly has more than `max_tokens` tokens.

        It takes at most as long as encoding `max_tokens` tokens, however long the text is. A text
        that is a few tokens too long may pass.
        """
        size = _size(text)
        if size <= max(_SHORT_TEXT, max_tokens * _USUAL_BYTES):
            return
        most = self.max_text_bytes(max_tokens)
        if size > most:
            raise TextTooLongError(max(max_tokens + 1, size // self.longest_token))
        count = 0
        for start in range(0, len(text), _PART):
            part = _clean(text[start : start + _PART])
            with self._mode.of(True):
                [encoded] = self._backend.encode_batch_fast([part], add_special_tokens=False)
            count += max(0, len(encoded) - _SLACK)
            if count > max_tokens:
                raise TextTooLongError(count)

    @_guarded
    def encode_typed(
        self, text: str, pair: str | None = None, *, max_length: int | None = None
    ) -> tuple[list[int], list[int]]:
        """Return the ids of `text`, or of `text` and `pair`, and the type of each: 0 or 1 (`pair`).

        Encoders read both. `max_length` cuts off the end of the text, or of the longer of the two,
        and keeps the special tokens; None cuts nothing.
        """
        given: str | tuple[str, str] = _clean(text)
        if pair is not None:
            given = (_clean(text), _clean(pair))
        with self._mode.of(True, max_length):
            [encoded] = self._backend.encode_batch_fast([given], add_special_tokens=True)
        return list(encoded.ids), list(encoded.type_ids)

    @_guarded
    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of `ids`; bytes that are not UTF-8 become U+FFFD.

        Removes the space that SentencePiece puts before a text. To continue another text, join
        `token_bytes` instead.
        """
        if skip_special_tokens:
            ids = [at for at in ids if at not in self.special_token_ids]
        text = b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self.strips_leading_space else text

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a token stands for, b"" for an id without a token.

        Several tokens may make one character, so a token's bytes need not be UTF-8.
        """
        found = self._bytes.get(token_id)
        if found is None:
            found = self._find_bytes(token_id)
            if found:  # at most one entry for each token
                self._bytes[token_id] = found
        return found

    @_guarded
    def _find_bytes(self, token_id: int) -> bytes:
        piece: str | None = self._backend.id_to_token(token_id) if token_id >= 0 else None
        if piece is None:
            return b""
        if self._text is TokenText.BYTE_LEVEL:
            return _byte_level(piece)
        if self._text is TokenText.SENTENCEPIECE:
            return _sentencepiece(piece)
        text: str = self._backend.decode([token_id], skip_special_tokens=False)
        return text.encode()

    @_guarded
    def token_text(self, token_id: int) -> str:
        """Return how the vocabulary writes a token, "" for an id without one."""
        text: str | None = self._backend.id_to_token(token_id) if token_id >= 0 else None
        return text or ""

    @_guarded
    def token_id(self, text: str) -> int | None:
        """Return the id of the token that the vocabulary writes as `text`, or None."""
        found: int | None = self._backend.token_to_id(text)
        return found

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        template: ChatTemplate | None = None,
        variables: Mapping[str, Any] = MappingProxyType({}),
    ) -> str:
        """Return the prompt text of a conversation.

        `template` replaces the model's own. `variables` are those that the template defines
        (`enable_thinking`, …). Raises `RequestError` if there is no template, or if it fails, loops
        or misbehaves.
        """
        template = template or self._chat_template
        if template is None:
            raise RequestError(
                "this model has no chat template",
                param="messages",
                hint="use completions, or package the model with a chat template",
            )
        return template.render(
            {
                "documents": None,  # templates test for it as transformers gives it
                **self._special_tokens,
                **variables,
                "messages": messages,
                "tools": tools,
                "add_generation_prompt": add_generation_prompt,
            }
        )

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> list[int]:
        """Return the token ids of `render_chat`; templates write special tokens themselves."""
        text = self.render_chat(
            messages, tools=tools, add_generation_prompt=add_generation_prompt, variables=variables
        )
        return self.encode(text, add_special_tokens=False)


class _Mode:
    """The switches of a `tokenizers.Tokenizer`, which belong to it and not to a call.

    Calls that need the same switches run at the same time, others one after another.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._free = threading.Condition()
        self._set: tuple[bool, int | None] | None = None
        self._users = 0

    @contextmanager
    def of(self, parse_special: bool, max_length: int | None = None) -> Iterator[None]:
        """Set the switches while the context is open."""
        wanted = (parse_special, max_length)
        with self._free:
            self._free.wait_for(lambda: not self._users or self._set == wanted)
            if self._set != wanted:
                self._set = None  # unknown, should setting them fail
                self._backend.encode_special_tokens = not parse_special
                if max_length is None:
                    self._backend.no_truncation()
                else:
                    self._backend.enable_truncation(max_length, strategy="longest_first")
                self._set = wanted
            self._users += 1
        try:
            yield
        finally:
            with self._free:
                self._users -= 1
                if not self._users:
                    self._free.notify_all()


def _size(text: str) -> int:
    """Return how many bytes a text has in UTF-8, or, where it is not ASCII, a few more at most."""
    return len(text) if text.isascii() else len(text.encode(errors="replace"))


def _clean(text: str) -> str:
    """Return the text with ? for halves of surrogate pairs, which have no UTF-8."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode(errors="replace").decode()
    return text


def _byte_characters() -> dict[str, int]:
    """Return the bytes by GPT-2's characters: printable ones are themselves, the rest from 256."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + at): byte for at, byte in enumerate(others)
    }


_BYTES = _byte_characters()


def _byte_level(piece: str) -> bytes:
    try:
        return bytes([_BYTES[character] for character in piece])
    except KeyError:  # a token that is not written in bytes
        return piece.encode()


def _sentencepiece(piece: str) -> bytes:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        try:
            return bytes([int(piece[3:5], 16)])
        except ValueError:
            pass
    return piece.replace("▁", " ").encode()
