"""A model in a misbehaving registry, and an empty store to pull it into."""

from __future__ import annotations

from pathlib import Path

import modelpack
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.manifest import Manifest
from modelpack.operations.remote import RemoteOptions
from tests.models import tiny_gguf
from tests.registry.faulty import FaultyRegistry


class Published:
    """The model, its largest blob (`weight`, at `path`), and `store` on this side."""

    def __init__(self, registry: FaultyRegistry, tmp_path: Path) -> None:
        self.registry = registry
        self.reference = f"{registry.host}/team/model:v1"
        origin = modelpack.Store(tmp_path / "origin")
        request = modelpack.PackageRequest(gguf=tiny_gguf(tmp_path))
        made = modelpack.package(self.reference, request, push=True, store=origin)
        self.manifest: Manifest = made.manifest
        self.weight = made.manifest.layers[0]
        self.path = f"/blobs/{self.weight.digest}"
        self.store = modelpack.Store(tmp_path / "store")
        registry.requests.clear()

    def pull(self, remote: RemoteOptions | None = None) -> Digest:
        return modelpack.pull(self.reference, store=self.store, remote=remote).digest

    def check_whole(self) -> None:
        [file] = modelpack.resolve(self.reference, store=self.store).files
        assert Digest.of(file.path.read_bytes()) == self.weight.digest

    def check_nothing_shows(self) -> None:
        assert self.store.models() == ()
        assert not list(self.store.root.glob(f"blobs/sha256/{self.weight.digest.encoded}"))
