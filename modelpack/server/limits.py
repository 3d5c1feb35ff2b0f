"""What one client may take of a registry: sizes, sessions and room on the disk."""

from __future__ import annotations

from dataclasses import dataclass

from modelpack.errors import UsageError
from modelpack.gojson import MAX_DOCUMENT_BYTES


@dataclass(frozen=True, slots=True)
class Limits:
    """Bytes, and a number of upload sessions; None is no limit.

    `manifest` and `upload` are for one each, `sessions` is for all unfinished uploads together,
    `keep_free` is what stays free on the disk whatever is uploaded, or fetched from an upstream.
    """

    manifest: int = MAX_DOCUMENT_BYTES
    upload: int | None = None
    sessions: int | None = 1000
    keep_free: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.manifest <= MAX_DOCUMENT_BYTES:
            raise UsageError(f"a limit for manifests is from 1 to {MAX_DOCUMENT_BYTES} bytes")
        for name in ("upload", "sessions"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"the limit {name!r} is {value}, expected at least 1")
        if self.keep_free < 0:
            raise UsageError("the room to keep free is negative")
