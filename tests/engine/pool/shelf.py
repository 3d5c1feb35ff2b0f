"""A catalogue of models with fake engines, and a clock that tests set."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

from modelpack.errors import NotFoundError
from modelpack_engine.async_engine import EngineState
from modelpack_engine.core.metrics import Meter
from modelpack_engine.errors import LoadCancelledError, ModelLoadError
from modelpack_engine.models.load_budget import checkpoint
from modelpack_engine.outputs import EngineStats
from modelpack_server.pool.catalogue import LoadedEngine, StoredModel
from modelpack_server.pool.pool import ModelPool
from modelpack_server.pool.settings import ModelSettings

#: The largest context of each model, in tokens.
MOST_CONTEXT = 10_000


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class IdleEngine:
    """A fake engine; its shelf counts `memory_bytes` until it is closed."""

    def __init__(self, shelf: Shelf, key: str, memory: int, context: int) -> None:
        self.shelf = shelf
        self.key = key
        self.memory_bytes = memory
        self.max_model_len = context
        self.vocab_size = 10
        self.picture_processor, self.no_vision = None, ""
        self.state, self.failure = EngineState.READY, ""
        shelf.alive.append(self)

    @property
    def tokenizer(self) -> object:
        raise AssertionError("nobody asks it anything")

    async def submit(self, *arguments: object, **named: object) -> object:
        raise AssertionError("nobody asks it anything")

    def stats(self) -> EngineStats:
        return EngineStats(num_finished=1, blocks_total=5)

    def close(self) -> None:
        self.state = EngineState.STOPPED
        self.shelf.alive.remove(self)


class Shelf:
    """Models by name, with the memory that each takes. `fails` names those that do not load.

    No model loads with a context of more than `most_loaded` tokens. The engines of those that
    `dies` names are dead once they are loaded. A load of a model in `hangs` lasts until the event
    is set or its budget is spent, which those in `deaf` ignore.
    """

    def __init__(self, **sizes: int) -> None:
        self.sizes = sizes
        self.alive: list[IdleEngine] = []
        self.loads: list[str] = []
        self.fails: set[str] = set()
        self.dies: set[str] = set()
        self.hangs: dict[str, threading.Event] = {}
        self.deaf: set[str] = set()
        self.cancelled: list[str] = []
        self.begun: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.index = 0
        self.most_loaded = MOST_CONTEXT

    def version(self) -> object:
        return self.index

    def find(self, name: str) -> StoredModel:
        name = name.removeprefix("ai/")
        if name not in self.sizes:
            raise NotFoundError(f"there is no model {name!r}")
        return StoredModel(f"sha256:{name}", (name, f"ai/{name}"), size=self.sizes[name])

    def stored(self) -> Sequence[StoredModel]:
        return [self.find(name) for name in self.sizes]

    def needs(self, model: StoredModel, settings: ModelSettings, limit: int | None = None) -> int:
        if (settings.context_size or 0) > MOST_CONTEXT:
            raise ModelLoadError(f"this model's context is {MOST_CONTEXT}")
        return model.size

    def load(
        self, model: StoredModel, settings: ModelSettings, meter: Meter, room: int | None
    ) -> LoadedEngine:
        self.begun.append(model.names[0])
        self.gate.wait(10)
        hang = self.hangs.get(model.names[0])
        while hang is not None and not hang.wait(0.001):
            if model.names[0] not in self.deaf:
                self._check(model.names[0])
        self.loads.append(model.names[0])
        if model.names[0] in self.fails:
            raise ModelLoadError(f"{model.names[0]} is damaged")
        context = settings.context_size or 100
        if context > self.most_loaded:
            raise ModelLoadError(f"{model.names[0]} has no room for {context}")
        engine = IdleEngine(self, model.key, model.size, context)
        if model.names[0] in self.dies:
            engine.state = EngineState.FAILED
        return LoadedEngine(engine, defaults={"top_p": 0.5})  # type: ignore[arg-type]

    async def started(self, name: str) -> None:
        """Return once the load of a model runs in its thread."""
        while name not in self.begun:
            await asyncio.sleep(0)

    def _check(self, name: str) -> None:
        try:
            checkpoint()
        except LoadCancelledError:
            self.cancelled.append(name)
            raise


def pool_over(shelf: Shelf, clock: Clock | None = None, **options: object) -> ModelPool:
    """Return a pool without a grace period for streams."""
    given = {"grace": 0.0, "keep_alive": 100.0} | options
    return ModelPool(shelf, clock=clock or Clock(), **given)  # type: ignore[arg-type]
