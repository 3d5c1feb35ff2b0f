"""A server on a port with the scripted models `PLAIN`, `CALLER` and `THINKER`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from modelpack.errors import NotFoundError
from modelpack_engine.async_engine import EngineState, RequestStream
from modelpack_engine.core.metrics import Meter
from modelpack_engine.outputs import FinishReason
from modelpack_engine.request import EngineRequest
from modelpack_server.api.app import ModelServer
from modelpack_server.pool.catalogue import LoadedEngine, StoredModel
from modelpack_server.pool.pool import ModelPool
from modelpack_server.pool.settings import ModelSettings
from tests.engine.scripted import HERMES, ScriptedEngine
from tests.engine.serving.tiny import TEMPLATE

PLAIN, CALLER, THINKER = "ai/plain:v1", "ai/caller:v1", "ai/thinker:v1"

#: Instructions and tools of coding programs have some 80 kB, and the tiny tokenizer has a token for
#: each byte.
LARGE_CONTEXT = 400_000
TEMPLATES = {
    PLAIN: TEMPLATE,
    CALLER: HERMES,
    THINKER: TEMPLATE
    + "{% if tools %}<tool_call>{{ tools | tojson }}{% endif %}"
    + "{% if enable_thinking is not false %}<think>\n{% endif %}",
}


class TurnsEngine(ScriptedEngine):
    """A scripted engine with a queue of texts for the next requests."""

    turns: list[list[str]]

    async def submit(self, request: EngineRequest) -> RequestStream:
        if self.turns:
            self.pieces = self.turns.pop(0)
        return await super().submit(request)


class EnginesCatalogue:
    """A catalogue of models with given engines."""

    def __init__(self, engines: Mapping[str, TurnsEngine]) -> None:
        self.engines = engines

    def version(self) -> object:
        return 1

    def find(self, name: str) -> StoredModel:
        for model in self.stored():
            if name in model.names:
                return model
        raise NotFoundError(f"there is no model {name!r}")

    def stored(self) -> list[StoredModel]:
        return [
            StoredModel(name, (name,), size=7, created=1_700_000_000, context_size=4096)
            for name in self.engines
        ]

    def needs(self, model: StoredModel, settings: ModelSettings, limit: int | None = None) -> int:
        return 7

    def load(
        self, model: StoredModel, settings: ModelSettings, meter: Meter, room: int | None
    ) -> LoadedEngine:
        engine = self.engines[model.key]
        engine.state = EngineState.READY  # a test may have unloaded it
        return LoadedEngine(engine)


@dataclass
class Served:
    """The server's address, its engines, and the function that stops it."""

    url: str
    engines: Mapping[str, TurnsEngine]
    stop: Callable[[], None]

    def says(self, name: str, *pieces: str, ends: FinishReason = FinishReason.STOP) -> str:
        """Set a model's next text and finish reason; return the model's name."""
        self.engines[name].turns = []
        self.engines[name].pieces = list(pieces)
        self.engines[name].ends = ends
        return name

    def prompt(self, name: str) -> str:
        """Return the latest prompt of a model."""
        return self.engines[name].prompt

    @contextmanager
    def held(self, name: str) -> Iterator[Callable[[Exception], None]]:
        """Hold a model's text back after its first piece; yield a function that fails the call."""
        engine = self.engines[name]
        engine.wait = held = asyncio.Event()
        streams: list[RequestStream] = []

        def fail(error: Exception) -> None:
            streams.append(list(engine._streams.values())[-1])
            streams[-1].loop.call_soon_threadsafe(streams[-1].put, error)

        try:
            yield fail
        finally:
            engine.wait = None
            for stream in streams:
                stream.loop.call_soon_threadsafe(held.set)

    @contextmanager
    def paused(self, name: str) -> Iterator[Callable[[], None]]:
        """Hold a model's texts back after their first piece; yield a function that releases them.

        The end of the block releases them too.
        """
        engine = self.engines[name]
        engine.wait = asyncio.Event()
        try:
            yield engine.release
        finally:
            engine.release()
            engine.wait = None


@contextmanager
def serving() -> Iterator[Served]:
    """Serve the three models."""
    engines = {name: TurnsEngine(template=text) for name, text in TEMPLATES.items()}
    for engine in engines.values():
        engine.turns = []
    catalogue = EnginesCatalogue(engines)
    with ModelServer(
        lambda: ModelPool(catalogue, memory=10_000, grace=0.0),
        address="127.0.0.1:0",
        request_templates=True,
    ) as server:
        yield Served(server.url, engines, server.stop)
