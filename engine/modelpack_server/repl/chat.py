"""A chat with a stored model that runs in this process."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, TypeVar

from modelpack.errors import UsageError
from modelpack_engine.config import EngineConfig
from modelpack_engine.request import SamplingParams
from modelpack_server.conversation.chat import start_chat
from modelpack_server.conversation.served_model import ServedModel
from modelpack_server.conversation.spec import ChatDelta, ChatSpec
from modelpack_server.pool.catalogue import Catalogue
from modelpack_server.pool.memory import device_memory
from modelpack_server.pool.pool import ModelPool
from modelpack_server.pool.settings import ModelSettings
from modelpack_server.tool_parsers.parts import Part, Reasoning, Text

T = TypeVar("T")

#: Where neither the model nor the user says what it is to be.
TEMPERATURE = 0.7

# What a model without a chat template gets: the text itself, to go on with.
_NO_TEMPLATE = "{{ bos_token or '' }}{{ messages | map(attribute='content') | join('\n\n') }}"


class LocalModels:
    """One loaded model at a time, in a pool that nobody else uses. A context manager.

    Calls come from one thread; in it runs the event loop, while a call lasts. Ctrl-C ends a call
    with `KeyboardInterrupt`, and the next may follow.
    """

    def __init__(self, catalogue: Catalogue, config: EngineConfig | None = None) -> None:
        self._catalogue = catalogue
        self._config = config or EngineConfig()
        self._runner = asyncio.Runner()
        self._pool: ModelPool | None = None
        self._lease = AsyncExitStack()
        self._lent: tuple[str, ModelSettings, ServedModel] | None = None

    def __enter__(self) -> LocalModels:
        self._runner.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._runner.run(self._close())
        finally:
            self._runner.__exit__(kind, error, trace)

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Return what `work` returns."""
        return self._runner.run(work)

    def load(self, name: str, settings: ModelSettings | None = None) -> ServedModel:
        """Load a model of the store, after unloading the one before; raises what loading raises.

        Nothing happens if it is loaded, or if there is no model of that name.
        """
        return self.call(self._load(name, settings or ModelSettings()))

    async def _load(self, name: str, settings: ModelSettings) -> ServedModel:
        if self._pool is None:
            memory = await asyncio.to_thread(device_memory, self._config)
            self._pool = ModelPool(self._catalogue, memory=memory, keep_alive=math.inf, grace=0)
        pool = self._pool
        key = (await pool.find(name)).key
        if self._lent is not None:
            if self._lent[:2] == (key, settings):
                return self._lent[2]
            await self._give_back()
            await pool.unload()
        await pool.configure(name, settings)
        model = await self._lease.enter_async_context(pool.lease(name))
        self._lent = key, settings, model
        return model

    async def _give_back(self) -> None:
        self._lent = None
        await self._lease.aclose()

    async def _close(self) -> None:
        await self._give_back()
        if self._pool is not None:
            await self._pool.close()


class Chat:
    """Keeps what was said, so that each question comes after all before.

    `given` are fields of SamplingParams that win over `preset`, which wins over the model's own.
    `max_tokens` is the most of one answer (None: what the context holds). `reasoning` switches
    thinking on or off where the model knows how.
    """

    #: Whether `params` holds what the model's makers say.
    knows_defaults = True

    def __init__(
        self,
        model: ServedModel,
        *,
        system: str = "",
        given: Mapping[str, Any] | None = None,
        preset: str | None = None,
        max_tokens: int | None = None,
        reasoning: bool | None = None,
    ) -> None:
        self.model = model
        self.system = system
        self.given = dict(given or {})
        self.preset = preset
        self.max_tokens = max_tokens
        self.reasoning = reasoning
        self.turns: list[dict[str, Any]] = []

    def clear(self) -> None:
        """Forget what was said; the settings stay."""
        self.turns = []

    async def ask(self, text: str) -> AsyncGenerator[ChatDelta, None]:
        """Yield the answer as it comes; what came is remembered, also if it was interrupted.

        Raises what `start_chat` raises, and then remembers nothing.
        """
        question = {"role": "user", "content": text}
        said: list[Part] = []
        stream = await start_chat(self.model, self._spec([*self.turns, question]))
        async with stream:
            try:
                async for delta in stream:
                    said += delta.parts
                    yield delta
            finally:
                self.remember(question, said)

    def remember(self, question: dict[str, Any], said: Sequence[Part]) -> None:
        """Add a question and its answer to what was said, if there was any."""
        answer = "".join(part.text for part in said if isinstance(part, Text))
        thoughts = "".join(part.text for part in said if isinstance(part, Reasoning))
        if not answer and not thoughts:
            return
        turn = {"role": "assistant", "content": answer}
        if thoughts:
            turn["reasoning_content"] = thoughts
        self.turns += [question, turn]

    def check(self) -> None:
        """Raise `RequestError` if a setting makes no sense."""
        self.params().check(self.model.vocab_size)

    def params(self) -> SamplingParams:
        """Return how answers are sampled: what was given, over the preset, over the model's own."""
        given = dict(self.given)
        if self.preset is None and self.model.default("temperature") is None:
            given.setdefault("temperature", TEMPERATURE)
        return self.model.sampling_params(given, preset=self.preset)

    def _spec(self, turns: list[dict[str, Any]]) -> ChatSpec:
        system = [{"role": "system", "content": self.system}] if self.system else []
        has_template = self.model.tokenizer.chat_template is not None
        return ChatSpec(
            [*system, *turns],
            params=self.params(),
            max_tokens=self.max_tokens or self.model.default("max_tokens"),
            reasoning=self.reasoning,
            template=None if has_template else _NO_TEMPLATE,
        )


def require_chat(model: ServedModel) -> None:
    """Raise `UsageError` for a model that makes vectors, and no text."""
    from modelpack_engine.embedding.async_embedder import AsyncEmbedder

    if isinstance(model.engine, AsyncEmbedder):
        raise UsageError(
            f"{model.name} is an embedding model: it writes no text",
            hint="`modelpack smoke` tries it, `modelpack serve` serves its vectors",
        )
