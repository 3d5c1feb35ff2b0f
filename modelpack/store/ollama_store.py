"""OllamaStore: read the models directory of Ollama.

    manifests/<host>/<namespace>/<model>/<tag>     a manifest
    blobs/sha256-<hex>

Source: ollama/ollama at fb30760996871fa9460115c753afd2c60d4ab0f7: manifest/paths.go,
manifest/manifest.go and types/model/name.go.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.json_document import MAX_DOCUMENT_BYTES
from modelpack.artifacts.manifest import Manifest
from modelpack.artifacts.reference import Reference
from modelpack.errors import (
    InvalidReferenceError,
    ManifestError,
    NotFoundError,
    StoreError,
    UnsafePathError,
)
from modelpack.storage import BlobSource
from modelpack.store.blobs import StoredBlob
from modelpack.store.filesystem import map_os_errors, read_own
from modelpack.store.lookup import StoredModel

_REGISTRY: Final = "registry.ollama.ai"
_NAMESPACE: Final = "library"
#: The largest number of models that are listed.
MAX_MODELS: Final = 10_000


def default_ollama_root() -> Path:
    """Return $OLLAMA_MODELS, else `~/.ollama/models`, as Ollama does."""
    configured = os.environ.get("OLLAMA_MODELS", "").strip()
    return Path(configured) if configured else Path.home() / ".ollama" / "models"


def ollama_reference(name: str) -> Reference:
    """Return the reference that Ollama means by `name`: `llama3` is one of its own library.

    Raises `InvalidReferenceError`.
    """
    full = name if "/" in name else f"{_NAMESPACE}/{name}"
    return Reference.parse(full, default_registry=_REGISTRY)


class OllamaStore:
    """The models directory of Ollama at `root`; implements `modelpack.storage.Source`.

    Nothing in it counts as verified: Ollama checks a blob once, when it is pulled.
    """

    def __init__(self, root: str | Path | None = None) -> None:
        """Open the directory `root` (default: `default_ollama_root()`), else `StoreError`."""
        where = default_ollama_root() if root is None else Path(root).expanduser()
        self.root = Path(os.path.abspath(where))
        if not (self.root / "manifests").is_dir():
            raise StoreError(
                f"there are no models of Ollama at {self.root}",
                hint="name its directory of models, or set OLLAMA_MODELS",
            )

    def resolve(self, name: str) -> Descriptor:
        """Return the manifest of a model by Ollama's name for it; raises `NotFoundError`."""
        reference = ollama_reference(name)
        path = self._manifest_path(reference)
        if path is None:
            raise NotFoundError(
                f"{reference} is not in Ollama's models at {self.root}",
                hint="run `ollama list`",
            )
        found = self._parsed(path).descriptor
        if reference.digest is not None:
            reference.digest.check_equal(found.digest, str(reference))
        return found

    def models(self) -> tuple[StoredModel, ...]:
        """Return all models with a valid name and manifest, sorted by name."""
        references: dict[Descriptor, list[Reference]] = {}
        for reference, path in self._names():
            # A damaged manifest must not hide the other models.
            with suppress(ManifestError, StoreError):
                references.setdefault(self._parsed(path).descriptor, []).append(reference)
        return tuple(StoredModel(found, tuple(names)) for found, names in references.items())

    def fetch_manifest(self, descriptor: Descriptor) -> bytes:
        """Return the bytes of a manifest, verified by size and digest."""
        for _, path in self._names():
            with suppress(StoreError):
                raw = self._read(path)
                if len(raw) == descriptor.size and Digest.of(raw) == descriptor.digest:
                    return raw
        raise NotFoundError(f"manifest {descriptor.digest} is not in Ollama's models {self.root}")

    def blob(self, descriptor: Descriptor) -> BlobSource:
        """Return the blob as a source; opening it raises `NotFoundError` if it is missing."""
        return StoredBlob(self.blob_path, descriptor.digest)

    def blob_path(self, digest: Digest) -> Path:
        """Return the path of an unverified blob; raises `NotFoundError`."""
        path = self.root / "blobs" / f"{digest.algorithm}-{digest.encoded}"
        if not path.is_file():
            raise NotFoundError(f"blob {digest} is not in Ollama's models {self.root}")
        if not os.path.realpath(path).startswith(os.path.realpath(self.root) + os.sep):
            raise UnsafePathError(f"{path} points outside the store", got=os.path.realpath(path))
        return path

    def _manifest_path(self, reference: Reference) -> Path | None:
        # Ollama keeps upper case in names, and compares them without it.
        wanted = str(reference.without_digest()).lower()
        return next((path for name, path in self._names() if str(name).lower() == wanted), None)

    def _names(self) -> Iterator[tuple[Reference, Path]]:
        root = self.root / "manifests"
        with map_os_errors("list", root):
            found = sorted(root.glob("*/*/*/*"))
        if len(found) > MAX_MODELS:
            raise StoreError(f"{root} has more than {MAX_MODELS} models")
        for path in found:
            host, namespace, model, tag = path.relative_to(root).parts
            with suppress(InvalidReferenceError):
                reference = Reference.parse(f"{host}/{namespace}/{model}:{tag}")
                if path.is_file():
                    yield reference, path

    def _parsed(self, path: Path) -> Manifest:
        return Manifest.parse(self._read(path), str(path))

    def _read(self, path: Path) -> bytes:
        with map_os_errors("read", path):
            return read_own(path, MAX_DOCUMENT_BYTES, follow=True)
