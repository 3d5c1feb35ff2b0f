"""A store of blobs and models for one test, and listings of directories."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from modelpack.artifacts import media_types
from modelpack.artifacts.config import ModelConfig
from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.manifest import Manifest
from modelpack.artifacts.model import Model

CNCF = "application/vnd.cncf.model."
Layer = tuple[str, str | None, bytes]  # media type, file path, the blob's bytes


class Stored:
    """Blobs below `root`, read-only as in a store."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True)

    def path(self, descriptor: Descriptor) -> Path:
        return self.root / descriptor.digest.encoded

    def add(self, media_type: str, path: str | None, content: bytes) -> Descriptor:
        annotations = {} if path is None else {media_types.FILEPATH: path}
        descriptor = Descriptor(media_type, Digest.of(content), len(content), annotations)
        blob = self.path(descriptor)
        if not blob.exists():
            blob.write_bytes(content)
            blob.chmod(0o444)
        return descriptor

    def model(
        self,
        layers: Sequence[Layer],
        config: ModelConfig | str = media_types.DOCKER_CONFIG_V02,
        *,
        diff_ids: Sequence[bytes] = (),
        artifact_type: str | None = None,
    ) -> Model:
        """Return a model; `diff_ids` are the uncompressed contents of its layers."""
        descriptors = [self.add(*layer) for layer in layers]
        if isinstance(config, str):
            config = ModelConfig(config)
        if not config.diff_ids and diff_ids:
            config = config.with_changes(diff_ids=tuple(Digest.of(content) for content in diff_ids))
        raw = config.encode()
        described = self.add(config.media_type, None, raw)
        manifest = Manifest.build(described, descriptors, artifact_type=artifact_type)
        return Model(None, manifest.descriptor, manifest, config)


Seen = dict[str, tuple[str, int, bytes]]


def everything(root: Path) -> Seen:
    """Return the kind, permissions and content or target of everything below `root`, by path."""
    seen: Seen = {}
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = Path(folder, name)
            status = path.lstat()
            mode = stat.S_IMODE(status.st_mode)
            if stat.S_ISLNK(status.st_mode):
                entry = ("link", 0, os.fsencode(os.readlink(path)))
            elif stat.S_ISDIR(status.st_mode):
                entry = ("directory", mode, b"")
            else:
                entry = ("file", mode, path.read_bytes())
            seen[str(path.relative_to(root))] = entry
    return seen


def contents(root: Path) -> dict[str, bytes]:
    """Return the contents of the files below `root`, links followed, by path."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if not path.is_dir()
    }
