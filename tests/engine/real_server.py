"""A server on a port with real weights: SmolLM2, MiniLM for embeddings, and fixtures/speech."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import modelpack
from modelpack.builder.request import PackageRequest
from modelpack.store.layout import LayoutStore
from modelpack.testing.weights import minilm_directory, smollm2_gguf
from modelpack_engine.config import EngineConfig
from modelpack_server.api.app import ModelServer
from modelpack_server.pool.pool import ModelPool
from modelpack_server.pool.store_catalogue import StoreCatalogue

SMOLLM2, MINILM, DIGITS = "ai/smollm2", "ai/minilm", "ai/digits"
# What lists and metrics call them.
FAMILIAR = {SMOLLM2: "smollm2", MINILM: "minilm", DIGITS: "digits"}
_SPEECH = Path(__file__).parents[2] / "fixtures" / "speech" / "model"

# Enough of a cache for prompts with tools.
_CONFIG = EngineConfig(device="cpu", max_num_seqs=8, max_num_batched_tokens=64,
                       kv_cache_bytes=2**27)  # fmt: skip


@contextmanager
def real_server(directory: Path) -> Iterator[str]:
    """Serve them from a store below `directory`; yield the address."""
    root = directory / "store"
    for name, request in {
        SMOLLM2: PackageRequest(gguf=smollm2_gguf()),
        MINILM: PackageRequest(safetensors_dir=minilm_directory()),
        DIGITS: PackageRequest(safetensors_dir=_SPEECH),
    }.items():
        modelpack.package(name, request, store=LayoutStore(root), link=True)

    def make_pool() -> ModelPool:
        return ModelPool(StoreCatalogue(LayoutStore(root), _CONFIG))

    with ModelServer(make_pool, address="127.0.0.1:0") as server:
        yield server.url
