"""Downloads: the blobs of a registry, to be read."""

from __future__ import annotations

from collections.abc import Sequence

from modelpack.descriptor import Descriptor
from modelpack.progress import Stop
from modelpack.registry.blob_stream import BlobStream
from modelpack.registry.endpoint import Endpoint
from modelpack.registry.segments import SegmentFetch
from modelpack.storage import SegmentSink


class RemoteBlob:
    """A blob in a registry; fulfils `BlobSource` and `SegmentedSource`."""

    def __init__(self, endpoint: Endpoint, descriptor: Descriptor) -> None:
        self._endpoint = endpoint
        self._descriptor = descriptor

    def open(self, offset: int = 0) -> BlobStream:
        """Return the blob's bytes from `offset` on, which is at most its size.

        Raises `NotFoundError`, `SizeMismatchError` if the registry's blob is longer or shorter, and
        what a request raises.
        """
        size = self._descriptor.size
        if not 0 <= offset <= size:
            raise ValueError(f"offset {offset} is outside a blob of {size} bytes")
        return BlobStream(self._endpoint, self._descriptor, offset)

    @property
    def connections(self) -> int:
        """How many connections would fetch segments; a rate limit is reached with one."""
        blobs = self._endpoint.transport.blobs
        return blobs.connections if blobs.rate is None else 1

    def fetch_segments(
        self, segments: Sequence[tuple[int, int]], sink: SegmentSink, stop: Stop
    ) -> None:
        """Bring the bytes of `segments` to `sink`, over several connections."""
        SegmentFetch(self._endpoint, self._descriptor, segments, sink, stop).run(self.connections)
