"""MirroredRepository: a repository that is read from its mirrors first, and written itself."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from types import TracebackType
from typing import TypeVar

from modelpack.byte_ranges import ByteRanges
from modelpack.descriptor import Descriptor
from modelpack.digest import Digest
from modelpack.errors import IntegrityError, RegistryError, RemoteUnavailableError
from modelpack.progress import Action, Progress, Stop
from modelpack.registry.endpoint import Endpoint
from modelpack.registry.mirrors import Mirror
from modelpack.registry.registry import Registry
from modelpack.registry.remote_file import LIMIT, RemoteFile
from modelpack.registry.repository import Repository
from modelpack.storage import (
    BlobReader,
    BlobSource,
    SegmentedSource,
    SegmentSink,
    SegmentsRefused,
)

T = TypeVar("T")
#: What sends a reader on to the next place; all else, as a stop, ends the call.
_TROUBLE = (RegistryError, IntegrityError)


class MirroredRepository(Repository):
    """Reads go to the mirrors in their order, and on to the registry itself where one fails.

    A mirror that did not answer is not asked again. What comes from one is verified like all else.
    """

    def __init__(
        self,
        registry: Registry,
        endpoint: Endpoint,
        mirrors: Sequence[tuple[Mirror, Repository]],
    ) -> None:
        super().__init__(registry, endpoint)
        self._mirrors = list(mirrors)
        self._mirrors_lock = threading.Lock()
        self._read_from: dict[Digest, int] = {}

    def resolve(self, name: str) -> Descriptor:
        """Return the descriptor of the manifest `name`."""
        return self._first(name, lambda place: place.resolve(name), super().resolve)

    def fetch_manifest(self, descriptor: Descriptor) -> bytes:
        """Return a manifest's bytes, checked against size, digest and media type."""
        fetch = super().fetch_manifest
        return self._first(
            str(descriptor.digest),
            lambda place: place.fetch_manifest(descriptor),
            lambda _: fetch(descriptor),
        )

    def fetch_manifest_by_name(self, name: str) -> tuple[Descriptor, bytes]:
        """Return the manifest `name` with its descriptor, by one request."""
        read = super().fetch_manifest_by_name
        return self._first(name, lambda place: place.fetch_manifest_by_name(name), read)

    def blob(self, descriptor: Descriptor) -> BlobSource:
        """Return the blob to read from; whether it exists shows when it is opened."""
        places = [r.blob(descriptor) for m, r in self._usable() if m.serves(str(descriptor.digest))]
        return _MirroredBlob(self, descriptor, [*places, super().blob(descriptor)])

    def open_file(self, descriptor: Descriptor, *, limit: int = LIMIT) -> RemoteFile:
        """Return the blob as a file, from the first place that gives its first byte."""

        def opened(place: Repository) -> RemoteFile:
            file = place.open_file(descriptor, limit=limit)
            try:
                file.read(1)
                file.seek(0)
            except BaseException:
                file.close()
                raise
            return file

        own = super().open_file
        digest = str(descriptor.digest)
        return self._first(digest, opened, lambda _: own(descriptor, limit=limit))

    def next_place(self, digest: Digest, count: int) -> int:
        """Return which of `count` places a blob is read from, another one whenever it starts anew.

        A blob whose bytes were wrong is started anew, and not where they came from.
        """
        with self._mirrors_lock:
            place = min(self._read_from.get(digest, 0), count - 1)
            self._read_from[digest] = place + 1
            return place

    def current_place(self, digest: Digest) -> int:
        """Return which place a blob was last started from."""
        with self._mirrors_lock:
            return max(self._read_from.get(digest, 0) - 1, 0)

    def note(self, error: Exception) -> None:
        """Tell that a mirror is of no help."""
        self._transport.report(Progress(Action.NOTE, message=f"{error}; going on elsewhere"))

    def _usable(self) -> list[tuple[Mirror, Repository]]:
        with self._mirrors_lock:
            return list(self._mirrors)

    def _first(self, name: str, read: Callable[[Repository], T], own: Callable[[str], T]) -> T:
        for mirror, place in self._usable():
            if not mirror.serves(name):
                continue
            try:
                return read(place)
            except _TROUBLE as error:
                self.note(error)
                if isinstance(error, RemoteUnavailableError):
                    with self._mirrors_lock:
                        self._mirrors = [kept for kept in self._mirrors if kept[1] is not place]
        return own(name)


class _MirroredBlob:
    """A blob in several places; fulfils `BlobSource` and `SegmentedSource`."""

    def __init__(
        self, repository: MirroredRepository, descriptor: Descriptor, places: Sequence[BlobSource]
    ) -> None:
        self._repository = repository
        self._descriptor = descriptor
        self._places = places

    def open(self, offset: int = 0) -> _MirroredStream:
        """Return the blob's bytes from `offset` on, from the first place that has them."""
        first = 0
        if offset == 0:
            first = self._repository.next_place(self._descriptor.digest, len(self._places))
        return _MirroredStream(self._repository, self._places[first:], offset)

    @property
    def connections(self) -> int:
        """How many connections would fetch segments, from the place that is read from."""
        place = self._places[self._current()]
        return place.connections if isinstance(place, SegmentedSource) else 1

    def fetch_segments(
        self, segments: Sequence[tuple[int, int]], sink: SegmentSink, stop: Stop
    ) -> None:
        """Bring the bytes of `segments` to `sink`; what a mirror does not give comes elsewhere."""
        noted = _NotedSink(sink)
        places = self._places[self._current() :]
        for number, place in enumerate(places):
            left = [gap for start, end in segments for gap in noted.written.missing(start, end)]
            try:
                if not isinstance(place, SegmentedSource):
                    raise SegmentsRefused("a place that knows no segments")
                place.fetch_segments(left, noted, stop)
            except _TROUBLE as error:
                if number == len(places) - 1:
                    raise
                self._repository.note(error)
            else:
                return

    def _current(self) -> int:
        return min(self._repository.current_place(self._descriptor.digest), len(self._places) - 1)


class _NotedSink:
    """Remembers what went to another sink."""

    def __init__(self, sink: SegmentSink) -> None:
        self._sink = sink
        self._lock = threading.Lock()
        self.written = ByteRanges()

    def write(self, offset: int, view: memoryview) -> None:
        self._sink.write(offset, view)
        with self._lock:
            self.written.add(offset, offset + len(view))


class _MirroredStream:
    """The bytes of a blob, continued elsewhere where a mirror fails in the middle."""

    def __init__(
        self, repository: MirroredRepository, places: Sequence[BlobSource], offset: int
    ) -> None:
        self._repository = repository
        self._places = list(places)
        self._position = offset
        self._stack = ExitStack()
        self._reader = self._open()

    def __enter__(self) -> _MirroredStream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def readinto(self, buffer: memoryview, /) -> int:
        """Fill `buffer` from its start with what has arrived; 0 means the end."""
        while True:
            try:
                count = self._reader.readinto(buffer)
            except _TROUBLE as error:
                if not self._places:
                    raise
                self._repository.note(error)
                self._stack.close()
                self._reader = self._open()
            else:
                self._position += count
                return count

    def _open(self) -> BlobReader:
        while True:
            place = self._places.pop(0)
            try:
                opened: AbstractContextManager[BlobReader] = place.open(self._position)
                return self._stack.enter_context(opened)
            except _TROUBLE as error:
                if not self._places:
                    raise
                self._repository.note(error)
