"""Real weights, fetched and loaded once."""

from __future__ import annotations

from pathlib import Path

import pytest

import modelpack
from modelpack.store.layout import LayoutStore
from modelpack.testing.weights import minilm_directory
from modelpack_engine.embedding import Embedder
from modelpack_server import open_embedder


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The directory of all-MiniLM-L6-v2."""
    return minilm_directory()


@pytest.fixture(scope="session")
def minilm_store(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> LayoutStore:
    """A store with all-MiniLM-L6-v2 as `minilm`."""
    store = LayoutStore(tmp_path_factory.mktemp("minilm") / "store")
    modelpack.package(
        "minilm", modelpack.PackageRequest(safetensors_dir=minilm), store=store, link=True
    )
    return store


@pytest.fixture(scope="session")
def embedder(minilm_store: LayoutStore) -> Embedder:
    """all-MiniLM-L6-v2, loaded from the store."""
    return open_embedder("minilm", store=minilm_store, pull=False, device="cpu")
