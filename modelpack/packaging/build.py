"""From a plan and the digests of its files to the bytes of a config and a manifest.

Sources: docker/model-runner pkg/distribution/builder; CNCF model-spec docs/spec.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from modelpack import mediatypes
from modelpack.config import ModelConfig
from modelpack.descriptor import Descriptor
from modelpack.digest import Digest
from modelpack.errors import ManifestError, PackagingError
from modelpack.gojson import MAX_DOCUMENT_BYTES
from modelpack.layer_metadata import LayerMetadata
from modelpack.manifest import Manifest
from modelpack.packaging.convert import cncf_config, cncf_layers
from modelpack.packaging.files import LayerFile
from modelpack.packaging.request import PackageRequest

if TYPE_CHECKING:
    from modelpack.formats.statistics import ModelStatistics
    from modelpack.packaging.planned import Plan

_NO_DIGEST: Final = Digest("sha256", "0" * 64)


@dataclass(frozen=True, slots=True)
class Built:
    """A finished model: the bytes of its manifest (`manifest.raw`) and of its config.

    `notes` are for people: what was left out or decided on the way.
    """

    manifest: Manifest
    config: ModelConfig
    config_bytes: bytes = field(repr=False)
    notes: tuple[str, ...] = ()


def build(plan: Plan, request: PackageRequest, digests: Sequence[Digest]) -> Built:
    """Return the model that `plan` describes; `digests` are those of its files, in their order."""
    return described(
        plan.statistics,
        file_layers(plan.files, digests),
        config_type=(
            mediatypes.DOCKER_CONFIG_V02
            if request.safetensors_dir
            else mediatypes.DOCKER_CONFIG_V01
        ),
        created=plan.created,
        context_size=request.context_size,
        annotations=request.annotations,
        cncf=request.format == "cncf",
        notes=plan.notes,
    )


def described(
    statistics: ModelStatistics,
    layers: Sequence[Descriptor],
    *,
    config_type: str,
    created: str | None,
    context_size: int | None = None,
    annotations: Mapping[str, str],
    cncf: bool = False,
    notes: tuple[str, ...] = (),
) -> Built:
    """Return the model of these layers, of Docker's types, whose weights say `statistics`.

    `config_type` is Docker's; `context_size` takes the place of the weights' own.
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
        config, layers = cncf_config(config), cncf_layers(layers)
    return assemble(config, layers, annotations, notes=notes)


def rehearse(plan: Plan, request: PackageRequest) -> None:
    """Raise `PackagingError` if the documents of `plan` get larger than registries take.

    Everything but the digests is known before a byte is hashed, so this need not wait for them.
    """
    build(plan, request, [_NO_DIGEST] * len(plan.files))


def file_layers(files: Sequence[LayerFile], digests: Sequence[Digest]) -> tuple[Descriptor, ...]:
    """Return the files as layers of Docker's types, annotated as Docker Model Runner does."""
    return tuple(
        file_layer(file.media_type, digest, file.metadata, file.filepath)
        for file, digest in zip(files, digests, strict=True)
    )


def file_layer(
    media_type: str, digest: Digest, metadata: LayerMetadata, filepath: str
) -> Descriptor:
    """Return the layer that a file is, annotated as Docker Model Runner does."""
    return Descriptor(
        media_type,
        digest,
        metadata.size,
        {
            mediatypes.FILEPATH: filepath,
            mediatypes.FILE_METADATA: metadata.encode(),
            mediatypes.FILE_UNTESTED: "false",
        },
    )


def assemble(
    config: ModelConfig,
    layers: Sequence[Descriptor],
    annotations: Mapping[str, str],
    *,
    artifact_type: str | None = None,
    notes: tuple[str, ...] = (),
) -> Built:
    """Return the model of this config and these layers.

    A CNCF model gets its artifact type; `artifact_type` is for one of Docker's, which has none.
    """
    config_bytes = config.encode()
    if len(config_bytes) > MAX_DOCUMENT_BYTES:
        raise _too_large(f"the config would be {len(config_bytes)} bytes")
    descriptor = Descriptor(config.media_type, Digest.of(config_bytes), len(config_bytes))
    if config.is_cncf:
        artifact_type = mediatypes.CNCF_MANIFEST
    try:
        manifest = Manifest.build(
            descriptor, layers, artifact_type=artifact_type, annotations=annotations
        )
    except ManifestError as error:  # of our own values, only their length is left to be wrong
        raise _too_large(f"the manifest of {len(layers)} layers {error.message}") from None
    return Built(manifest, config, config_bytes, notes)


def _too_large(problem: str) -> PackagingError:
    return PackagingError(
        f"{problem}; registries take documents of {MAX_DOCUMENT_BYTES} bytes",
        hint="package fewer files, for instance a directory without data sets and checkpoints",
    )
