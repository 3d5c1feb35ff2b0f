"""Tree: the paths of a store's files, and opening or creating a store's directory.

An OCI image layout (image-spec v1.1, image-layout.md) with additional files::

    oci-layout              {"imageLayoutVersion": "1.0.0"}
    index.json              the models and their tags; see `index`
    blobs/<alg>/<hex>       verified blobs, and nothing else
    .lock                   held while the store is changed
    ingest/<alg>-<hex>.part     a partial download; its .json describes it, its .lock has the owner
    ingest/import-<id>.tmp      a file that is being imported; see `imports`
    ingest/uploads/<uuid>/      an upload to the embedded registry; see `registry_server.uploads`
    ingest/leases/<id>          the blobs that a live process needs; see `leases`
    ingest/unflushed/<alg>-<hex>, ingest/linked/<alg>-<hex>    see `blobs`
    ingest/listing.json         see `layout.ListingCache`
    ingest/places.json          see `blob_places`
    ingest/bundles/             bundles that are being made or deleted
    bundles/<alg>-<hex>/    models as directories for runtimes; see `kept_bundles`
    quarantine/<alg>-<hex>  damaged blobs
    server/                 files and batches of `modelpack serve`; see its `StoredFiles`
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Final

from modelpack.artifacts import media_types
from modelpack.artifacts.digest import ALGORITHMS, Digest
from modelpack.artifacts.json_document import decode_object, encode
from modelpack.errors import InvalidDigestError, ManifestError, StoreError, UnsafePathError
from modelpack.store.filesystem import FileLock, map_os_errors, read_own, write_atomically

LAYOUT_VERSION: Final = "1.0.0"
_LAYOUT_FILE = "oci-layout"
_MAX_LAYOUT_BYTES = 64 * 1024
_EMPTY_INDEX = {"schemaVersion": 2, "mediaType": media_types.OCI_INDEX, "manifests": []}
# A directory that has only these still counts as empty.
_IGNORED = frozenset({".lock", "lost+found", ".DS_Store", "ingest", "server"})


class Tree:
    """The paths of the store at `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.layout = root / _LAYOUT_FILE
        self.index = root / "index.json"
        self.blobs = root / "blobs"
        self.bundles = root / "bundles"
        self.quarantine = root / "quarantine"
        self.server = root / "server"
        #: All content is written here before it is verified.
        self.ingest = root / "ingest"
        self.leases = self.ingest / "leases"
        self.uploads = self.ingest / "uploads"
        self.bundle_ingest = self.ingest / "bundles"
        self.unflushed = self.ingest / "unflushed"
        self.linked = self.ingest / "linked"

    def blob(self, digest: Digest) -> Path:
        """Return the path of the blob, whether it exists or not."""
        return self.blobs / digest.algorithm / digest.encoded

    def partial(self, digest: Digest) -> Path:
        """Return the path of a partial download of the blob."""
        return self.ingest / f"{label(digest)}.part"

    def lock(self) -> FileLock:
        """Return the lock for all changes: publishing, index, leases, garbage collection."""
        return FileLock(self.root / ".lock")

    def is_read_only(self) -> bool:
        """Return whether the file system is read-only: then no process deletes anything either."""
        try:
            return bool(os.statvfs(self.root).f_flag & os.ST_RDONLY)
        except FileNotFoundError:  # the store is made at the first write
            return False

    def prepare(self) -> None:
        """Create the store, if it does not exist yet, and the directories for writing.

        Another tool may have made this layout.
        """
        if not os.path.lexists(self.layout):
            with map_os_errors("create the store", self.root):
                _initialise(self)
        self.check_inside()
        with map_os_errors("create directories in", self.root):
            for folder in (self.blobs / "sha256", self.leases, self.unflushed, self.linked):
                folder.mkdir(parents=True, exist_ok=True)

    def check_inside(self) -> None:
        """Raise `UnsafePathError` if a directory of the store is a link to a place outside it.

        Writing or deleting below such a link would write or delete files elsewhere.
        """
        for folder in (
            *(self.blobs, *(self.blobs / name for name in ALGORITHMS), self.quarantine),
            *(self.leases, self.uploads, self.unflushed, self.linked),
            *(self.bundles, self.bundle_ingest),
        ):
            if not self.holds(folder):
                raise UnsafePathError(
                    f"{folder} points outside the store, to {os.path.realpath(folder)}",
                    expected=str(self.root),
                    got=os.path.realpath(folder),
                    hint="replace the symbolic link by a directory",
                )

    def holds(self, path: Path) -> bool:
        """Return whether `path`, with all links resolved, is inside the store."""
        root = os.path.realpath(self.root)
        return os.path.realpath(path).startswith(root.rstrip("/") + "/")


def label(digest: Digest) -> str:
    """Return the digest as a file name."""
    return f"{digest.algorithm}-{digest.encoded}"


def labelled_digest(name: str) -> Digest | None:
    """Return the digest of a file name made by `label`, or None."""
    try:
        return Digest.parse(name.replace("-", ":", 1))
    except InvalidDigestError:
        return None


def open_tree(root: Path, *, create: bool, lazy: bool) -> Tree:
    """Return the tree at `root`; with `create`, make a store in an absent or empty directory.

    If it is `lazy`, `Tree.prepare` makes the store. Raises `StoreError` for any other directory.
    """
    tree = Tree(Path(os.path.abspath(root)))
    with map_os_errors("open the store", tree.root):
        found = False
        with suppress(FileNotFoundError, NotADirectoryError):
            found = bool(os.lstat(tree.layout))  # raises for a denied directory, unlike `lexists`
        if not found:
            _refuse_foreign(tree)
            if not create:
                raise StoreError(
                    f"there is no model store at {tree.root}",
                    hint="name another directory with --store or MODELPACK_STORE",
                )
            if lazy:
                return tree
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
    hint = f"name an empty directory, or one that contains {_LAYOUT_FILE!r}"
    if {"models.json", "layout.json"} <= found:
        hint = "this is the store of Docker Model Runner: see `modelpack import --docker-store`"
    raise StoreError(
        f"{tree.root} is not a model store: it is not empty and has no {_LAYOUT_FILE!r}", hint=hint
    )


def _initialise(tree: Tree) -> None:
    """Write the files of an empty layout, `oci-layout` first: another process may open it."""
    tree.ingest.mkdir(parents=True, exist_ok=True)
    with tree.lock().held():
        if not tree.layout.exists():
            version = encode({"imageLayoutVersion": LAYOUT_VERSION})
            write_atomically(tree.layout, version, by_way_of=tree.ingest)
        if not tree.index.exists():
            write_atomically(tree.index, encode(_EMPTY_INDEX), by_way_of=tree.ingest)
    tree.prepare()


def _check_version(tree: Tree) -> None:
    with map_os_errors("read", tree.layout):
        raw = read_own(tree.layout, _MAX_LAYOUT_BYTES, follow=True)
    try:
        version = decode_object(raw, str(tree.layout)).get("imageLayoutVersion")
    except ManifestError as error:
        raise StoreError(f"{tree.root} is not a model store: {error}") from None
    if version != LAYOUT_VERSION:
        raise StoreError(
            f"{tree.root} has the layout version {version!r}, expected {LAYOUT_VERSION!r}",
            hint="use the version of Modelpack that made it, or name another directory",
        )
