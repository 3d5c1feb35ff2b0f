"""Build the config and manifest of a model: a new one from a plan, or an existing one changed.

`plan` collects the files of a new model; `build` turns the plan and the digests of its files into a
`Built`. `repackage` starts from an existing manifest instead and keeps its layers: it adds layers,
sets the context size or converts the format. Docker Model Runner relabels configs as v0.1 when it
repackages, and drops artifact types; Modelpack keeps both.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from modelpack.artifacts import media_types
from modelpack.artifacts.config import ModelConfig
from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.json_document import MAX_DOCUMENT_BYTES
from modelpack.artifacts.manifest import Manifest
from modelpack.artifacts.model import role_of
from modelpack.builder.capabilities import LocalFile, with_files
from modelpack.builder.classify import WEIGHT_TYPES
from modelpack.builder.conversion import (
    CNCF_WEIGHT_TYPES,
    cncf_config,
    cncf_layers,
    docker_config,
    docker_layers,
    is_projector_layer,
)
from modelpack.builder.description import Description
from modelpack.builder.files import LayerFile, LayerMetadata, Skipped, shown
from modelpack.builder.request import PackageRequest, check_context_size_fits, check_template_wins
from modelpack.builder.times import created_time
from modelpack.errors import ManifestError, PackagingError
from modelpack.formats.statistics import ModelStatistics

_NO_DIGEST: Final = Digest("sha256", "0" * 64)
#: A model has at most one layer of each: Docker Model Runner ignores both if it has two.
_SINGLE_TYPES = (media_types.DOCKER_CHAT_TEMPLATE, media_types.DOCKER_MMPROJ)
_WEIGHT_TYPES = (*WEIGHT_TYPES, *CNCF_WEIGHT_TYPES)


@dataclass(frozen=True, slots=True)
class Plan:
    """The files to package, in the order of layers, and the statistics of the model.

    `description` is for CNCF's config, None if the model gets none. `skipped` are entries left out
    of a directory; `notes` tell users about decisions.
    """

    files: tuple[LayerFile, ...]
    statistics: ModelStatistics = field(default_factory=ModelStatistics)
    created: str | None = None
    description: Description | None = None
    skipped: tuple[Skipped, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Built:
    """A finished model: the bytes of its manifest (`manifest.raw`) and of its config.

    `notes` tell users about decisions, such as files that were left out.
    """

    manifest: Manifest
    config: ModelConfig
    config_bytes: bytes = field(repr=False)
    notes: tuple[str, ...] = ()


def build(plan: Plan, request: PackageRequest, digests: Sequence[Digest]) -> Built:
    """Return the model of `plan`; `digests` are those of its files, in the same order."""
    return build_from_layers(
        plan.statistics,
        file_layers(plan.files, digests),
        config_type=(
            media_types.DOCKER_CONFIG_V02
            if request.safetensors_dir
            else media_types.DOCKER_CONFIG_V01
        ),
        created=plan.created,
        context_size=request.context_size,
        annotations=request.annotations,
        cncf=request.format == "cncf",
        description=plan.description,
        titles=not request.preserve,
        notes=plan.notes,
    )


def build_from_layers(
    statistics: ModelStatistics,
    layers: Sequence[Descriptor],
    *,
    config_type: str,
    created: str | None,
    context_size: int | None = None,
    annotations: Mapping[str, str],
    cncf: bool = False,
    description: Description | None = None,
    titles: bool = True,
    notes: tuple[str, ...] = (),
) -> Built:
    """Return the model of `layers`, which have Docker's types; `statistics` fill its config.

    `config_type` is Docker's; `context_size` replaces the context size of the weights. Only a CNCF
    model gets a `description` and, with `titles`, titles of its layers.
    """
    config = ModelConfig(
        config_type,
        format=statistics.format,
        quantization=statistics.quantization,
        parameters=statistics.parameters,
        architecture=statistics.architecture,
        size=statistics.size,
        gguf=statistics.gguf,
        safetensors=statistics.safetensors,
        diffusers=statistics.diffusers,
        context_size=statistics.context_size if context_size is None else context_size,
        created=created,
        diff_ids=tuple(layer.digest for layer in layers),
    )
    if cncf:
        config, layers = cncf_config(config), cncf_layers(layers, titles=titles)
        config = config if description is None else description.added_to(config)
    return assemble(config, layers, annotations, notes=notes)


def check_document_sizes(plan: Plan, request: PackageRequest) -> None:
    """Raise `PackagingError` if the config or manifest of `plan` exceeds the limit of registries.

    Only the digests are still unknown, so this check runs before the files are hashed.
    """
    build(plan, request, [_NO_DIGEST] * len(plan.files))


def file_layers(files: Sequence[LayerFile], digests: Sequence[Digest]) -> tuple[Descriptor, ...]:
    """Return the files as layers with Docker's types and Docker Model Runner's annotations."""
    return tuple(
        file_layer(file.media_type, digest, file.metadata, file.filepath)
        for file, digest in zip(files, digests, strict=True)
    )


def file_layer(
    media_type: str, digest: Digest, metadata: LayerMetadata, filepath: str
) -> Descriptor:
    """Return a file as a layer with Docker Model Runner's annotations."""
    return Descriptor(
        media_type,
        digest,
        metadata.size,
        {
            media_types.FILEPATH: filepath,
            media_types.FILE_METADATA: metadata.encode(),
            media_types.FILE_UNTESTED: "false",
        },
    )


def assemble(
    config: ModelConfig,
    layers: Sequence[Descriptor],
    annotations: Mapping[str, str],
    *,
    artifact_type: str | None = None,
    subject: Descriptor | None = None,
    notes: tuple[str, ...] = (),
) -> Built:
    """Return the model of this config and these layers.

    A CNCF model gets the artifact type of CNCF; `artifact_type` is that of a Docker model, if any.
    `subject` is the manifest that this one refers to.
    """
    config_bytes = config.encode()
    if len(config_bytes) > MAX_DOCUMENT_BYTES:
        raise _too_large(f"the config would be {len(config_bytes)} bytes")
    descriptor = Descriptor(config.media_type, Digest.of(config_bytes), len(config_bytes))
    if config.is_cncf:
        artifact_type = media_types.CNCF_MANIFEST
    try:
        manifest = Manifest.build(
            descriptor,
            layers,
            artifact_type=artifact_type,
            subject=subject,
            annotations=annotations,
        )
    except ManifestError as error:  # our own values are valid, so only the size can be wrong
        raise _too_large(f"the manifest of {len(layers)} layers {error.message}") from None
    return Built(manifest, config, config_bytes, notes)


def _too_large(problem: str) -> PackagingError:
    return PackagingError(
        f"{problem}; registries accept at most {MAX_DOCUMENT_BYTES} bytes",
        hint="package fewer files, for instance a directory without data sets and checkpoints",
    )


def repackage(
    manifest: Manifest,
    config: ModelConfig,
    request: PackageRequest,
    extra: Plan | None,
    digests: Sequence[Digest],
    *,
    description: Description | None = None,
    statistics: ModelStatistics | None = None,
    projectors: Collection[Digest] | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Built:
    """Return the model in `manifest` and `config` with the changes in `request`.

    `extra` is the plan of the layers to add (`plan_extras`), `digests` those of its files. A chat
    template or a projector replaces the one of the same name, and in a v0.1 config of any name;
    other layers are added. The time of creation stays unless `request.created` is set.
    `description` and `statistics` are those of the files, for conversions to CNCF and to Docker's
    format, whose configs have them. `projectors` are those among the layers by their content
    (`Model.projectors`); names decide if it is None. Raises
    `PackagingError` if two different files would have one path, and `UnsupportedError` for layers
    that the other format cannot hold.
    """
    request.check()
    to_cncf = config.is_cncf if request.format is None else request.format == "cncf"
    check_context_size_fits(request, cncf=to_cncf)
    layers, artifact_type = manifest.layers, manifest.artifact_type
    titles = not request.preserve
    known = config.diff_ids[: len(layers)]
    # A missing diff id is the digest of the layer, as in Docker.
    diff_ids = (*known, *(layer.digest for layer in layers[len(known) :]))
    if to_cncf != config.is_cncf:
        artifact_type = None
        if to_cncf:
            config, layers = cncf_config(config), cncf_layers(layers, titles=titles)
            config = config if description is None else description.added_to(config)
        else:
            layers = docker_layers(layers, config, projectors)
            config = docker_config(config, layers, statistics or ModelStatistics())
    added = file_layers(extra.files if extra else (), digests)
    by_type = config.media_type == media_types.DOCKER_CONFIG_V01
    merged = _Merge([*layers], [*diff_ids], by_type, request.preserve, projectors)
    for layer in added:
        merged.add(layer, cncf_layers([layer], titles=titles)[0] if to_cncf else layer)
    check_template_wins(
        request,
        [
            (role_of(layer.media_type, layer.filepath), layer.filepath or "")
            for layer in merged.layers
        ],
    )
    changes: dict[str, object] = {"diff_ids": tuple(merged.diff_ids)}
    if request.context_size is not None:
        changes["context_size"] = request.context_size
    if request.created is not None:
        changes["created"] = created_time(request.created, environ)
    if extra is not None and (found := config.cncf_config.get("capabilities")):
        capabilities = with_files(found, [LocalFile.of(file) for file in extra.files])
        changes["cncf_config"] = {**config.cncf_config, "capabilities": capabilities}
    return assemble(
        config.with_changes(**changes),
        merged.layers,
        {**manifest.annotations, **request.annotations},
        artifact_type=artifact_type,
        notes=(*(extra.notes if extra else ()), *merged.notes),
    )


@dataclass(slots=True)
class _Merge:
    """The layers of the existing model with the added ones."""

    layers: list[Descriptor]
    diff_ids: list[Digest]
    by_type: bool  # added templates and projectors replace those of any name
    keep_all: bool
    projectors: Collection[Digest] | None
    notes: list[str] = field(default_factory=list)

    def add(self, docker: Descriptor, layer: Descriptor) -> None:
        """Add `layer`; `docker` is the same layer with Docker's type, which is more specific."""
        identity = (layer.filepath, layer.digest, layer.media_type)
        for place in () if self.keep_all else reversed(range(len(self.layers))):
            old = self.layers[place]
            if (old.filepath, old.digest, old.media_type) == identity:
                self.notes.append(f"{_name(layer)} is already in the model")
                return
            if self._replaces(old, docker, layer):
                self.notes.append(f"{_name(layer)} replaces {_name(old)}")
                del self.layers[place], self.diff_ids[place]
        self.layers.append(layer)
        self.diff_ids.append(layer.digest)

    def _replaces(self, old: Descriptor, docker: Descriptor, layer: Descriptor) -> bool:
        is_single = docker.media_type in _SINGLE_TYPES
        if old.filepath != layer.filepath:
            return is_single and self.by_type and old.media_type == layer.media_type
        is_weight = old.media_type in _WEIGHT_TYPES and not is_projector_layer(old, self.projectors)
        if is_weight or not (is_single or old.digest == layer.digest):
            raise PackagingError(
                f"the model already has another file at {_name(layer)}",
                hint="rename the added file",
            )
        return True


def _name(layer: Descriptor) -> str:
    return repr(shown(layer.filepath or f"layer {layer.digest.short}"))
