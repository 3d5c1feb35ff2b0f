"""Ollama's own client for scripted models and for a real store."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ollama
import pytest

import modelpack
from modelpack.builder.request import PackageRequest
from modelpack.store.layout import LayoutStore
from modelpack_engine.config import EngineConfig
from modelpack_server.api.app import ModelServer
from modelpack_server.pool.pool import ModelPool
from modelpack_server.pool.store_catalogue import StoreCatalogue
from tests.engine.embedding.models import write_model
from tests.engine.families.served import Served
from tests.engine.serving.tiny import write_tiny
from tests.models import tiny_gguf

CONFIG = EngineConfig(device="cpu", max_num_seqs=4, max_num_batched_tokens=32, kv_cache_bytes=2**21)


@pytest.fixture
def client(served: Served) -> Iterator[ollama.Client]:
    """A client of the server with scripted models."""
    with ollama.Client(served.url) as made:
        yield made


@dataclass
class Stocked:
    """A server with a store, and its client."""

    url: str
    store: LayoutStore
    client: ollama.Client


@pytest.fixture(scope="session")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the models `tiny`, `small` (a context of 100), `vectors` and `weights` (GGUF,
    which cannot be loaded).
    """
    root = tmp_path_factory.mktemp("ollama")
    files = write_tiny(root / "files", temperature=0.0)
    store = LayoutStore(root / "store")
    modelpack.package("tiny", PackageRequest(safetensors_dir=files), store=store)
    modelpack.package("small", PackageRequest(safetensors_dir=files, context_size=100), store=store)
    (root / "vectors").mkdir()
    vectors = write_model(root / "vectors", "bert")
    modelpack.package("vectors", PackageRequest(safetensors_dir=vectors), store=store)
    (root / "gguf").mkdir()
    gguf = tiny_gguf(root / "gguf")
    modelpack.package("weights", PackageRequest(gguf=gguf), store=store)
    return store.root


@pytest.fixture(scope="session")
def stocked(stock: Path) -> Iterator[Stocked]:
    """A server with the store, shared by all tests, which must not change the four models."""
    with serving(stock) as served:
        yield served


@contextmanager
def serving(root: Path, config: EngineConfig = CONFIG) -> Iterator[Stocked]:
    """Serve the store at `root`."""
    store = LayoutStore(root)

    def pool() -> ModelPool:
        return ModelPool(StoreCatalogue(store, config), grace=5.0)

    with (
        ModelServer(pool, address="127.0.0.1:0", request_templates=True) as server,
        ollama.Client(server.url) as client,
    ):
        yield Stocked(server.url, store, client)
