"""Which files are the weights of a model, and what they say about it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from modelpack.errors import PackagingError
from modelpack.formats.gguf import read_gguf_header
from modelpack.formats.safetensors import read_safetensors_header
from modelpack.formats.shards import find_shards, shard_set
from modelpack.formats.statistics import (
    ModelStatistics,
    dduf_statistics,
    gguf_statistics,
    safetensors_statistics,
)
from modelpack.packaging.classify import (
    MEDIA_TYPES,
    WEIGHT_TYPES,
    FileKind,
    classify,
    is_projector_name,
)
from modelpack.packaging.files import LayerFile, shown


def discovered_shards(path: Path, kind: FileKind) -> tuple[Path, ...]:
    """Return all shards of the model that the weight file `path` is one of, in order.

    Raises `PackagingError` naming the shards that are missing.
    """
    return (path,) if kind is FileKind.DDUF else find_shards(path)


def check_projector(path: Path) -> None:
    """Raise `WeightFormatError` if a projector is named like weights but does not parse."""
    kind = classify(path.name)
    if kind is FileKind.GGUF:
        read_gguf_header(path)
    elif kind is FileKind.SAFETENSORS:
        read_safetensors_header(path)


def weight_statistics(
    files: Sequence[LayerFile], *, config_json: Path | None = None, exact: bool
) -> tuple[ModelStatistics, tuple[str, ...]]:
    """Return what the weights among `files` say about the model, and notes for people.

    Every header is read, so every weight that does not parse is an error. `config_json` is the
    configuration beside safetensors, looked for next to them by default. With `exact` the
    statistics are those of Docker Model Runner.
    """
    weights = [file for file in files if file.media_type in WEIGHT_TYPES]
    if not weights:
        raise PackagingError(
            "no weights are left: a flag says of every one of them that it is no weight"
        )
    kind = next(k for k, media_type in MEDIA_TYPES.items() if media_type == weights[0].media_type)
    paths = [file.path for file in weights]
    if kind is FileKind.GGUF:
        statistics = gguf_statistics(paths, exact=exact)
    elif kind is FileKind.SAFETENSORS:
        statistics = safetensors_statistics(paths, exact=exact, config_json=config_json)
    else:
        statistics = dduf_statistics(paths)
    return statistics, (*_several_models(weights, kind), *statistics.notes)


def _several_models(weights: Sequence[LayerFile], kind: FileKind) -> tuple[str, ...]:
    """Return a note if a directory holds several GGUFs: then they are models, not parts of one."""
    if kind is not FileKind.GGUF:
        return ()
    models = {
        shard_set(file.path) or file.path: file.filepath
        for file in reversed(weights)
        if not is_projector_name(file.filepath)
    }
    if len(models) < 2:
        return ()
    names = ", ".join(sorted(shown(name) for name in models.values()))
    return (f"several models in one directory ({names}): the config describes the first only",)
