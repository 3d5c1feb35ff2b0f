"""A process that works on a store; it says where it is, and waits for a line to go on.

download STORE SIZE SEED   write one blob; says "opened OFFSET", "waiting", "half", "outcome X"
pull STORE SIZE SEED       the same with a model around it, under a lease; says "half", "done"
import STORE FILE          import a file; says "half"
tag STORE NAME REFERENCE   says "ready", tags, says "done"
lease STORE DIGEST...      says "held", and holds it until a line comes
lock FILE                  the same for a lock
create STORE               says "ready", opens the store, says "done"
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from modelpack.artifacts.digest import Digest
from modelpack.artifacts.reference import Reference
from modelpack.progress import Action, Progress, Stop
from modelpack.storage import BlobReader, Watch
from modelpack.store.filesystem import FileLock
from modelpack.store.layout import LayoutStore
from tests.contract.parts import BytesSource, blob_of, small_model


def say(text: str) -> None:
    print(text, flush=True)


def say_and_wait(text: str) -> None:
    say(text)
    if not sys.stdin.readline():
        sys.exit("nobody is there any more")


class GatedSource(BytesSource):
    """A source that gives its content in two halves and waits between them."""

    @contextmanager
    def open(self, offset: int = 0) -> Iterator[BlobReader]:
        say(f"opened {offset}")
        with super().open(offset) as inner:
            yield Halves(inner, len(self.content) // 2 - offset)


class Halves:
    def __init__(self, inner: BlobReader, until: int) -> None:
        self.inner = inner
        self.until = until

    def readinto(self, buffer: memoryview, /) -> int:
        if self.until > 0:
            count = self.inner.readinto(buffer[: self.until])
            self.until -= count
            return count
        if self.until == 0:
            self.until = -1
            say_and_wait("half")
        return self.inner.readinto(buffer)


def report(progress: Progress) -> None:
    if progress.action is Action.NOTE:
        say("waiting")


def download(root: str, size: str, seed: str) -> None:
    content = random.Random(int(seed)).randbytes(int(size))
    outcome = LayoutStore(root).write_blob(
        blob_of(content), GatedSource(content), Watch(report, Stop())
    )
    say(f"outcome {outcome}")


def pull(root: str, size: str, seed: str) -> None:
    model = small_model(b"a small layer", random.Random(int(seed)).randbytes(int(size)))
    store = LayoutStore(root)
    small, large, config = model.manifest.blobs
    with store.lease(blob.digest for blob in model.manifest.blobs):
        for blob in (small, config):
            source = BytesSource(model.contents[blob.digest])
            store.write_blob(blob, source, Watch(report, Stop()))
        source = GatedSource(model.contents[large.digest])
        store.write_blob(large, source, Watch(report, Stop()))
        store.write_manifest(model.descriptor, model.manifest.raw, "docker.io/ai/pulled:latest")
    say("done")


def import_file(root: str, path: str) -> None:
    half = Path(path).stat().st_size // 2
    waited = []

    def wait_once(progress: Progress) -> None:
        if progress.completed >= half and not waited:
            waited.append(True)
            say_and_wait("half")

    imported = LayoutStore(root).import_file(Path(path), Watch(wait_once, Stop()))
    say(f"outcome {imported.outcome} {imported.digest}")


def tag(root: str, name: str, reference: str) -> None:
    store = LayoutStore(root)
    say_and_wait("ready")
    store.tag(name, Reference.parse(reference))
    say("done")


def lease(root: str, *digests: str) -> None:
    with LayoutStore(root).lease(map(Digest.parse, digests)):
        say_and_wait("held")


def lock(path: str) -> None:
    with FileLock(Path(path)).held():
        say_and_wait("held")


def create(root: str) -> None:
    say_and_wait("ready")
    LayoutStore(root)
    say("done")


if __name__ == "__main__":
    commands = {"import": import_file}
    for command in (download, pull, tag, lease, lock, create):
        commands[command.__name__] = command
    commands[sys.argv[1]](*sys.argv[2:])
