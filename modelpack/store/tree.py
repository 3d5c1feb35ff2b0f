"""The directories of a store, and which directories may be one.

An OCI image layout (image-spec v1.1, image-layout.md) with our own files beside it::

    oci-layout              {"imageLayoutVersion": "1.0.0"}
    index.json              the models and their tags
    blobs/<alg>/<hex>       what is verified, and nothing else
    .lock                   held by whoever changes the store
    ingest/<alg>-<hex>.part     a download under way; .json beside it says of what, .lock by whom
    ingest/import-<id>.tmp      a file on its way in
    ingest/uploads/<uuid>/      an upload to the embedded registry; see `registry_server.uploads`
    ingest/leases/<id>          which blobs a live process needs
    ingest/unflushed/<alg>-<hex>, ingest/linked/<alg>-<hex>    see `trust`
    ingest/listing.json         see `listing_cache`
    ingest/bundles/             bundles that are being made or deleted
    bundles/<alg>-<hex>/    models laid out for runtimes; see `kept`
    quarantine/<alg>-<hex>  blobs that turned out to be damaged
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from modelpack.artifacts.digest import Digest
from modelpack.artifacts.json_document import decode_object, encode
from modelpack.errors import InvalidDigestError, ManifestError, StoreError, UnsafePathError
from modelpack.store.filesystem import read_own, translating, write_atomically
from modelpack.store.locks import FileLock

LAYOUT_VERSION: Final = "1.0.0"
_LAYOUT_FILE = "oci-layout"
_MAX_LAYOUT_BYTES = 64 * 1024
_EMPTY_INDEX = {
    "schemaVersion": 2,
    "mediaType": "application/vnd.oci.image.index.v1+json",
    "manifests": [],
}
# What may lie in a directory that is still as good as empty.
_IGNORED = frozenset({".lock", "lost+found", ".DS_Store", "ingest"})


@dataclass(frozen=True, slots=True)
class Tree:
    """Where each file of the store at `root` belongs."""

    root: Path

    @property
    def layout(self) -> Path:
        """The file that says that this is a layout."""
        return self.root / _LAYOUT_FILE

    @property
    def index(self) -> Path:
        """The list of models."""
        return self.root / "index.json"

    @property
    def blobs(self) -> Path:
        """The verified blobs."""
        return self.root / "blobs"

    @property
    def ingest(self) -> Path:
        """Where everything is written before it is verified."""
        return self.root / "ingest"

    @property
    def leases(self) -> Path:
        """One file for each lease."""
        return self.ingest / "leases"

    @property
    def uploads(self) -> Path:
        """Uploads to the embedded registry."""
        return self.ingest / "uploads"

    @property
    def bundles(self) -> Path:
        """Models laid out for runtimes."""
        return self.root / "bundles"

    @property
    def bundling(self) -> Path:
        """Bundles that are being made or deleted."""
        return self.ingest / "bundles"

    @property
    def unflushed(self) -> Path:
        """Marks of blobs that may not have reached the disk."""
        return self.ingest / "unflushed"

    @property
    def linked(self) -> Path:
        """Marks of blobs that share their bytes with a file elsewhere."""
        return self.ingest / "linked"

    @property
    def quarantine(self) -> Path:
        """Damaged blobs."""
        return self.root / "quarantine"

    def blob(self, digest: Digest) -> Path:
        """Return where the blob belongs, whether it is there or not."""
        return self.blobs / digest.algorithm / digest.encoded

    def partial(self, digest: Digest) -> Path:
        """Return where a download of the blob is written, if there is one."""
        return self.ingest / f"{label(digest)}.part"

    def lock(self) -> FileLock:
        """Return the lock of all changes: publishing, index, leases, collection."""
        return FileLock(self.root / ".lock")

    def is_read_only(self) -> bool:
        """Return whether the file system takes no changes: then nobody deletes anything either."""
        return bool(os.statvfs(self.root).f_flag & os.ST_RDONLY)

    def prepare(self) -> None:
        """Make the directories that writing needs; another tool may have made this layout."""
        self.check_inside()
        with translating("create directories in", self.root):
            for folder in (self.blobs / "sha256", self.leases, self.unflushed, self.linked):
                folder.mkdir(parents=True, exist_ok=True)

    def check_inside(self) -> None:
        """Raise `UnsafePathError` if a directory of the store is a link that leads out of it.

        Whatever is written or deleted below them would be written or deleted elsewhere.
        """
        for folder in (
            self.blobs,
            self.blobs / "sha256",
            self.blobs / "sha512",
            self.leases,
            self.uploads,
            self.unflushed,
            self.linked,
            self.quarantine,
            self.bundles,
            self.bundling,
        ):
            if not self.holds(folder):
                raise UnsafePathError(
                    f"{folder} leads out of the store, to {os.path.realpath(folder)}",
                    expected=str(self.root),
                    got=os.path.realpath(folder),
                    hint="replace the symbolic link by a directory",
                )

    def holds(self, path: Path) -> bool:
        """Return whether `path`, all links followed, lies in the store."""
        root = os.path.realpath(self.root)
        return os.path.realpath(path).startswith(root.rstrip("/") + "/")


def label(digest: Digest) -> str:
    """Return the digest as one file name."""
    return f"{digest.algorithm}-{digest.encoded}"


def labelled(name: str) -> Digest | None:
    """Return the digest that the file name stands for, if it does."""
    try:
        return Digest.parse(name.replace("-", ":", 1))
    except InvalidDigestError:
        return None


def open_tree(root: Path, *, create: bool) -> Tree:
    """Return the tree at `root`; an absent or empty directory becomes a store if `create`.

    Raises `StoreError` where there is something else.
    """
    tree = Tree(Path(os.path.abspath(root)))
    with translating("open the store", tree.root):
        if not os.path.lexists(tree.layout):
            _refuse_foreign(tree)
            if not create:
                raise StoreError(
                    f"there is no model store at {tree.root}",
                    hint="name another directory with --store or MODELPACK_STORE",
                )
            _initialise(tree)
    _check_version(tree)
    tree.check_inside()
    return tree


def _refuse_foreign(tree: Tree) -> None:
    if not os.path.lexists(tree.root):
        return
    if not tree.root.is_dir():
        raise StoreError(f"{tree.root} is not a model store: it is not a directory")
    found = {entry.name for entry in os.scandir(tree.root)}
    if _LAYOUT_FILE in found or not found - _IGNORED:
        return
    hint = f"name an empty directory, or one with a file {_LAYOUT_FILE!r}"
    if {"models.json", "layout.json"} <= found:
        hint = "this is the store of Docker Model Runner: see `modelpack import --docker-store`"
    raise StoreError(
        f"{tree.root} is not a model store: it is not empty and has no {_LAYOUT_FILE!r}", hint=hint
    )


def _initialise(tree: Tree) -> None:
    """Make the files of an empty layout, the telling one first: another process may look."""
    tree.ingest.mkdir(parents=True, exist_ok=True)
    with tree.lock().held():
        if not tree.layout.exists():
            version = encode({"imageLayoutVersion": LAYOUT_VERSION})
            write_atomically(tree.layout, version, by_way_of=tree.ingest)
        if not tree.index.exists():
            write_atomically(tree.index, encode(_EMPTY_INDEX), by_way_of=tree.ingest)
    tree.prepare()


def _check_version(tree: Tree) -> None:
    with translating("read", tree.layout):
        raw = read_own(tree.layout, _MAX_LAYOUT_BYTES, follow=True)
    try:
        version = decode_object(raw, str(tree.layout)).get("imageLayoutVersion")
    except ManifestError as error:
        raise StoreError(f"{tree.root} is not a model store: {error}") from None
    if version != LAYOUT_VERSION:
        raise StoreError(
            f"{tree.root} has the layout version {version!r}, expected {LAYOUT_VERSION!r}",
            hint="a newer program may have made it; it is left alone",
        )
