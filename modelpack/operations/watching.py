"""What the verbs make of their arguments `progress` and `stop`."""

from __future__ import annotations

from modelpack.progress import ProgressCallback, Stop, serialized
from modelpack.storage import Watch


def watching(progress: ProgressCallback | None, stop: Stop | None = None) -> Watch:
    """Return the `Watch` of one call."""
    return Watch(serialized(progress), stop or Stop())
