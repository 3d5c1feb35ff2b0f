"""Convert layer types and configs between Docker's format and the CNCF format.

Layers keep their bytes. Docker to CNCF matches Docker Model Runner (pkg/distribution/modelpack)
byte for byte, except for titles and for the description, which `preserve` leaves out. It never
converts CNCF to Docker; Modelpack's rules for that are:

- Raw weights get the type of their extension, otherwise of the config's format. CNCF models do not
  mark projectors: in a single-file model (config v0.1), which has one set of weights, every other
  GGUF is a projector. The set is the first that is not of projectors, by content where it is known.
- A document is a license if it has the name of a license, or no extension of a document; other
  documents, code and data are plain files. Archives are rejected: Docker's layers are single files.
- The config is v0.1, which finds files by their types, for a GGUF or DDUF with only licenses, one
  template and projectors, or if a layer has no path. Otherwise it is v0.2, which puts each file at
  its path: for directories, and for safetensors with their configs.

Fields that the other format lacks are lost: the size, header values and context size of Docker;
authors, capabilities and similar fields of CNCF. Those that the files have, too, are read again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Final

from modelpack.artifacts import media_types
from modelpack.artifacts.config import ModelConfig
from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.builder.classify import (
    MEDIA_TYPES,
    WEIGHT_KINDS,
    WEIGHT_TYPES,
    FileKind,
    classify,
    is_projector_name,
    lowered_name,
)
from modelpack.errors import PackagingError, UnsupportedError
from modelpack.formats.shards import ShardSet, shard_set
from modelpack.formats.statistics import ModelStatistics
from modelpack.formats.units import format_decimal_size

#: CNCF's layer types of weights, projectors included.
CNCF_WEIGHT_TYPES: Final = (
    media_types.CNCF_WEIGHT_RAW,
    media_types.CNCF_WEIGHT_GGUF,
    media_types.CNCF_WEIGHT_SAFETENSORS,
)
_TO_CNCF: Final = {
    media_types.DOCKER_LICENSE: media_types.CNCF_DOC_RAW,
    media_types.CNCF_DOC_RAW: media_types.CNCF_DOC_RAW,
    media_types.DOCKER_CHAT_TEMPLATE: media_types.CNCF_WEIGHT_CONFIG_RAW,
    media_types.DOCKER_VLLM_CONFIG_TAR: media_types.CNCF_WEIGHT_CONFIG_RAW,
    media_types.DOCKER_MODEL_FILE: media_types.CNCF_WEIGHT_CONFIG_RAW,
    media_types.CNCF_WEIGHT_CONFIG_RAW: media_types.CNCF_WEIGHT_CONFIG_RAW,
    media_types.DOCKER_MMPROJ: media_types.CNCF_WEIGHT_RAW,
    **dict.fromkeys((*WEIGHT_TYPES, *CNCF_WEIGHT_TYPES), media_types.CNCF_WEIGHT_RAW),
}
_DOCKER_PREFIX: Final = "application/vnd.docker.ai."
_CNCF_PREFIX: Final = "application/vnd.cncf.model."
_FORMATS: Final = {**{kind.value: kind for kind in WEIGHT_KINDS}, "diffusers": FileKind.DDUF}
# Extensions of documents that are not licenses.
_DOCUMENTS: Final = (".md", ".rst", ".html", ".pdf", ".png", ".jpg", ".jpeg", ".svg", ".json")
# The layers of a v0.1 model besides its weights.
_SINGLE_FILE_TYPES: Final = (
    media_types.DOCKER_LICENSE,
    media_types.DOCKER_CHAT_TEMPLATE,
    media_types.DOCKER_MMPROJ,
)


def cncf_media_type(media_type: str, filepath: str | None) -> str:
    """Return the CNCF type for Docker's layer type `media_type`; CNCF types are unchanged."""
    known = _TO_CNCF.get(media_type)
    if known is not None:
        return known
    name = lowered_name(filepath or "")
    kind = classify(name)
    if kind in WEIGHT_KINDS:
        return media_types.CNCF_WEIGHT_RAW
    if kind is FileKind.LICENSE or (kind is FileKind.CONFIG and name.endswith(".md")):
        return media_types.CNCF_DOC_RAW
    return media_types.CNCF_WEIGHT_CONFIG_RAW


def cncf_layers(layers: Sequence[Descriptor], *, titles: bool) -> tuple[Descriptor, ...]:
    """Return Docker's layers with CNCF's types.

    With `titles`, a layer with a path and without a title has the path as its title, too: oras and
    other tools name files by it (image-spec, annotations.md).
    """
    return tuple(
        replace(
            layer,
            media_type=cncf_media_type(layer.media_type, layer.filepath),
            annotations=_titled(layer) if titles else layer.annotations,
        )
        for layer in layers
    )


def _titled(layer: Descriptor) -> Mapping[str, str]:
    if not layer.filepath or media_types.TITLE in layer.annotations:
        return layer.annotations
    return {**layer.annotations, media_types.TITLE: layer.filepath}


def _untitled(layer: Descriptor) -> Mapping[str, str]:
    """Return the annotations without the title that `_titled` adds."""
    if layer.annotations.get(media_types.TITLE) != layer.filepath:
        return layer.annotations
    return {key: text for key, text in layer.annotations.items() if key != media_types.TITLE}


def cncf_config(config: ModelConfig) -> ModelConfig:
    """Return Docker's config converted to CNCF; fields that CNCF lacks are dropped."""
    if config.is_cncf:
        return config
    family = {"family": config.architecture} if config.architecture else {}
    return ModelConfig(
        media_types.CNCF_CONFIG,
        format=config.format,
        quantization=config.quantization,
        parameters=config.parameters,
        architecture=config.architecture,
        created=config.created,
        diff_ids=config.diff_ids,
        cncf_descriptor={**config.cncf_descriptor, **family},
        cncf_config=config.cncf_config,
    )


def docker_layers(
    layers: Sequence[Descriptor],
    config: ModelConfig,
    projectors: Collection[Digest] | None = None,
) -> tuple[Descriptor, ...]:
    """Return CNCF's layers with Docker's types; `config` is the CNCF config.

    `projectors` are the layers that are projectors by their content (`Model.projectors`); if it is
    None, names decide. Raises `UnsupportedError` for layers that Docker's format cannot hold.
    """
    converted = tuple(
        replace(
            layer,
            media_type=_docker_media_type(layer, config.format, projectors),
            annotations=_untitled(layer),
        )
        for layer in layers
    )
    if docker_config_type(converted) == media_types.DOCKER_CONFIG_V02:
        return converted
    own = _own_weights(converted, projectors)
    return tuple(
        replace(layer, media_type=media_types.DOCKER_MMPROJ)
        if layer.media_type == media_types.DOCKER_GGUF and i not in own
        else layer
        for i, layer in enumerate(converted)
    )


def docker_config(
    config: ModelConfig, layers: Sequence[Descriptor], statistics: ModelStatistics
) -> ModelConfig:
    """Return a CNCF config converted to Docker's format; `layers` have Docker's types.

    `statistics` of the weights have the fields that CNCF lacks, and are empty if the weights cannot
    be read. Fields that Docker's format lacks are dropped.
    """
    if not config.is_cncf:
        return config
    weights = [layer for layer in layers if layer.media_type in WEIGHT_TYPES]
    kind = _FORMATS.get(config.format)
    if kind is None and weights:
        kind = next(k for k in WEIGHT_KINDS if MEDIA_TYPES[k] == weights[0].media_type)
    size = statistics.size
    if not size and kind in (FileKind.SAFETENSORS, FileKind.DDUF):
        # Docker's size is that of the files for these formats, and of the tensors for GGUF.
        size = format_decimal_size(sum(layer.size for layer in weights))
    return ModelConfig(
        docker_config_type(layers),
        format=config.format or (kind.value if kind else ""),
        quantization=config.quantization or statistics.quantization,
        parameters=config.parameters or statistics.parameters,
        architecture=config.architecture or str(config.cncf_descriptor.get("family", "")),
        size=size,
        gguf=statistics.gguf,
        safetensors=statistics.safetensors,
        diffusers=statistics.diffusers,
        context_size=statistics.context_size,
        created=config.created,
        diff_ids=config.diff_ids,
    )


def docker_config_type(layers: Sequence[Descriptor]) -> str:
    """Return the type of Docker's config with which a runtime finds the files of `layers`."""
    paths = [layer.filepath for layer in layers]
    if not all(paths):
        return media_types.DOCKER_CONFIG_V01  # v0.2 drops layers without a path
    single = (media_types.DOCKER_GGUF, media_types.DOCKER_DDUF, *_SINGLE_FILE_TYPES)
    types = [layer.media_type for layer in layers]
    in_directories = any("/" in path for path in paths if path)
    if in_directories or not set(types) <= set(single):
        return media_types.DOCKER_CONFIG_V02
    several = types.count(media_types.DOCKER_CHAT_TEMPLATE) > 1
    return media_types.DOCKER_CONFIG_V02 if several else media_types.DOCKER_CONFIG_V01


def is_projector_layer(layer: Descriptor, projectors: Collection[Digest] | None) -> bool:
    """Return whether a layer is one of `projectors` or, if that is None, has the name of one."""
    if projectors is not None:
        return layer.digest in projectors
    return is_projector_name(layer.filepath or "")


def _docker_media_type(
    layer: Descriptor, format: str, projectors: Collection[Digest] | None
) -> str:
    given, filepath = layer.media_type, layer.filepath or ""
    if given.startswith(_DOCKER_PREFIX):
        return given
    is_archive = given.startswith(_CNCF_PREFIX) and not given.endswith(".raw")
    if is_archive and given not in CNCF_WEIGHT_TYPES:
        raise UnsupportedError(
            f"layer {layer.digest.short} ({filepath or 'no path'}) of type {given!r} has no "
            "counterpart in Docker's format, whose layers are single files",
            hint="unpack the model with `modelpack bundle` and package the files",
        )
    kind = classify(filepath)
    if given in CNCF_WEIGHT_TYPES:
        if _must_be_projector(layer, kind, format, projectors):
            return media_types.DOCKER_MMPROJ
        return MEDIA_TYPES[_weight_kind(layer, kind, format)]
    if given == media_types.CNCF_DOC_RAW:
        if kind is FileKind.LICENSE or not lowered_name(filepath).endswith(_DOCUMENTS):
            return media_types.DOCKER_LICENSE
        return media_types.DOCKER_MODEL_FILE
    if kind in WEIGHT_KINDS:  # it was not a weight before
        return media_types.DOCKER_MODEL_FILE
    return MEDIA_TYPES[kind]


def _must_be_projector(
    layer: Descriptor, kind: FileKind, format: str, projectors: Collection[Digest] | None
) -> bool:
    if kind is FileKind.GGUF:  # a projector if the model's weights have another format
        return _FORMATS.get(format, FileKind.GGUF) is not FileKind.GGUF
    return kind not in WEIGHT_KINDS and is_projector_layer(layer, projectors)


def _weight_kind(layer: Descriptor, kind: FileKind, format: str) -> FileKind:
    if kind in WEIGHT_KINDS:
        return kind
    if layer.media_type == media_types.CNCF_WEIGHT_GGUF:
        return FileKind.GGUF
    if layer.media_type == media_types.CNCF_WEIGHT_SAFETENSORS:
        return FileKind.SAFETENSORS
    if format in _FORMATS:
        return _FORMATS[format]
    raise UnsupportedError(
        f"layer {layer.digest.short} ({layer.filepath or 'no path'}) is a weight of an unknown "
        f"format: neither its name nor the config's format {format!r} gives it",
        hint="convert the weights to gguf, safetensors or dduf",
    )


def _own_weights(
    layers: Sequence[Descriptor], projectors: Collection[Digest] | None
) -> frozenset[int]:
    """Return the indices of the model's own weights: one file or one set of shards."""
    weights = [i for i, layer in enumerate(layers) if layer.media_type in WEIGHT_TYPES]
    if not weights:
        return frozenset()
    others = [i for i in weights if not is_projector_layer(layers[i], projectors)]
    first = (others or weights)[0]
    shards = _shards(layers[first])
    if shards is not None:
        return frozenset(i for i in weights if _shards(layers[i]) == shards)
    # Without paths, shards and projectors cannot be told apart.
    unnamed = [i for i in weights if not layers[i].filepath]
    return frozenset(unnamed if first in unnamed else [first])


def _shards(layer: Descriptor) -> ShardSet | None:
    try:
        return shard_set(layer.filepath or "")
    except PackagingError:  # the shard number exceeds the count, so it is not a shard
        return None
