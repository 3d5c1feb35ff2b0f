"""A loaded model as the APIs use it: tokenizer, presets, default messages and sampling."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Protocol

from modelpack_engine.async_engine import RequestStream
from modelpack_engine.errors import ContextLengthError, RequestError
from modelpack_engine.models.tokenizer import TextTooLongError, Tokenizer
from modelpack_engine.outputs import EngineStats
from modelpack_engine.request import EngineRequest, SamplingParams
from modelpack_engine.worker.threads import prepare
from modelpack_server.tool_parsers.families import OutputFormat, find_format

if TYPE_CHECKING:
    from modelpack_engine.vision.processor import MediaProcessor


@dataclass(frozen=True, slots=True)
class Preface:
    """A default system prompt, which a conversation may replace, and messages that follow it."""

    system: str = ""
    messages: tuple[dict[str, Any], ...] = ()

    def before(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the messages with the preface before them."""
        own = list(messages)
        system = []
        if own and own[0].get("role") == "system":
            system = [own.pop(0)]
        elif self.system:
            system = [{"role": "system", "content": self.system}]
        return [*system, *self.messages, *own]


class MediaFetcher(Protocol):
    """Fetches pictures and videos from URLs; `api.media_urls.MediaUrls` implements this."""

    def check(self, url: str, param: str) -> None: ...

    def fetched(
        self,
        url: str,
        param: str,
        *,
        owner: str,
        seconds: float,
        max_bytes: int,
        kind: Literal["image", "video"] = "image",
    ) -> AbstractContextManager[bytes]: ...


@dataclass(frozen=True, slots=True)
class RequestContext:
    """Attributes of an API request that apply to each prompt that it submits.

    Prompts share prefixes in the KV cache only if they have the same `cache_salt`. `submitted` is
    called with the model's name and the stream of each prompt. `background` prompts run while no
    others wait. `media_urls` fetches pictures and videos from URLs, if the operator allows hosts.
    """

    cache_salt: bytes = b""
    submitted: Callable[[str, RequestStream], None] | None = None
    background: bool = False
    media_urls: MediaFetcher | None = None


_NO_CONTEXT = RequestContext()
#: The context of the current task's request; a middleware sets it.
request_context: ContextVar[RequestContext] = ContextVar("request_context", default=_NO_CONTEXT)


class ServingEngine(Protocol):
    """The part of an engine that serving uses; `EngineClient` implements it."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def max_model_len(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def picture_processor(self) -> MediaProcessor | None: ...

    @property
    def no_vision(self) -> str: ...

    def check_queue(self) -> None: ...

    async def submit(self, request: EngineRequest) -> RequestStream: ...

    def stats(self) -> EngineStats: ...


class ServedModel:
    """A loaded model under one name.

    `defaults` are fields of SamplingParams for requests that do not set them, `presets` named sets
    of such fields. `preface` comes before every conversation. `reasoning_budget` is the default
    limit of reasoning tokens: 0 switches reasoning off, a negative number means no limit. `adapter`
    is the engine's name of the adapter that its requests use.
    """

    adapter: str | None = None

    def __init__(
        self,
        name: str,
        engine: ServingEngine,
        *,
        model_type: str = "",
        defaults: Mapping[str, Any] | None = None,
        presets: Mapping[str, Mapping[str, Any]] | None = None,
        preface: Preface | None = None,
        reasoning_budget: int | None = None,
    ) -> None:
        self.name = name
        self.engine = engine
        self.model_type = model_type
        self.preface = preface or Preface()
        self.reasoning_budget = reasoning_budget
        self.created = int(time.time())
        self._defaults = dict(defaults or {})
        self._presets = presets or {}

    def with_adapter(self, name: str, *, is_merged: bool = False) -> ServedModel:
        """Return the same model for requests that use an adapter of its engine.

        One that `is_merged` is in the weights: the engine does not know it.
        """
        adapted = copy.copy(self)
        adapted.name = name
        adapted.adapter = None if is_merged else name
        return adapted

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self.engine.tokenizer

    @property
    def max_model_len(self) -> int:
        """The limit of prompt and reply together, in tokens."""
        return self.engine.max_model_len

    @property
    def vocab_size(self) -> int:
        """The width of the model's logits."""
        return self.engine.vocab_size

    @property
    def pictures(self) -> MediaProcessor | None:
        """What places pictures in prompts; None for a model that reads text only."""
        return self.engine.picture_processor

    @cached_property
    def format(self) -> OutputFormat:
        """The format of the model's tool calls and reasoning."""
        return find_format(self.tokenizer.chat_template, model_type=self.model_type)

    async def submit(self, request: EngineRequest) -> RequestStream:
        """Submit a request to the engine, with the adapter and the `request_context`.

        Raises what `EngineClient.submit` raises.
        """
        context = request_context.get()
        salt = context.cache_salt
        request = replace(
            request,
            cache_salt=salt,
            owner=salt,
            background=context.background,
            adapter=self.adapter,
        )
        stream = await self.engine.submit(request)
        if context.submitted is not None:
            context.submitted(self.name, stream)
        return stream

    def sampling_params(
        self, given: Mapping[str, Any], *, preset: str | None = None
    ) -> SamplingParams:
        """Return the parameters of a request: its own fields, then `preset`, then the defaults.

        Raises `RequestError` for an unknown preset and for lists that are too long.
        """
        if preset is not None and preset not in self._presets:
            raise RequestError(
                f"no such preset: {preset!r}; expected one of {', '.join(sorted(self._presets))}",
                param="preset",
            )
        chosen = self._presets[preset] if preset else {}
        params = SamplingParams(**{**self._defaults, **chosen, **given})
        params.check_sizes()
        return params

    def default(self, name: str) -> Any:
        """Return the model's default for a field of SamplingParams, or None."""
        return self._defaults.get(name)

    async def text_prompt(self, prompt: str | list[int]) -> list[int]:
        """Return the token ids of a text; token ids are returned unchanged, the engine checks them.

        Raises `ContextLengthError` for a text that cannot fit into the context.
        """
        if isinstance(prompt, list):
            self.check_room(len(prompt), param="prompt")
            return prompt
        return await prepare(len(prompt), lambda: self.encode(prompt, param="prompt"))

    def encode(
        self, text: str, *, param: str = "messages", add_special_tokens: bool = True
    ) -> list[int]:
        """Return the token ids of a text after `check_text`. Call it in a thread."""
        self.check_text(text, param=param)
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def check_text(self, text: str, *, param: str = "messages") -> None:
        """Raise `ContextLengthError` for a text that cannot fit into the context.

        The check takes no longer than tokenizing a full context.
        """
        try:
            self.tokenizer.check_length(text, self.max_model_len)
        except TextTooLongError as error:
            raise self._too_long(error.at_least, param, least=True) from None

    def check_texts(self, size: int, *, param: str = "messages") -> None:
        """Raise `ContextLengthError` if texts of `size` characters cannot fit."""
        if size > self.tokenizer.max_text_bytes(self.max_model_len):
            least = max(self.max_model_len + 1, size // self.tokenizer.longest_token)
            raise self._too_long(least, param, least=True)

    def check_room(self, prompt_tokens: int, *, param: str = "messages") -> None:
        """Raise `ContextLengthError` if a prompt leaves no room for a reply."""
        if prompt_tokens >= self.max_model_len:
            raise self._too_long(prompt_tokens, param)

    def _too_long(self, tokens: int, param: str, *, least: bool = False) -> ContextLengthError:
        error = ContextLengthError(
            f"the prompt is too long: this model's maximum context length is {self.max_model_len} "
            "tokens, including the reply, but the prompt has "
            f"{'at least ' if least else ''}{tokens}",
            param=param,
            hint="shorten the prompt",
        )
        error.tokens = tokens
        return error

    def token_limit(self, prompt_tokens: int, asked: int | None, *, param: str = "messages") -> int:
        """Return the limit of generated tokens: `asked`, at most the room left in the context.

        Raises `ContextLengthError` with `param` if the prompt leaves no room.
        """
        self.check_room(prompt_tokens, param=param)
        room = self.max_model_len - prompt_tokens
        return room if asked is None else min(asked, room)
