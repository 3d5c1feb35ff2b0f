"""ServedModel: a loaded model as the APIs use it: its engine, and what it does by default."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from functools import cached_property
from typing import Any, Protocol

from modelpack_engine.conversation.preface import Preface
from modelpack_engine.errors import ContextLengthError, RequestError
from modelpack_engine.loaders.tokenizer import Tokenizer
from modelpack_engine.output.formats import OutputFormat, find_format
from modelpack_engine.outputs import EngineStats
from modelpack_engine.request_stream import RequestStream
from modelpack_engine.sampling_params import SamplingParams

#: Called with each request that this context submits: who traces requests sets it.
on_submit: ContextVar[Callable[[str, RequestStream], None] | None] = ContextVar(
    "on_submit", default=None
)


class ServingEngine(Protocol):
    """What is used of an engine; `AsyncEngine` is one."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def max_model_len(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    async def submit(
        self,
        token_ids: Sequence[int],
        params: SamplingParams,
        *,
        n: int = 1,
        continues_text: bool = False,
    ) -> RequestStream: ...

    def stats(self) -> EngineStats: ...


class ServedModel:
    """A model that is ready to answer, under one name.

    `defaults` are fields of SamplingParams that count where a request says nothing, `presets` sets
    of such fields that a request may name. `preface` comes before every conversation.
    `reasoning_budget` is the most tokens of reasoning where a request says nothing of it: 0 is
    none, below 0 as many as it likes.
    """

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

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self.engine.tokenizer

    @property
    def max_model_len(self) -> int:
        """The longest prompt and answer together, in tokens."""
        return self.engine.max_model_len

    @property
    def vocab_size(self) -> int:
        """The number of the model's logits."""
        return self.engine.vocab_size

    @cached_property
    def format(self) -> OutputFormat:
        """How the model writes tool calls and reasoning."""
        return find_format(self.tokenizer.chat_template, model_type=self.model_type)

    async def submit(
        self,
        token_ids: Sequence[int],
        params: SamplingParams,
        *,
        n: int = 1,
        continues_text: bool = False,
    ) -> RequestStream:
        """Hand a request to the engine; what it raises is `AsyncEngine.submit`'s."""
        stream = await self.engine.submit(token_ids, params, n=n, continues_text=continues_text)
        if (notice := on_submit.get()) is not None:
            notice(self.name, stream)
        return stream

    def sampling_params(
        self, given: Mapping[str, Any], *, preset: str | None = None
    ) -> SamplingParams:
        """Return the parameters of a request: the fields that it gives, over `preset`, over the
        model's defaults. Raises `RequestError` for a preset that does not exist.
        """
        if preset is not None and preset not in self._presets:
            raise RequestError(
                f"there is no preset {preset!r}; there are {', '.join(sorted(self._presets))}",
                param="preset",
            )
        chosen = self._presets[preset] if preset else {}
        return SamplingParams(**{**self._defaults, **chosen, **given})

    def default(self, name: str) -> Any:
        """Return the model's default of a field of SamplingParams, None if it has none."""
        return self._defaults.get(name)

    async def text_prompt(self, prompt: str | list[int]) -> list[int]:
        """Return the token ids of a text; ids are checked by the engine."""
        if isinstance(prompt, list):
            return prompt
        return await asyncio.to_thread(self.tokenizer.encode, prompt)

    def token_limit(self, prompt_tokens: int, asked: int | None, *, param: str = "messages") -> int:
        """Return how many tokens may be generated: what was asked for, or what the context holds.

        Raises `ContextLengthError`, naming `param`, if the prompt leaves no room.
        """
        context = self.max_model_len
        if prompt_tokens >= context:
            raise ContextLengthError(
                f"the prompt has {prompt_tokens} tokens, and the context of this model holds "
                f"{context}, the answer included",
                param=param,
                hint="shorten the prompt",
            )
        room = context - prompt_tokens
        return room if asked is None else min(asked, room)
