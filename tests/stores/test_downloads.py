"""Downloads: resuming, verifying, and the files left after each kind of failure."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from modelpack.errors import (
    DigestMismatchError,
    InterruptedTransferError,
    ModelpackError,
    RemoteUnavailableError,
    SizeMismatchError,
    StorageFullError,
)
from modelpack.progress import Action
from modelpack.storage import BlobReader, Outcome
from modelpack.store import filesystem as disk_space
from modelpack.store.downloads import Partial
from modelpack.store.layout import LayoutStore
from tests.contract.parts import BytesSource, Watcher, blob_of, content_of

MIB = 1024 * 1024
# With and without a thread for writing.
SIZES = [3 * MIB + 1, 9 * MIB + 1]


@pytest.fixture(params=SIZES, ids=["direct", "threaded"])
def content(request: pytest.FixtureRequest) -> bytes:
    return os.urandom(request.param)


def part_of(store: LayoutStore, content: bytes) -> Path:
    return store.root / "ingest" / f"sha256-{blob_of(content).digest.encoded}.part"


def left_in_ingest(store: LayoutStore) -> list[str]:
    return sorted(path.name for path in (store.root / "ingest").iterdir() if path.is_file())


@dataclass
class FailingSource(BytesSource):
    """A source that calls `fail` after half of its bytes, the first `times` times it is opened."""

    fail: Callable[[], None] = lambda: None
    times: int = 1
    opened: list[int] = field(default_factory=list)

    @contextmanager
    def open(self, offset: int = 0) -> Iterator[BlobReader]:
        self.opened.append(offset)
        with super().open(offset) as inner:
            half = len(self.content) // 2 - offset
            failing = self.fail if len(self.opened) <= self.times else lambda: None
            yield Failing(inner, half, failing)


@dataclass
class Failing:
    inner: BlobReader
    until: int
    fail: Callable[[], None]

    def readinto(self, buffer: memoryview, /) -> int:
        if self.until <= 0:
            self.fail()
            return self.inner.readinto(buffer)
        count = self.inner.readinto(buffer[: self.until])
        self.until -= count
        return count


def lose_connection() -> None:
    raise RemoteUnavailableError("the registry hung up")


def test_a_finished_blob_is_read_only_and_leaves_nothing_behind(
    store: LayoutStore, content: bytes, watcher: Watcher
) -> None:
    blob = blob_of(content)
    store.write_blob(blob, BytesSource(content), watcher.watch)
    path = store.blob_path(blob.digest)
    assert stat.S_IMODE(path.stat().st_mode) == 0o444
    assert path == store.root / "blobs" / "sha256" / blob.digest.encoded
    assert left_in_ingest(store) == []
    assert list((store.root / "ingest" / "unflushed").iterdir()) == []


def test_nothing_is_under_blobs_before_the_last_byte_is_verified(
    store: LayoutStore, content: bytes, watcher: Watcher
) -> None:
    seen: list[list[str]] = []

    def look() -> None:
        seen.append([p.name for p in (store.root / "blobs").rglob("*") if p.is_file()])

    store.write_blob(blob_of(content), FailingSource(content, fail=look), watcher.watch)
    assert seen
    assert not any(seen)


@pytest.mark.parametrize("error", [RemoteUnavailableError, OSError, KeyboardInterrupt])
def test_what_was_fetched_is_kept_and_not_fetched_again(
    store: LayoutStore, content: bytes, watcher: Watcher, error: type[BaseException]
) -> None:
    def fail() -> None:
        raise error("cut")

    blob, source = blob_of(content), FailingSource(content, fail=fail)
    with pytest.raises(error, match="cut"):
        store.write_blob(blob, source, watcher.watch)
    assert not store.has_blob(blob)
    assert part_of(store, content).stat().st_size == len(content) // 2

    assert store.write_blob(blob, source, watcher.watch) is Outcome.WRITTEN
    assert source.opened == [0, len(content) // 2]
    assert content_of(store, blob) == content
    assert left_in_ingest(store) == []


def test_a_stop_request_keeps_what_was_fetched(
    store: LayoutStore, content: bytes, watcher: Watcher
) -> None:
    source = FailingSource(content, fail=watcher.stop.request)
    with pytest.raises(InterruptedTransferError):
        store.write_blob(blob_of(content), source, watcher.watch)
    assert part_of(store, content).stat().st_size >= len(content) // 2
    store.write_blob(blob_of(content), source, Watcher().watch)
    assert source.opened[1] >= len(content) // 2
    assert content_of(store, blob_of(content)) == content


def test_the_journal_says_what_a_part_is(
    store: LayoutStore, content: bytes, watcher: Watcher
) -> None:
    blob = blob_of(content)
    with pytest.raises(RemoteUnavailableError):
        store.write_blob(blob, FailingSource(content, fail=lose_connection), watcher.watch)
    journal = json.loads(part_of(store, content).with_suffix(".json").read_bytes())
    assert journal["digest"] == str(blob.digest)
    assert journal["size"] == blob.size
    assert journal["mediaType"] == blob.media_type
    assert journal["pid"] == os.getpid()


def test_a_whole_part_needs_no_source(store: LayoutStore, content: bytes, watcher: Watcher) -> None:
    part_of(store, content).write_bytes(content)
    part_of(store, content).chmod(0o444)  # killed between the flush and the rename
    source = BytesSource(content)
    assert store.write_blob(blob_of(content), source, watcher.watch) is Outcome.WRITTEN
    assert source.offsets == []
    assert content_of(store, blob_of(content)) == content


@pytest.mark.parametrize(
    ("spoil", "offsets"),
    [
        (lambda c: bytes([c[0] ^ 1]) + c[1:], [0]),
        (lambda c: bytes([c[0] ^ 1]) + c[1 : len(c) // 2], ["half", 0]),
        (lambda c: c + b"x", [0]),
        (lambda c: b"", [0]),
        (lambda c: c[: len(c) // 2], ["half"]),
    ],
    ids=["whole but wrong", "half and wrong", "too long", "empty", "half and right"],
)
def test_a_spoiled_part_costs_a_new_start_and_no_more(
    store: LayoutStore,
    content: bytes,
    watcher: Watcher,
    spoil: Callable[[bytes], bytes],
    offsets: list[int | str],
) -> None:
    part_of(store, content).write_bytes(spoil(content))
    source = BytesSource(content)
    assert store.write_blob(blob_of(content), source, watcher.watch) is Outcome.WRITTEN
    assert source.offsets == [len(content) // 2 if o == "half" else o for o in offsets]
    assert content_of(store, blob_of(content)) == content


def test_wrong_bytes_are_tried_once_more_from_the_start_and_then_refused(
    store: LayoutStore, content: bytes, watcher: Watcher
) -> None:
    blob, source = blob_of(content), BytesSource(bytes(len(content)))
    with pytest.raises(DigestMismatchError) as caught:
        store.write_blob(blob, source, watcher.watch)
    assert source.offsets == [0, 0]
    assert caught.value.expected == str(blob.digest)
    assert [report.digest for report in watcher.of("retry")] == [blob.digest]
    assert left_in_ingest(store) == []


def test_wrong_bytes_that_come_right_the_second_time(
    store: LayoutStore, content: bytes, watcher: Watcher
) -> None:
    class Healing(BytesSource):
        @contextmanager
        def open(self, offset: int = 0) -> Iterator[BlobReader]:
            with super().open(offset) as reader:
                yield reader
            self.content = content

    source = Healing(bytes(len(content)))
    assert store.write_blob(blob_of(content), source, watcher.watch) is Outcome.WRITTEN
    assert content_of(store, blob_of(content)) == content


@pytest.mark.parametrize("change", [-1, -MIB, 1, MIB])
def test_a_body_of_another_size_is_not_tried_again(
    store: LayoutStore, content: bytes, watcher: Watcher, change: int
) -> None:
    sent = content[:change] if change < 0 else content + bytes(change)
    source = BytesSource(sent)
    with pytest.raises(SizeMismatchError) as caught:
        store.write_blob(blob_of(content), source, watcher.watch)
    assert source.offsets == [0]
    assert caught.value.expected == str(len(content))
    assert left_in_ingest(store) == []


def test_a_body_without_end_is_stopped_at_one_byte_too_many(
    store: LayoutStore, watcher: Watcher
) -> None:
    taken = 0

    class Endless:
        def readinto(self, buffer: memoryview, /) -> int:
            nonlocal taken
            taken += len(buffer)
            return len(buffer)

    class Source:
        @contextmanager
        def open(self, offset: int = 0) -> Iterator[BlobReader]:
            yield Endless()

    with pytest.raises(SizeMismatchError):
        store.write_blob(blob_of(b"12345"), Source(), watcher.watch)
    assert taken == 6


def test_a_damaged_blob_of_another_size_is_replaced(
    store: LayoutStore, content: bytes, watcher: Watcher
) -> None:
    blob = blob_of(content)
    store.write_blob(blob, BytesSource(content), watcher.watch)
    path = store.blob_path(blob.digest)
    path.chmod(0o644)
    os.truncate(path, 5)
    assert not store.has_blob(blob)
    assert store.write_blob(blob, BytesSource(content), watcher.watch) is Outcome.WRITTEN
    assert content_of(store, blob) == content


def test_too_little_room_is_said_before_anything_is_asked_for(
    store: LayoutStore, content: bytes, watcher: Watcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.statvfs(store.root)
    free = len(content) // real.f_frsize

    class Small:
        f_frsize, f_flag = real.f_frsize, real.f_flag
        f_bavail = free

    monkeypatch.setattr(disk_space.os, "statvfs", lambda _: Small)
    source = BytesSource(content)
    with pytest.raises(StorageFullError) as caught:
        store.write_blob(blob_of(content), source, watcher.watch)
    assert source.offsets == []
    assert caught.value.needed is not None
    assert caught.value.available == free * real.f_frsize
    assert caught.value.needed > caught.value.available
    # Bytes that are present need no more room.
    part_of(store, content).write_bytes(content[: 2 * MIB])
    assert store.write_blob(blob_of(content), source, watcher.watch) is Outcome.WRITTEN


def test_the_owner_of_a_part_alone_writes_it(store: LayoutStore, watcher: Watcher) -> None:
    blob = blob_of(b"weights")
    lock = Partial.lock(store._tree, blob.digest)
    with lock.held():
        watch = watcher.watch
        watcher.stop.request()
        with pytest.raises(InterruptedTransferError):
            store.write_blob(blob, BytesSource(b"weights"), watch)
    assert [report.digest for report in watcher.of("note")] == [blob.digest]
    assert store.write_blob(blob, BytesSource(b"weights"), Watcher().watch) is Outcome.WRITTEN


def test_sources_own_errors_pass_unchanged(store: LayoutStore, watcher: Watcher) -> None:
    error = RemoteUnavailableError("no route")

    class Dead:
        @contextmanager
        def open(self, offset: int = 0) -> Iterator[BlobReader]:
            raise error
            yield

    with pytest.raises(ModelpackError) as caught:
        store.write_blob(blob_of(b"x"), Dead(), watcher.watch)
    assert caught.value is error


def test_what_is_there_is_reported_as_skipped(store: LayoutStore, watcher: Watcher) -> None:
    blob = blob_of(b"weights")
    store.write_blob(blob, BytesSource(b"weights"), Watcher().watch)
    store.write_blob(blob, BytesSource(b"weights"), watcher.watch)
    (report,) = watcher.reports
    assert (report.action, report.completed, report.total) == (Action.SKIP, 7, 7)
