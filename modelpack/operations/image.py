"""Image: a model as an OCI image of a file system, for whatever mounts or runs images.

Kubernetes mounts it as an image volume, KServe by `oci+native://`; `COPY --from` works, too. The
files are under /models, in tar layers that are not compressed: weights do not get
smaller, and a layer's digest is that of its content. Sources: image-spec config.md and layer.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from modelpack import mediatypes
from modelpack.descriptor import Descriptor
from modelpack.digest import Digest
from modelpack.errors import NotFoundError, UnsafePathError, UnsupportedError
from modelpack.gojson import encode
from modelpack.manifest import Index, Manifest
from modelpack.model import Model, ModelFile, Role
from modelpack.packaging.times import EPOCH
from modelpack.progress import Action, Progress
from modelpack.small_blobs import BytesBlob
from modelpack.storage import BlobSource, Source, Watch
from modelpack.unpacking.names import arrange
from modelpack.unpacking.tar_layer import TarFile, TarLayer

T = TypeVar("T")
#: Where the files are in the image.
DIRECTORY: Final = "models"
#: What images are made for if nobody says: their content is the same on all.
PLATFORMS: Final = ("linux/amd64", "linux/arm64")
#: overlayfs takes 128 layers at most, and somebody may build on this image.
MAX_WEIGHT_LAYERS: Final = 100


@dataclass(frozen=True, slots=True)
class ImageSource:
    """An image, or an index of one for each platform; fulfils `Source`. Layers are read anew."""

    document: Manifest | Index
    _manifests: Mapping[Digest, bytes]
    _blobs: Mapping[Digest, BlobSource]

    def resolve(self, name: str) -> Descriptor:
        """Return the descriptor of the image, whatever the name."""
        return self.document.descriptor

    def fetch_manifest(self, descriptor: Descriptor) -> bytes:
        """Return the bytes of the index or of a manifest; raise `NotFoundError` for others."""
        return _found(self._manifests, descriptor)

    def blob(self, descriptor: Descriptor) -> BlobSource:
        """Return a layer or a config to read from."""
        return _found(self._blobs, descriptor)


def image_of(
    model: Model,
    source: Source,
    watch: Watch,
    *,
    platforms: Sequence[str] = PLATFORMS,
    named: Digest | None = None,
) -> ImageSource:
    """Return the image of a model; its files are read from `source` once, for their digests.

    `named` is the digest of what it was made of, the model's own otherwise. One platform gives an
    image, several an index of images that share all layers. Raises `UnsupportedError` for a model
    with archives in it, `UnsafePathError` for two files of one path.
    """
    layers: list[Descriptor] = []
    blobs: dict[Digest, BlobSource] = {}
    for number, files in enumerate(_grouped(model), start=1):
        layer = TarLayer.of(
            TarFile(f"{DIRECTORY}/{path}", file.descriptor.size, source.blob(file.descriptor))
            for path, file in files
        )

        def seen(done: int, name: str = f"layer {number}", size: int = layer.size) -> None:
            watch.stop.check()
            watch.report(Progress(Action.VERIFY, name, None, done, size))

        digest = layer.digest(seen)
        layers.append(Descriptor(mediatypes.OCI_TAR_LAYER, digest, layer.size))
        blobs[digest] = layer
    manifests: dict[Digest, bytes] = {}
    entries = []
    annotations = {**model.manifest.annotations, mediatypes.MODEL: str(named or model.digest)}
    for platform in platforms:
        raw = encode(_config(platform, layers))
        config = Descriptor(mediatypes.OCI_IMAGE_CONFIG, Digest.of(raw), len(raw))
        blobs[config.digest] = BytesBlob(raw)
        manifest = Manifest.build(config, layers, annotations=annotations)
        manifests[manifest.digest] = manifest.raw
        own = manifest.descriptor
        entries.append(Descriptor(own.media_type, own.digest, own.size, platform=platform))
        document: Manifest | Index = manifest
    if len(entries) > 1:
        document = Index.build(entries, annotations=annotations)
        manifests[document.digest] = document.raw
    return ImageSource(document, manifests, blobs)


def _grouped(model: Model) -> list[list[tuple[str, ModelFile]]]:
    """Return the files of each layer with their paths: what is small first, then the weights."""
    placed = [(file.filepath, file) for file in model.files()]
    if any(file.archive for _, file in placed):
        raise UnsupportedError(
            "holds archives, whose files would have to be unpacked first",
            path=str(model.reference or model.digest),
            hint="unpack it with `modelpack bundle`, and package the files",
        )
    others = {item.file: item.path for item in arrange(model).files}
    named = [(path or others.get(file), file) for path, file in placed]
    files = [(path, file) for path, file in named if path is not None]
    _check_distinct(files)
    weights = [(path, file) for path, file in files if file.role in (Role.WEIGHT, Role.PROJECTOR)]
    rest = [(path, file) for path, file in files if file.role not in (Role.WEIGHT, Role.PROJECTOR)]
    each = -(-len(weights) // MAX_WEIGHT_LAYERS) or 1
    groups = [weights[at : at + each] for at in range(0, len(weights), each)]
    return [rest, *groups] if rest else groups


def _check_distinct(files: Sequence[tuple[str, ModelFile]]) -> None:
    seen: dict[str, Digest] = {}
    for path, file in files:
        if seen.setdefault(path, file.descriptor.digest) != file.descriptor.digest:
            raise UnsafePathError(f"two different files of the model have the path {path!r}")


def _config(platform: str, layers: Sequence[Descriptor]) -> dict[str, Any]:
    system, architecture, *variant = platform.split("/")
    value: dict[str, Any] = {"created": EPOCH, "architecture": architecture, "os": system}
    if variant:
        value["variant"] = variant[0]
    value["config"] = {}
    value["rootfs"] = {"type": "layers", "diff_ids": [str(layer.digest) for layer in layers]}
    value["history"] = [{"created": EPOCH, "created_by": "modelpack convert"} for _ in layers]
    return value


def _found(among: Mapping[Digest, T], descriptor: Descriptor) -> T:
    try:
        return among[descriptor.digest]
    except KeyError:
        raise NotFoundError(f"the image has no {descriptor.digest}") from None
