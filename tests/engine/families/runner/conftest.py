"""The API with a real store and a scripted engine."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from starlette.testclient import TestClient

import modelpack
from modelpack.store.layout import LayoutStore
from modelpack_engine.core.metrics import Meter
from modelpack_server.api.app import create_app
from modelpack_server.pool.catalogue import LoadedEngine, StoredModel
from modelpack_server.pool.pool import ModelPool
from modelpack_server.pool.settings import ModelSettings
from modelpack_server.pool.store_catalogue import StoreCatalogue
from tests.engine.scripted import ScriptedEngine
from tests.engine.serving.tiny import TEMPLATE
from tests.models import tiny_gguf


class StoredScripts(StoreCatalogue):
    """A catalogue of a store's models, with scripted engines."""

    def __init__(self, store: LayoutStore) -> None:
        super().__init__(store)
        self.engines: list[ScriptedEngine] = []
        self.template = TEMPLATE
        self.gate = threading.Event()
        self.gate.set()

    def needs(self, model: StoredModel, settings: ModelSettings, limit: int | None = None) -> int:
        return 1000

    def load(
        self, model: StoredModel, settings: ModelSettings, meter: Meter, room: int | None
    ) -> LoadedEngine:
        assert self.gate.wait(20)
        engine = ScriptedEngine(template=self.template, max_model_len=settings.context_size or 4096)
        self.engines.append(engine)
        return LoadedEngine(engine)


@dataclass
class Runner:
    """A client of the API, with the server's store and engine."""

    http: TestClient
    store: LayoutStore
    catalogue: StoredScripts
    pool: ModelPool

    def chat(self, model: str = "tiny", **body: object) -> httpx.Response:
        """Request a chat completion; return the response."""
        given = {"model": model, "messages": [{"role": "user", "content": "hi"}]} | body
        response: httpx.Response = self.http.post("/engines/v1/chat/completions", json=given)
        return response


@pytest.fixture(scope="session")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a tiny model."""
    return tiny_gguf(tmp_path_factory.mktemp("gguf"))


@pytest.fixture(scope="session")
def stocked(tmp_path_factory: pytest.TempPathFactory, gguf: Path) -> Path:
    """A store with one model, ai/tiny:latest, for copies."""
    root = tmp_path_factory.mktemp("stocked") / "store"
    request = modelpack.PackageRequest(gguf=gguf, created="2025-01-02T03:04:05Z")
    modelpack.package("ai/tiny", request, store=LayoutStore(root))
    return root


@contextmanager
def serving(root: Path) -> Iterator[Runner]:
    """Serve the store in `root`."""
    store = LayoutStore(root)
    catalogue = StoredScripts(store)
    pool = ModelPool(catalogue, grace=0.0)
    with TestClient(create_app(pool), raise_server_exceptions=False) as http:
        yield Runner(http, store, catalogue, pool)


@pytest.fixture
def runner(tmp_path: Path, stocked: Path) -> Iterator[Runner]:
    """A server whose store has one model, ai/tiny:latest."""
    shutil.copytree(stocked, tmp_path / "store", symlinks=True)
    with serving(tmp_path / "store") as server:
        yield server


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, stocked: Path) -> Iterator[Runner]:
    """Like `runner`, for tests that change nothing."""
    root = tmp_path_factory.mktemp("shared") / "store"
    shutil.copytree(stocked, root, symlinks=True)
    with serving(root) as server:
        yield server


@pytest.fixture
def idle(shared: Runner) -> Iterator[Runner]:
    """Like `shared`, for tests that load or configure its model; both are undone afterwards."""
    yield shared
    shared.http.post("/pool/unload", json={"all": True})
    shared.http.post("/pool/configure", json={"model": "tiny"})
    shared.catalogue.template = TEMPLATE
