"""The API with a scripted engine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from starlette.testclient import TestClient

from modelpack.errors import NotFoundError
from modelpack_engine.async_engine import EngineState
from modelpack_engine.core.metrics import Meter
from modelpack_server.api.app import create_app
from modelpack_server.pool.catalogue import LoadedEngine, StoredModel
from modelpack_server.pool.pool import ModelPool
from modelpack_server.pool.settings import ModelSettings
from tests.engine.scripted import ScriptedEngine


class ScriptedCatalogue:
    """A catalogue with one model, "m" or "ai/m:v1", with a given engine."""

    def __init__(self, engine: ScriptedEngine) -> None:
        self.engine = engine
        self.loads = 0

    def version(self) -> object:
        return 1

    def find(self, name: str) -> StoredModel:
        if name not in ("m", "ai/m:v1"):
            raise NotFoundError(f"there is no model {name!r}")
        return self.stored()[0]

    def stored(self) -> list[StoredModel]:
        return [StoredModel("sha256:m", ("m", "ai/m:v1"), size=7, architecture="llama")]

    def needs(self, model: StoredModel, settings: ModelSettings, limit: int | None = None) -> int:
        return 7

    def load(
        self, model: StoredModel, settings: ModelSettings, meter: Meter, room: int | None
    ) -> LoadedEngine:
        self.loads += 1
        self.engine.state = EngineState.READY  # a test may have unloaded it
        return LoadedEngine(self.engine)


@dataclass
class Scripted:
    """A client of the API, and its engine."""

    http: TestClient
    engine: ScriptedEngine
    catalogue: ScriptedCatalogue

    def chat(self, *pieces: str, **body: Any) -> Any:
        """Request a chat completion with the output `pieces`; return the response."""
        if pieces:
            self.engine.pieces = list(pieces)
        path = body.pop("path", "/v1/chat/completions")
        given = {"model": "m", "messages": [{"role": "user", "content": "hello"}]} | body
        return self.http.post(path, json=given)


@pytest.fixture
def api() -> Iterator[Scripted]:
    engine = ScriptedEngine()
    catalogue = ScriptedCatalogue(engine)
    pool = ModelPool(catalogue, memory=100, grace=0.0)
    app = create_app(pool)
    with TestClient(app, raise_server_exceptions=False) as http:
        yield Scripted(http, engine, catalogue)
