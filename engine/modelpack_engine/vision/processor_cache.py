"""ProcessorCache: what prompts need of files that a model has read, by the bytes of each file.

A second question about a file then neither decodes nor processes it. Embeddings have a cache of
their own, in `VisionEncoder`; its digests are those of `Media`.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, replace

from modelpack_engine.request import Media

#: Bytes of all files that are kept: pixels, samples and frames, or inputs where they are smaller.
MAX_FILE_BYTES = 256 * 1024 * 1024
#: Bytes that a file takes beside its content, and those of one of its tokens.
_FILE_BYTES, _TOKEN_BYTES = 1024, 40

#: An owner, and the SHA-256 of a file and of how it is decoded.
FileKey = tuple[bytes, bytes]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a picture goes: its index among `count` files.

    `before` is the last token of a picture right before it. `owner` has sent the request, empty if
    it is not known.
    """

    index: int = 0
    count: int = 1
    before: int | None = None
    owner: bytes = b""


@dataclass(frozen=True, slots=True)
class PlacedFile:
    """The tokens of a file, and the parts of them that embeddings replace.

    Positions count from the first token. `place` is what they depend on in the prompt.
    """

    token_ids: tuple[int, ...]
    media: tuple[Media, ...]
    place: Place = Place()

    @property
    def nbytes(self) -> int:
        """About the bytes that it takes in memory."""
        count = len(self.token_ids) + sum(len(each.token_ids) for each in self.media)
        return _FILE_BYTES + _TOKEN_BYTES * count + sum(each.nbytes for each in self.media)


class ProcessorCache:
    """Keeps files within `max_bytes`, and drops the least recently used ones. Thread-safe.

    The encoder needs the inputs only if it has no embeddings, so they are dropped if the content
    that they are made from is smaller: a picture of Qwen's has 8 times the bytes as inputs.

    Owners share no files: the time of a reply would tell which ones another one has sent.
    """

    def __init__(self, max_bytes: int = MAX_FILE_BYTES) -> None:
        self._max_bytes = max_bytes
        self._kept: OrderedDict[FileKey, PlacedFile] = OrderedDict()
        self._lock = threading.Lock()
        #: The bytes of the files.
        self.nbytes = 0

    def __reduce__(self) -> tuple[type[ProcessorCache], tuple[int]]:
        """Pickle the limit: each process keeps the files of its requests."""
        return ProcessorCache, (self._max_bytes,)

    def find(self, key: FileKey, place: Place) -> PlacedFile | None:
        """Return a file, None if it is not kept or if it was in another place."""
        with self._lock:
            found = self._kept.get(key)
            if found is None or found.place != place:
                return None
            self._kept.move_to_end(key)
            return found

    def keep(self, key: FileKey, file: PlacedFile) -> None:
        """Keep a file instead of the one of the same key, unless it exceeds the limit."""
        file = replace(file, media=tuple(map(_smaller, file.media)))
        if file.nbytes > self._max_bytes:
            return
        with self._lock:
            if (former := self._kept.pop(key, None)) is not None:
                self.nbytes -= former.nbytes
            self._kept[key] = file
            self.nbytes += file.nbytes
            while self.nbytes > self._max_bytes:
                _, oldest = self._kept.popitem(last=False)
                self.nbytes -= oldest.nbytes


def _smaller(media: Media) -> Media:
    """Return media with its inputs or with what they are made from."""
    if media.source is None:
        return media
    without = replace(media, source=None)
    is_source_smaller = media.source.content.nbytes < without.nbytes
    return replace(media, inputs={}) if is_source_smaller else without
