"""Convert models between formats, and to OCI images whose layers are tar archives.

No tar archive is written to disk: `TarLayer` generates it while it is read. It is plain GNU tar
without owners and times, so the same files give the same bytes.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Final, Literal

from modelpack.artifacts import media_types
from modelpack.artifacts.descriptor import Descriptor, checked_platform
from modelpack.artifacts.digest import Digest, new_hasher
from modelpack.artifacts.json_document import encode
from modelpack.artifacts.manifest import Index, Manifest
from modelpack.artifacts.model import Model, ModelFile, Role
from modelpack.artifacts.reference import Reference
from modelpack.builder.request import PackageRequest
from modelpack.builder.times import EPOCH
from modelpack.bundles.names import arrange
from modelpack.errors import UnsafePathError, UnsupportedError, UsageError
from modelpack.operations.archives import tar_header
from modelpack.operations.package import as_single_files, is_of_single_files, package
from modelpack.operations.pull import find_model
from modelpack.operations.referrers import BlobsSource
from modelpack.operations.remote import RemoteOptions, new_reference, open_repository
from modelpack.operations.transfer import TransferOptions, transfer_model
from modelpack.progress import Action, Progress, ProgressCallback, Stop
from modelpack.storage import BlobReader, BlobSource, BytesBlob, Source, Watch, watching
from modelpack.store.layout import LayoutStore

_BLOCK: Final = 512
_CHUNK: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class TarFile:
    """A file of `size` bytes, to be written at `path` in an archive."""

    path: str
    size: int
    content: BlobSource


#: The size of a part of an archive in bytes, and its content.
_Piece = tuple[int, BlobSource]


@dataclass(frozen=True, slots=True)
class TarLayer:
    """A tar archive of files, as a `BlobSource`. `size` is in bytes."""

    size: int
    _pieces: tuple[_Piece, ...] = field(repr=False)

    @classmethod
    def of(cls, files: Iterable[TarFile]) -> TarLayer:
        """Return the archive of these files, in their order."""
        pieces: list[_Piece] = []
        made: set[str] = set()

        def add(content: bytes) -> None:
            pieces.append((len(content), BytesBlob(content)))

        for file in files:
            for directory in accumulate(file.path.split("/")[:-1], "{}/{}".format):
                if directory not in made:
                    made.add(directory)
                    add(tar_header(f"{directory}/", 0, tarfile.DIRTYPE, 0o755))
            add(tar_header(file.path, file.size))
            pieces.append((file.size, file.content))
            add(bytes(-file.size % _BLOCK))
        add(bytes(2 * _BLOCK))
        return cls(sum(size for size, _ in pieces), tuple(pieces))

    @contextmanager
    def open(self, offset: int = 0) -> Iterator[BlobReader]:
        """Yield the archive's bytes from `offset` on."""
        with closing(_Reader(self._pieces, offset)) as reader:
            yield reader

    def digest(self, seen: Callable[[int], None]) -> Digest:
        """Read all files and return the digest; call `seen` with the bytes read so far."""
        hasher, buffer, done = new_hasher(), memoryview(bytearray(_CHUNK)), 0
        with self.open() as reader:
            while count := reader.readinto(buffer):
                hasher.update(buffer[:count])
                done += count
                seen(done)
        return Digest.of_hasher(hasher)


class _Reader:
    """Reads the pieces in turn; a piece that is too short ends the archive."""

    def __init__(self, pieces: Sequence[_Piece], offset: int) -> None:
        self._left = list(reversed(pieces))
        self._skip = offset
        self._open = ExitStack()  # the file that is being read
        self._reader: BlobReader | None = None
        self._missing = 0

    def readinto(self, buffer: memoryview, /) -> int:
        """Fill `buffer` from its start; return the number of bytes, 0 at the end."""
        while self._reader is None or not self._missing:
            if not self._next():
                return 0
        count = self._reader.readinto(buffer[: self._missing])
        self._missing = self._missing - count if count else 0
        if not count:
            self._left.clear()
        return count

    def close(self) -> None:
        """Close the file that is being read."""
        self._open.close()
        self._reader = None

    def _next(self) -> bool:
        self.close()
        while self._left:
            size, content = self._left.pop()
            if self._skip >= size:
                self._skip -= size
                continue
            self._reader = self._open.enter_context(content.open(self._skip))
            self._missing, self._skip = size - self._skip, 0
            return True
        return False


#: The directory of the files in the image.
DIRECTORY: Final = "models"
#: The default platforms of images. The files are the same for all of them.
PLATFORMS: Final = ("linux/amd64", "linux/arm64")
#: overlayfs allows 128 layers, and other images may add layers to this one.
MAX_WEIGHT_LAYERS: Final = 100


def _image_of(
    model: Model, source: Source, watch: Watch, *, platforms: Sequence[str], named: Digest
) -> tuple[Manifest | Index, BlobsSource]:
    """Return the image of a model and its blobs; read the model's files once, to compute digests.

    Layers are generated on read. The image records the digest `named` as its origin. For several
    platforms, returns an index of images that share all layers. Raises `UnsupportedError` if layers
    of the model are archives, and `UnsafePathError` if two files have the same path.
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
        layers.append(Descriptor(media_types.OCI_TAR_LAYER, digest, layer.size))
        blobs[digest] = layer
    manifests: dict[Digest, bytes] = {}
    entries = []
    annotations = {**model.manifest.annotations, media_types.MODEL: str(named)}
    for platform in platforms:
        raw = encode(_config(platform, layers))
        config = Descriptor(media_types.OCI_IMAGE_CONFIG, Digest.of(raw), len(raw))
        blobs[config.digest] = BytesBlob(raw)
        manifest = Manifest.build(config, layers, annotations=annotations)
        manifests[manifest.digest] = manifest.raw
        own = manifest.descriptor
        entries.append(Descriptor(own.media_type, own.digest, own.size, platform=platform))
        document: Manifest | Index = manifest
    if len(entries) > 1:
        document = Index.build(entries, annotations=annotations)
    return document, BlobsSource(blobs, manifests)


def _grouped(model: Model) -> list[list[tuple[str, ModelFile]]]:
    """Return the files of each layer with their paths: first the small files, then the weights."""
    placed = [(file.filepath, file) for file in model.files()]
    if any(file.archive for _, file in placed):
        raise UnsupportedError(
            "cannot be converted to an image: its layers are archives",
            path=str(model.reference or model.digest),
            hint="unpack the model with `modelpack bundle`, then package the files",
        )
    others = {item.file: item.path for item in arrange(model).files}
    named = [(path or others.get(file), file) for path, file in placed]
    files = [(path, file) for path, file in named if path is not None]
    seen: dict[str, Digest] = {}
    for path, file in files:
        if seen.setdefault(path, file.descriptor.digest) != file.descriptor.digest:
            raise UnsafePathError(f"two different files of the model have the path {path!r}")
    weights = [(path, file) for path, file in files if file.role in (Role.WEIGHT, Role.PROJECTOR)]
    rest = [(path, file) for path, file in files if file.role not in (Role.WEIGHT, Role.PROJECTOR)]
    each = -(-len(weights) // MAX_WEIGHT_LAYERS) or 1
    groups = [weights[at : at + each] for at in range(0, len(weights), each)]
    return [rest, *groups] if rest else groups


def _config(platform: str, layers: Sequence[Descriptor]) -> dict[str, Any]:
    system, architecture, *variant = platform.split("/")
    value: dict[str, Any] = {"created": EPOCH, "architecture": architecture, "os": system}
    if variant:
        value["variant"] = variant[0]
    value["config"] = {}
    value["rootfs"] = {"type": "layers", "diff_ids": [str(layer.digest) for layer in layers]}
    value["history"] = [{"created": EPOCH, "created_by": "modelpack convert"} for _ in layers]
    return value


Form = Literal["docker", "cncf", "image"]
FORMS: Final[tuple[Form, ...]] = ("docker", "cncf", "image")


@dataclass(frozen=True, slots=True)
class Converted:
    """The result of a conversion: `digest` is that of the manifest, or of the index of an image."""

    reference: Reference
    digest: Digest
    notes: tuple[str, ...] = ()


def convert(
    name: str,
    target: str | Reference,
    *,
    to: Form,
    platforms: Sequence[str] = PLATFORMS,
    push: bool = False,
    store: LayoutStore | None = None,
    remote: RemoteOptions | None = None,
    progress: ProgressCallback | None = None,
    stop: Stop | None = None,
) -> Converted:
    """Convert the model `name` to Docker's format, to CNCF ModelPack or to an OCI image `target`.

    The model may also be a ModelKit of KitOps or a model of Ollama, and its layers may be archives.
    Weights are not changed, and the same model gives the same digest. The result is stored and,
    with `push`, also pushed; an image is stored or pushed, since its layers are generated while
    they are written. Its files are under /models, and it has a manifest for each of `platforms`.
    """
    where = new_reference(target)
    if to not in FORMS:
        raise UsageError(f"form {to!r}: expected one of {', '.join(FORMS)}")
    store = store or LayoutStore()
    options = remote or RemoteOptions()
    if to != "image":
        made = package(
            where, PackageRequest(format=to), from_model=name, push=push,
            store=store, remote=options, progress=progress, stop=stop,
        )  # fmt: skip
        return Converted(where, made.digest, made.notes)
    if not platforms or len(set(platforms)) < len(platforms):
        raise UsageError("an image needs at least one platform, each given once")
    for platform in platforms:
        checked_platform(platform, "platform")
    watch = watching(progress, stop)
    model = find_model(name, store, pull=True, remote=options, watch=watch)
    with store.lease(blob.digest for blob in model.manifest.blobs):
        named = model.digest
        if not is_of_single_files(model):
            model = as_single_files(model, store, watch)
        image, source = _image_of(model, store, watch, platforms=platforms, named=named)
        how = TransferOptions(watch, options.concurrency)
        if push:
            with open_repository(where, options, watch, writes=True) as repository:
                transfer_model(source, repository, image.descriptor, image.raw, where.tag, how)
        else:
            transfer_model(source, store, image.descriptor, image.raw, str(where), how)
    return Converted(where, image.digest)
