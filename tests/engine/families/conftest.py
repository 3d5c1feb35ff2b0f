"""One server for all families of APIs, and one with real weights."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import modelpack
from modelpack.packaging.request import PackageRequest
from modelpack.stores.layout import LayoutStore
from modelpack.testing.weights import smollm2_gguf
from modelpack_engine.config import EngineConfig
from modelpack_engine.pool.pool import ModelPool
from modelpack_engine.pool.store_catalogue import StoreCatalogue
from modelpack_engine.server.model_server import ModelServer
from tests.engine.families.served import Served, serving

# Enough of a cache for prompts with tools.
_CONFIG = EngineConfig(device="cpu", max_num_seqs=4, max_num_batched_tokens=64,
                       kv_cache_bytes=2**27)  # fmt: skip


@pytest.fixture(scope="session")
def served() -> Iterator[Served]:
    with serving() as server:
        yield server


@pytest.fixture(scope="session")
def smollm2_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server whose model is SmolLM2, as "ai/smollm2"."""
    root = tmp_path_factory.mktemp("smollm2") / "store"
    request = PackageRequest(gguf=smollm2_gguf())
    modelpack.package("ai/smollm2", request, store=LayoutStore(root), link=True)

    def make_pool() -> ModelPool:
        return ModelPool(StoreCatalogue(LayoutStore(root), _CONFIG))

    with ModelServer(make_pool, address="127.0.0.1:0") as server:
        yield server.url
