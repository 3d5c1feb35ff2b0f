"""How blobs are sent and fetched."""

from __future__ import annotations

from dataclasses import dataclass

from modelpack.registry.rate import RateLimit


@dataclass(frozen=True, slots=True)
class BlobOptions:
    """How blobs are sent and fetched; sizes are bytes.

    `chunk_size` sends blobs in chunks of that size, or of what the registry wants at least; by
    default a blob goes in one piece, which every registry takes. A blob that is large and slow to
    come is fetched over up to `connections` at a time, counted over all blobs beyond the first
    connection of each. `rate` holds all of it back.
    """

    chunk_size: int | None = None
    connections: int = 4
    rate: RateLimit | None = None

    def __post_init__(self) -> None:
        if self.chunk_size is not None and self.chunk_size < 1:
            raise ValueError(f"a chunk of {self.chunk_size} bytes is none")
        if self.connections < 1:
            raise ValueError(f"{self.connections} connections fetch nothing")
