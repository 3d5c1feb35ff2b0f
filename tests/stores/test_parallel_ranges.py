"""Blobs over several connections: written in ranges, hashed in order, resumed."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from modelpack.errors import DigestMismatchError, RemoteUnavailableError, StorageFullError
from modelpack.progress import Stop
from modelpack.storage import Outcome, SegmentSink, SegmentsRefused
from modelpack.store import downloads
from modelpack.store.downloads import Partial
from modelpack.store.layout import LayoutStore
from tests.contract.parts import BytesSource, Watcher, blob_of, content_of

MIB = 1024 * 1024
KIB = 1024
CONTENT = os.urandom(6 * MIB + 5)
PIECE = 64 * KIB


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat a few megabytes as large, and any stream as slow."""
    monkeypatch.setattr(downloads, "WINDOW", MIB)
    monkeypatch.setattr(downloads, "MIN_BYTES_FOR_RANGES", 2 * MIB)
    monkeypatch.setattr(downloads, "FAST", 1e15)
    monkeypatch.setattr(downloads, "_SMALLEST", 300 * KIB)
    monkeypatch.setattr(downloads, "SAVE", 256 * KIB)


@dataclass
class Segmented(BytesSource):
    """Writes segments from the last to the first, in two threads; `spoil` may change them."""

    connections: int = 4
    spoil: Callable[[int, bytes], bytes] = lambda _, piece: piece
    segments: list[tuple[int, int]] = field(default_factory=list)
    sent: int = 0

    def fetch_segments(
        self, segments: Sequence[tuple[int, int]], sink: SegmentSink, stop: Stop
    ) -> None:
        self.segments += segments
        failures: list[Exception] = []

        def bring(part: Sequence[tuple[int, int]]) -> None:
            try:
                for start, end in part:
                    for at in range(start, end, PIECE):
                        piece = self.spoil(at, self.content[at : min(at + PIECE, end)])
                        sink.write(at, memoryview(piece))
                        self.sent += len(piece)
            except Exception as error:
                failures.append(error)

        backwards = list(reversed(segments))
        other = threading.Thread(target=bring, args=(backwards[::2],))
        other.start()
        bring(backwards[1::2])
        other.join()
        if failures:
            raise failures[0]


def part_of(store: LayoutStore) -> Path:
    return store.root / "ingest" / f"sha256-{blob_of(CONTENT).digest.encoded}.part"


def left_in_ingest(store: LayoutStore) -> list[str]:
    return sorted(path.name for path in (store.root / "ingest").iterdir() if path.is_file())


def write(store: LayoutStore, source: BytesSource, watcher: Watcher) -> Outcome:
    return store.write_blob(blob_of(CONTENT), source, watcher.watch)


def test_what_is_slow_comes_in_segments(store: LayoutStore, watcher: Watcher) -> None:
    source = Segmented(CONTENT)
    assert write(store, source, watcher) is Outcome.WRITTEN
    assert content_of(store, blob_of(CONTENT)) == CONTENT
    first = source.segments[0][0]
    assert MIB <= first <= 2 * MIB, "one stream until it has shown how slow it is"
    assert source.sent == len(CONTENT) - first
    assert left_in_ingest(store) == []
    told = [report.completed for report in watcher.of("fetch")]
    assert told[-1] == len(CONTENT)


@pytest.mark.parametrize(
    "fast", [("FAST", 1.0), ("MIN_BYTES_FOR_RANGES", 6 * MIB)], ids=["fast", "small"]
)
def test_what_is_fast_or_small_comes_in_one_stream(
    store: LayoutStore, watcher: Watcher, fast: tuple[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, *fast)
    source = Segmented(CONTENT)
    assert write(store, source, watcher) is Outcome.WRITTEN
    assert (source.offsets, source.segments) == ([0], [])


def test_one_connection_is_one_stream(store: LayoutStore, watcher: Watcher) -> None:
    source = Segmented(CONTENT, connections=1)
    assert write(store, source, watcher) is Outcome.WRITTEN
    assert source.segments == []


def fail_at(limit: int) -> Callable[[int, bytes], bytes]:
    """Fail in the middle of the blob, after its end was written."""

    def spoil(at: int, piece: bytes) -> bytes:
        if at < limit:
            raise RemoteUnavailableError("the registry hung up")
        return piece

    return spoil


def test_only_what_is_missing_is_fetched_again(store: LayoutStore, watcher: Watcher) -> None:
    broken = Segmented(CONTENT, spoil=fail_at(3 * MIB))
    with pytest.raises(RemoteUnavailableError):
        write(store, broken, watcher)
    part = part_of(store)
    assert part.stat().st_size == len(CONTENT), "it has its full size from the start"
    present = json.loads(part.with_suffix(".json").read_bytes())["present"]
    kept = sum(end - start for start, end in present)
    assert kept == broken.segments[0][0] + broken.sent
    assert len(present) > 1

    again = Segmented(CONTENT)
    assert write(store, again, Watcher()) is Outcome.WRITTEN
    assert again.offsets == [], "what is missing is known, no stream has to show how slow it is"
    assert again.sent == len(CONTENT) - kept
    assert content_of(store, blob_of(CONTENT)) == CONTENT
    assert left_in_ingest(store) == []


def test_a_source_without_segments_goes_on_from_the_first_gap(
    store: LayoutStore, watcher: Watcher
) -> None:
    with pytest.raises(RemoteUnavailableError):
        write(store, Segmented(CONTENT, spoil=fail_at(3 * MIB)), watcher)
    plain = BytesSource(CONTENT)
    assert write(store, plain, watcher) is Outcome.WRITTEN
    assert len(plain.offsets) == 1
    assert plain.offsets[0] >= MIB
    assert content_of(store, blob_of(CONTENT)) == CONTENT


def test_a_source_that_refuses_segments_is_read_on(store: LayoutStore, watcher: Watcher) -> None:
    class Refusing(Segmented):
        def fetch_segments(
            self, segments: Sequence[tuple[int, int]], sink: SegmentSink, stop: Stop
        ) -> None:
            self.segments += segments
            raise SegmentsRefused("answered 200 to a range")

    source = Refusing(CONTENT)
    assert write(store, source, watcher) is Outcome.WRITTEN
    assert source.offsets == [0, source.segments[0][0]]
    assert content_of(store, blob_of(CONTENT)) == CONTENT


def test_wrong_bytes_are_tried_once_more_from_the_start(
    store: LayoutStore, watcher: Watcher
) -> None:
    source = Segmented(CONTENT, spoil=lambda at, piece: bytes(len(piece)))
    with pytest.raises(DigestMismatchError):
        write(store, source, watcher)
    assert source.offsets == [0, 0]
    assert left_in_ingest(store) == []


@pytest.mark.long
@pytest.mark.parametrize(
    "journal",
    [
        "{",
        "[]",
        '{"present": [[0, 5]]}',
        '{"digest": "sha256:00", "present": [[0, 5]]}',
        '{"digest": "DIGEST", "present": 5}',
        '{"digest": "DIGEST", "present": [[5, 1]]}',
        '{"digest": "DIGEST", "present": [["a", null]]}',
        '{"digest": "DIGEST", "present": [[0, 99999999999]]}',
        '{"digest": "DIGEST", "present": [[0, 3000000], [4000000, 5000000]]}',
        '{"digest": "DIGEST", "present": [[4000000, 5000000]]}',
    ],
)
@pytest.mark.parametrize("spoiled", [b"", CONTENT[: 2 * MIB], bytes(len(CONTENT))])
def test_whatever_a_journal_says_the_blob_is_right(
    store: LayoutStore, watcher: Watcher, journal: str, spoiled: bytes
) -> None:
    """A wrong journal costs a restart, but never makes a wrong blob."""
    part_of(store).write_bytes(spoiled)
    text = journal.replace("DIGEST", str(blob_of(CONTENT).digest))
    part_of(store).with_suffix(".json").write_text(text)
    assert write(store, Segmented(CONTENT), watcher) is Outcome.WRITTEN
    assert content_of(store, blob_of(CONTENT)) == CONTENT
    assert left_in_ingest(store) == []


def test_a_full_disk_says_how_much_is_missing(
    store: LayoutStore, watcher: Watcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Partial.write_at

    def full(self: Partial, offset: int, view: memoryview) -> None:
        if self.present > 4 * MIB:
            raise StorageFullError("no space left on device")
        real(self, offset, view)

    monkeypatch.setattr(Partial, "write_at", full)
    with pytest.raises(StorageFullError) as caught:
        write(store, Segmented(CONTENT), watcher)
    assert caught.value.needed is not None
    assert 0 < caught.value.needed < 2 * MIB + 5
    monkeypatch.undo()
    again = Segmented(CONTENT)
    write(store, again, watcher)
    assert again.sent < 2 * MIB + 5, "what was there is kept"


def test_a_hash_that_cannot_be_had_ends_the_fetch(
    store: LayoutStore, watcher: Watcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Partial, "catch_up", unreadable)
    with pytest.raises(OSError, match="Input/output"):
        write(store, Segmented(CONTENT), watcher)


def test_a_collection_counts_what_a_part_takes_not_how_long_it_is(store: LayoutStore) -> None:
    os.truncate(os.open(part_of(store), os.O_CREAT | os.O_WRONLY), 10**9)
    os.utime(part_of(store), (0, 0))
    report = store.gc()
    assert part_of(store).name in report.partials
    assert report.bytes_freed < MIB
