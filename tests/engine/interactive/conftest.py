"""One store for all tests here, with a real model and a tiny one."""

from __future__ import annotations

import pytest

import modelpack
from modelpack.operations.package import PackageRequest
from modelpack.store.layout import LayoutStore
from modelpack.testing.weights import smollm2_gguf
from tests.engine.serving.tiny import write_tiny


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> LayoutStore:
    """A store with `ai/smollm2`, with real weights, and `team/tiny`, which generates bytes."""
    root = tmp_path_factory.mktemp("interactive")
    store = LayoutStore(root / "store")
    modelpack.package("ai/smollm2", PackageRequest(gguf=smollm2_gguf()), store=store)
    files = write_tiny(root / "files", temperature=0.0)
    modelpack.package("team/tiny", PackageRequest(safetensors_dir=files), store=store)
    return store
