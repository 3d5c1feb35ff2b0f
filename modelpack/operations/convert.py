"""Convert: a model into another form, in the store or straight into a registry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from modelpack.descriptor import checked_platform
from modelpack.digest import Digest
from modelpack.errors import UsageError
from modelpack.operations.find import find_model
from modelpack.operations.image import PLATFORMS, image_of
from modelpack.operations.package import package
from modelpack.operations.remote import RemoteOptions, open_repository
from modelpack.operations.single_files import as_single_files, is_of_single_files
from modelpack.operations.transfer import transfer
from modelpack.operations.watching import watching
from modelpack.packaging.request import PackageRequest
from modelpack.progress import ProgressCallback, Stop
from modelpack.reference import Reference
from modelpack.stores.layout import LayoutStore

Form = Literal["docker", "cncf", "image"]
FORMS: Final[tuple[Form, ...]] = ("docker", "cncf", "image")


@dataclass(frozen=True, slots=True)
class Converted:
    """What a conversion made: `digest` is of the manifest, or of the index of an image."""

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
    """Make the model `name` one of Docker's format, of CNCF's, or an OCI image, as `target`.

    It may be a ModelKit of KitOps or a model of Ollama's, too, and one whose layers are archives.

    Weights are taken over as they are. An image holds the files under /models, one for each of
    `platforms`; with `push`, it is sent to its registry and not stored: its layers are made while
    they are sent. The others are stored, and pushed too. The same model gives the same digest.
    """
    where = Reference.parse(target) if isinstance(target, str) else target
    if where.digest is not None:
        raise UsageError(f"{where}: a digest cannot be chosen, it follows from the files")
    if to not in FORMS:
        raise UsageError(f"form {to!r}: expected one of {', '.join(FORMS)}")
    store = store or LayoutStore()
    options = remote or RemoteOptions()
    if to != "image":
        made = package(
            where,
            PackageRequest(format=to),
            from_model=name,
            push=push,
            store=store,
            remote=options,
            progress=progress,
            stop=stop,
        )
        return Converted(where, made.digest, made.notes)
    if not platforms or len(set(platforms)) < len(platforms):
        raise UsageError("an image is for one platform or more, each once")
    for platform in platforms:
        checked_platform(platform, "platform")
    watch = watching(progress, stop)
    model = find_model(name, store, pull=True, remote=options, watch=watch)
    with store.lease(blob.digest for blob in model.manifest.blobs):
        named = model.digest
        if not is_of_single_files(model):
            model = as_single_files(model, store, watch)
        image = image_of(model, store, watch, platforms=platforms, named=named)
        document = image.document
        if push:
            with open_repository(where, options, watch, writes=True) as repository:
                transfer(
                    image,
                    repository,
                    document.descriptor,
                    document.raw,
                    where.tag,
                    concurrency=options.concurrency,
                    watch=watch,
                )
        else:
            transfer(
                image,
                store,
                document.descriptor,
                document.raw,
                str(where),
                concurrency=options.concurrency,
                watch=watch,
            )
    return Converted(where, document.digest)
