"""The protocol by which a pool finds, sizes and loads models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from modelpack.operations.remote import RemoteOptions
from modelpack.store.layout import LayoutStore
from modelpack_engine.async_engine import EngineState
from modelpack_engine.core.metrics import Meter
from modelpack_server.conversation.served_model import Preface, ServingEngine
from modelpack_server.pool.settings import ModelSettings


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A model that can be loaded; `key` identifies its content.

    `names` are its names in the store, the preferred one first; `origins` are the repositories from
    which it was pulled. Neither contains what a user typed. `size` is the size of its files, in
    bytes. `purpose` is empty for files that the engine cannot load; `reads_pictures` says that it
    takes pictures with the extra `vision` that is installed, `reads_sounds` the same of sounds with
    the extra `audio`, and `reads_videos` of videos with the extra `video`. `templated` are the
    capabilities that its chat template has here, `tools` and `reasoning`. For an adapter, `base` is
    the key of the model that it changes, whose engine knows it as `adapter`. `merged` is the name
    of the adapter that is merged into the weights, of the base too, which cannot be used without
    it.
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
    purpose: Literal["", "generation", "embedding", "ranking", "transcription"] = "generation"
    reads_pictures: bool = False
    reads_sounds: bool = False
    reads_videos: bool = False
    templated: tuple[str, ...] = ()
    base: str = ""
    adapter: str = ""
    merged: str = ""


class PooledEngine(ServingEngine, Protocol):
    """An engine that a pool runs; `memory_bytes` is the size of its weights and its KV cache.

    `failure` says why its state is FAILED.
    """

    @property
    def state(self) -> EngineState: ...

    @property
    def failure(self) -> str: ...

    @property
    def memory_bytes(self) -> int: ...

    def close(self) -> None:
        """Stop the engine; running requests fail. Returns when its memory is free."""


@dataclass(frozen=True, slots=True)
class LoadedEngine:
    """A loaded model: its engine, the sampling `defaults` of its publisher, and the `preface` that
    the publisher puts before every conversation.
    """

    engine: PooledEngine
    model_type: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    preface: Preface = field(default_factory=Preface)


class Catalogue(Protocol):
    """The source of a pool's models. `find`, `stored`, `needs` and `load` run in threads.

    `store` contains the models, for routes that change it. `remote` has the options for registries
    and the trust policy, which applies to pulling and to loading.
    """

    store: LayoutStore
    remote: RemoteOptions

    def version(self) -> object:
        """Return a value that changes whenever a name may refer to another model; must be fast."""

    def find(self, name: str) -> StoredModel:
        """Return the model with this name; raise `NotFoundError`."""

    def uses_drafters(self, settings: ModelSettings) -> bool:
        """Return whether models with `settings` run with the drafters that the store has."""

    def stored(self) -> Sequence[StoredModel]:
        """Return all models."""

    def needs(self, model: StoredModel, settings: ModelSettings, limit: int | None = None) -> int:
        """Return an estimate of the loaded model's memory, in bytes.

        A drafter that the user did not ask for is left out if it would exceed `limit` bytes.
        Raises `ModelLoadError` for settings that the model cannot have, such as a longer context.
        """

    def load(
        self, model: StoredModel, settings: ModelSettings, meter: Meter, room: int | None
    ) -> LoadedEngine:
        """Load a model into at most `room` bytes (None: no limit), which may take minutes.

        Raises `EngineError`; `OutOfMemoryError` if it does not fit.
        """
