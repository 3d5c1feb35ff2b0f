"""What is to be packaged, before a byte of it is hashed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from modelpack.artifacts import media_types
from modelpack.artifacts.config import ModelConfig
from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.json_document import MAX_DOCUMENT_BYTES
from modelpack.artifacts.manifest import Manifest
from modelpack.builder.config import cncf_config, cncf_layers
from modelpack.builder.files import LayerFile, LayerMetadata, Skipped
from modelpack.builder.request import PackageRequest
from modelpack.errors import ManifestError, PackagingError
from modelpack.formats.statistics import ModelStatistics

if TYPE_CHECKING:
    from modelpack.formats.statistics import ModelStatistics


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be packaged: the files in the order of layers, and what is known of the model.

    `skipped` was left out of a directory; `notes` are decisions that people should hear of.
    """

    files: tuple[LayerFile, ...]
    statistics: ModelStatistics = field(default_factory=ModelStatistics)
    created: str | None = None
    skipped: tuple[Skipped, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def total_size(self) -> int:
        """Bytes of all files, which is what there is to hash."""
        return sum(file.size for file in self.files)


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
            media_types.DOCKER_CONFIG_V02
            if request.safetensors_dir
            else media_types.DOCKER_CONFIG_V01
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
        artifact_type = media_types.CNCF_MANIFEST
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
