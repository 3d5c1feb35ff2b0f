"""Models and sources for the contract suite and the tests of stores."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from modelpack.artifacts import media_types
from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.json_document import encode
from modelpack.artifacts.manifest import Manifest
from modelpack.progress import Progress, Stop
from modelpack.storage import BlobReader, Target, Watch


@dataclass
class BytesSource:
    """A source of `content` that counts how often it is opened, and where."""

    content: bytes
    offsets: list[int] = field(default_factory=list)

    @contextmanager
    def open(self, offset: int = 0) -> Iterator[BlobReader]:
        self.offsets.append(offset)
        yield io.BytesIO(self.content[offset:])


@dataclass
class Watcher:
    """A `Watch` that records its reports."""

    reports: list[Progress] = field(default_factory=list)
    stop: Stop = field(default_factory=Stop)

    @property
    def watch(self) -> Watch:
        return Watch(self.reports.append, self.stop)

    def of(self, action: str) -> list[Progress]:
        return [report for report in self.reports if report.action == action]


def blob_of(content: bytes, media_type: str = media_types.DOCKER_GGUF) -> Descriptor:
    """Return the descriptor of `content`."""
    return Descriptor(media_type, Digest.of(content), len(content))


@dataclass(frozen=True)
class SmallModel:
    """A model of a few bytes: its manifest, and the content of each blob."""

    manifest: Manifest
    contents: dict[Digest, bytes]

    @property
    def digest(self) -> Digest:
        return self.manifest.digest

    @property
    def descriptor(self) -> Descriptor:
        return self.manifest.descriptor


def small_model(*layers: bytes, artifact_type: str | None = None) -> SmallModel:
    """Return a model with these layers and a config of its own."""
    descriptors = [blob_of(layer) for layer in layers]
    config = encode({"config": {"format": "gguf"}, "of": [str(d.digest) for d in descriptors]})
    config_blob = blob_of(config, media_types.DOCKER_CONFIG_V01)
    manifest = Manifest.build(config_blob, descriptors, artifact_type=artifact_type)
    contents = {d.digest: layer for d, layer in zip(descriptors, layers, strict=True)}
    return SmallModel(manifest, {**contents, config_blob.digest: config})


def write_blobs(target: Target, model: SmallModel) -> None:
    """Write all blobs of the model."""
    for blob in model.manifest.unique_blobs:
        target.write_blob(blob, BytesSource(model.contents[blob.digest]), Watcher().watch)


def write_model(target: Target, model: SmallModel, name: str | None = None) -> None:
    """Write the whole model."""
    write_blobs(target, model)
    target.write_manifest(model.descriptor, model.manifest.raw, name)


def content_of(target: Target, blob: Descriptor, offset: int = 0) -> bytes:
    """Return the bytes of a blob in the target."""
    content, buffer = bytearray(), memoryview(bytearray(64 * 1024))
    with target.blob(blob).open(offset) as reader:
        while count := reader.readinto(buffer):
            content += buffer[:count]
    return bytes(content)
