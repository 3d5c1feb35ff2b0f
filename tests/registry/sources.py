"""Blobs to send, and clients to send them with."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.progress import Progress, Stop
from modelpack.registry import Registry, Repository, RetryPolicy, StaticCredentials
from modelpack.storage import Outcome, Watch
from tests.registry.faulty import REPOSITORY, FaultyRegistry


class Content:
    """A blob in memory; `opened` counts how often it was read."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.opened = 0

    @contextmanager
    def open(self, offset: int = 0) -> Iterator[Any]:
        self.opened += 1
        with io.BytesIO(self.content[offset:]) as stream:
            yield stream

    @property
    def descriptor(self) -> Descriptor:
        return Descriptor("application/octet-stream", Digest.of(self.content), len(self.content))


class Client:
    """A repository, its reports, and the waits that its retries asked for."""

    def __init__(self, host: str, *, name: str = REPOSITORY, **options: Any) -> None:
        self.sleeps: list[float] = []
        self.reports: list[Progress] = []
        self.stop = Stop()
        options.setdefault("credentials", StaticCredentials({}))
        options.setdefault(
            "retry", RetryPolicy(sleep=self.sleeps.append, chance=lambda: 0.0, now=lambda: 0.0)
        )
        self.registry = Registry(host, stop=self.stop, report=self.reports.append, **options)
        self.repository: Repository = self.registry.repository(name)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.registry.close()

    @property
    def watch(self) -> Watch:
        return Watch(self.reports.append, self.stop)

    def write(self, content: bytes) -> Outcome:
        """Write a blob."""
        source = Content(content)
        return self.repository.write_blob(source.descriptor, source, self.watch)


Connect = Callable[..., Client]


def read_all(
    repository: Repository,
    descriptor: Descriptor,
    offset: int = 0,
    into: bytearray | None = None,
) -> bytes:
    """Return all bytes of a blob's stream; after an error, `into` has those read so far."""
    content = bytearray() if into is None else into
    buffer = memoryview(bytearray(1000))
    with repository.blob(descriptor).open(offset) as stream:
        while count := stream.readinto(buffer):
            content += buffer[:count]
    return bytes(content)


def manifest_for(registry: FaultyRegistry, tag: str = "v1") -> tuple[Descriptor, bytes]:
    """Add a small manifest with its blobs to `registry`."""
    from modelpack.artifacts.manifest import Manifest

    layer = registry.put_blob(b"weights", media_type="application/vnd.docker.ai.gguf.v3")
    about = {
        "config": {"format": "gguf"},
        "descriptor": {},
        "rootfs": {"type": "rootfs", "diff_ids": [str(layer.digest)]},
    }
    config = registry.put_blob(
        json.dumps(about).encode(), media_type="application/vnd.docker.ai.model.config.v0.1+json"
    )
    manifest = Manifest.build(config, [layer])
    return registry.put_manifest(manifest.raw, tag), manifest.raw
