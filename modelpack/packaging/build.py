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
from modelpack.manifest import Manifest
from modelpack.packaging.convert import cncf_config, cncf_layers
from modelpack.packaging.files import LayerFile
from modelpack.packaging.request import PackageRequest

if TYPE_CHECKING:
    from modelpack.packaging.plan import Plan

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
    layers = file_layers(plan.files, digests)
    statistics = plan.statistics
    context_size = request.context_size
    config = ModelConfig(
        mediatypes.DOCKER_CONFIG_V02 if request.safetensors_dir else mediatypes.DOCKER_CONFIG_V01,
        format=statistics.format,
        quantization=statistics.quantization,
        parameters=statistics.parameters,
        architecture=statistics.architecture,
        size=statistics.size,
        gguf=statistics.gguf,
        safetensors=statistics.safetensors,
        diffusers=statistics.diffusers,
        context_size=statistics.context_size if context_size is None else context_size,
        created=plan.created,
        diff_ids=tuple(digests),
    )
    if request.format == "cncf":
        config, layers = cncf_config(config), cncf_layers(layers)
    return assemble(config, layers, request.annotations, notes=plan.notes)


def rehearse(plan: Plan, request: PackageRequest) -> None:
    """Raise `PackagingError` if the documents of `plan` get larger than registries take.

    Everything but the digests is known before a byte is hashed, so this need not wait for them.
    """
    build(plan, request, [_NO_DIGEST] * len(plan.files))


def file_layers(files: Sequence[LayerFile], digests: Sequence[Digest]) -> tuple[Descriptor, ...]:
    """Return the files as layers of Docker's types, annotated as Docker Model Runner does."""
    return tuple(
        Descriptor(
            file.media_type,
            digest,
            file.size,
            {
                mediatypes.FILEPATH: file.filepath,
                mediatypes.FILE_METADATA: file.metadata.encode(),
                mediatypes.FILE_UNTESTED: "false",
            },
        )
        for file, digest in zip(files, digests, strict=True)
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
