"""Embedding models: texts to vectors, and pairs of texts to scores; no HTTP.

    embedder = modelpack_server.open_embedder("ai/all-minilm")
    vectors = embedder.embed(["a cat", "a feline"]).vectors

Read `loader` first, then `encoder`, `sentence_transformers`, `embedder` and `async_embedder`.
Names load at first use, after a BLAS for MLX's CPU backend has been chosen (`platform.blas`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modelpack_engine.embedding.async_embedder import AsyncEmbedder as AsyncEmbedder
    from modelpack_engine.embedding.async_embedder import rank_pairs as rank_pairs
    from modelpack_engine.embedding.embedder import CrossEncoder as CrossEncoder
    from modelpack_engine.embedding.embedder import Embedder as Embedder
    from modelpack_engine.embedding.embedder import EmbedderConfig as EmbedderConfig
    from modelpack_engine.embedding.loader import load_embedder as load_embedder
    from modelpack_engine.embedding.loader import purpose_of as purpose_of
    from modelpack_engine.embedding.request import Embeddings as Embeddings
    from modelpack_engine.embedding.request import EmbedOptions as EmbedOptions
    from modelpack_engine.embedding.request import Scores as Scores
    from modelpack_engine.embedding.request import sigmoid as sigmoid

_MODULES = {
    "async_embedder": ("AsyncEmbedder", "rank_pairs"),
    "embedder": ("CrossEncoder", "Embedder", "EmbedderConfig"),
    "loader": ("load_embedder", "purpose_of"),
    "request": ("Embeddings", "EmbedOptions", "Scores", "sigmoid"),
}
_EXPORTS = {name: f"{__name__}.{module}" for module, names in _MODULES.items() for name in names}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    from modelpack_engine.platform import blas

    return blas.load_export(__name__, _EXPORTS, name)
