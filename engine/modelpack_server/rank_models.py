"""Models of the store on all ranks: each reads the files where it runs."""

from __future__ import annotations

from collections.abc import Callable

from modelpack.stores.layout import LayoutStore
from modelpack_engine.config import EngineConfig
from modelpack_engine.engine import Engine
from modelpack_engine.loaders import LoadedModel, load
from modelpack_engine.loaders.loading import Shard
from modelpack_engine.parallel.following import Load
from modelpack_engine.parallel.leading import Ranks
from modelpack_engine.platform.device import choose_device
from modelpack_server.models import Opened, open_model


def load_on_ranks(
    ranks: Ranks,
    opened: Opened,
    device: EngineConfig,
    configure: Callable[[int, int], EngineConfig],
) -> tuple[Engine, str]:
    """Load a model on all ranks; return an engine and the type of its model.

    As `opening.load_model`, where the bytes of the weights are those of this rank's part.
    """

    def part(shard: Shard) -> LoadedModel:
        return load(
            opened.files,
            device=choose_device(device),
            ignored_fields=device.ignore_config_fields,
            shard=shard,
        )

    def settings(loaded: LoadedModel) -> EngineConfig:
        chosen = configure(loaded.context_length, loaded.weight_bytes)
        return opened.with_context_size(chosen)

    engine, loaded = ranks.engine(str(opened.model.digest), part, settings)
    return engine, str(loaded.config.get("model_type") or loaded.architecture)


def parts_of(store: LayoutStore, device: EngineConfig) -> Load:
    """Return what loads a follower's part of the models of its own store, by their digests."""

    def part(digest: str, shard: Shard) -> LoadedModel:
        opened = open_model(digest, pull=False, store=store)
        return load(
            opened.files,
            device=choose_device(device),
            ignored_fields=device.ignore_config_fields,
            shard=shard,
        )

    return part
