"""The protocol by which a pool finds, sizes and loads models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from modelpack.operations.remote import RemoteOptions
from modelpack.store.layout import LayoutStore
from modelpack_engine.async_engine import EngineState
from modelpack_engine.core.metrics import Meter
from modelpack_server.conversation.served_model import Preface, ServingEngine
from modelpack_server.pool.settings import ModelSettings


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A model that could be loaded; `key` stands for its content, whatever it is called.

    `names` are what it is called, the best first; `origins` the repositories that it was pulled
    from. Both are of the store, never of what a user typed. `size` is that of its files, in bytes.
    """

    key: str
    names: tuple[str, ...]
    origins: tuple[str, ...] = ()
    size: int = 0
    created: int = 0
    context_size: int | None = None
    architecture: str = ""
    parameters: str = ""
    quantization: str = ""
    format: str = ""


class PooledEngine(ServingEngine, Protocol):
    """An engine that a pool runs; `memory_bytes` are those of its weights and its KV cache."""

    @property
    def state(self) -> EngineState: ...

    @property
    def memory_bytes(self) -> int: ...

    def close(self) -> None:
        """Stop it; requests that have not ended fail. Returns when its memory is free."""


@dataclass(frozen=True, slots=True)
class LoadedEngine:
    """What loading a model gives; `defaults` are what its makers would have it sampled with, and
    `preface` what they put before every conversation.
    """

    engine: PooledEngine
    model_type: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    preface: Preface = field(default_factory=Preface)


class Catalogue(Protocol):
    """What a pool is over. `find`, `stored`, `needs` and `load` run in threads.

    `store` is where the models are, for the routes that change it. `remote` says how they reach
    registries and who has to have signed a model; it applies to pulling and to loading.
    """

    store: LayoutStore
    remote: RemoteOptions

    def version(self) -> object:
        """Return something that differs once a name may stand for another model; quick."""
        ...

    def find(self, name: str) -> StoredModel:
        """Return the model that a user calls so; raise `NotFoundError`."""
        ...

    def stored(self) -> Sequence[StoredModel]:
        """Return all models."""
        ...

    def needs(self, model: StoredModel, settings: ModelSettings) -> int:
        """Return roughly how many bytes of memory the loaded model will take."""
        ...

    def load(
        self, model: StoredModel, settings: ModelSettings, meter: Meter, room: int | None
    ) -> LoadedEngine:
        """Load a model into at most `room` bytes (None: as there are); takes its time.

        Raises `EngineError`; `OutOfMemoryError` if it does not fit.
        """
        ...
