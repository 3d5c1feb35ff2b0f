"""From a model's name to an embedder: the store's blobs are read where they lie."""

from __future__ import annotations

from typing import Literal

from modelpack.operations.remote import RemoteOptions
from modelpack.progress import ProgressCallback
from modelpack.stores.layout import LayoutStore
from modelpack_engine.config import EngineConfig
from modelpack_engine.embedding.cross_encoder import CrossEncoder
from modelpack_engine.embedding.embedder import Embedder
from modelpack_engine.embedding.loading import load_embedder
from modelpack_engine.errors import ModelLoadError
from modelpack_engine.platform.device import choose_device
from modelpack_server.models import open_model


def open_embedder(
    name: str,
    *,
    pull: bool = True,
    store: LayoutStore | None = None,
    remote: RemoteOptions | None = None,
    progress: ProgressCallback | None = None,
    device: Literal["auto", "gpu", "cpu"] = "auto",
) -> Embedder:
    """Open the embedding model `name` of the store; with `pull`, a missing one is pulled first.

    Raises `NotFoundError`, `ModelLoadError` for files that cannot be loaded or are no embedding
    model's, and what `modelpack.pull` raises.
    """
    model = _open(name, pull, store, remote, progress, device)
    if isinstance(model, CrossEncoder):
        raise ModelLoadError(
            f"{name}: ranks documents, and has no vectors", hint="use open_cross_encoder"
        )
    return model


def open_cross_encoder(
    name: str,
    *,
    pull: bool = True,
    store: LayoutStore | None = None,
    remote: RemoteOptions | None = None,
    progress: ProgressCallback | None = None,
    device: Literal["auto", "gpu", "cpu"] = "auto",
) -> CrossEncoder:
    """Open the cross-encoder `name`, as `open_embedder` opens an embedding model."""
    model = _open(name, pull, store, remote, progress, device)
    if isinstance(model, Embedder):
        raise ModelLoadError(f"{name}: is no cross-encoder", hint="use open_embedder")
    return model


def _open(
    name: str,
    pull: bool,
    store: LayoutStore | None,
    remote: RemoteOptions | None,
    progress: ProgressCallback | None,
    device: Literal["auto", "gpu", "cpu"],
) -> Embedder | CrossEncoder:
    opened = open_model(name, pull=pull, store=store, remote=remote, progress=progress)
    return load_embedder(opened.files, device=choose_device(EngineConfig(device=device)))
