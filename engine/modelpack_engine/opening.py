"""From a model's name to a running engine: the store's blobs are read where they lie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import mlx.core as mx

from modelpack.model import Model
from modelpack.operations.find import find_model
from modelpack.operations.remote import RemoteOptions
from modelpack.operations.watching import watching
from modelpack.progress import ProgressCallback
from modelpack.stores.layout import LayoutStore
from modelpack_engine.config import EngineConfig
from modelpack_engine.engine import Engine
from modelpack_engine.errors import EngineError
from modelpack_engine.loaders import ModelFiles, load


@dataclass(frozen=True, slots=True)
class Opened:
    """A model of the store whose files are known: what is left is to load it."""

    model: Model
    files: ModelFiles

    def engine(self, config: EngineConfig | None = None) -> Engine:
        """Load the weights and return an engine; has to run in the thread that steps it.

        The context size in the model's config is the default of `max_model_len`.
        """
        config = self.with_context_size(config or EngineConfig())
        device = choose_device(config)
        loaded = load(self.files, device=device)
        return Engine(loaded, config, model_id=str(self.model.digest))

    def with_context_size(self, config: EngineConfig) -> EngineConfig:
        """Return `config` with the model's own context size as the default of `max_model_len`."""
        if config.default_model_len is not None:
            return config
        return replace(config, default_model_len=self.model.config.context_size)


def load_model(
    opened: Opened, device: EngineConfig, configure: Callable[[int, int], EngineConfig]
) -> tuple[Engine, str]:
    """Load the weights; return an engine and the type of its model.

    `device` says where to compute, `configure` how to run, once the context that the model holds
    (in tokens) and the bytes of its weights are known. Has to run in the thread that steps it.
    """
    loaded = load(opened.files, device=choose_device(device))
    config = opened.with_context_size(configure(loaded.context_length, loaded.weight_bytes))
    engine = Engine(loaded, config, model_id=str(opened.model.digest))
    return engine, str(loaded.config.get("model_type") or loaded.architecture)


def open_model(
    name: str,
    *,
    pull: bool = True,
    store: LayoutStore | None = None,
    remote: RemoteOptions | None = None,
    progress: ProgressCallback | None = None,
) -> Opened:
    """Find the model `name` in the store; with `pull`, one that is not there is pulled first.

    Raises `NotFoundError`, `ModelLoadError` for files that cannot be loaded, and what
    `modelpack.pull` raises.
    """
    store = store or LayoutStore()
    model = find_model(name, store, pull=pull, remote=remote, watch=watching(progress))
    return Opened(model, ModelFiles.from_model(model, store.blob_path))


def choose_device(config: EngineConfig) -> Literal["cpu", "gpu"]:
    """Return "gpu" or "cpu", and make it MLX's default."""
    has_gpu = mx.metal.is_available() or mx.cuda.is_available()
    if config.device == "gpu" and not has_gpu:
        raise EngineError("there is no GPU that MLX can use", hint="use the CPU: device cpu")
    use_gpu = has_gpu and config.device != "cpu"
    mx.set_default_device(mx.gpu if use_gpu else mx.cpu)
    return "gpu" if use_gpu else "cpu"
