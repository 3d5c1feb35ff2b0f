"""BlobPlaces: the repositories that each blob was pushed to or pulled from, `ingest/places.json`.

A push asks the registry to link blobs from them instead of sending the bytes again. containerd
records the same in labels (`containerd.io/distribution.source.*`), skopeo in its blob-info cache.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from modelpack.artifacts.digest import Digest
from modelpack.errors import LockedError, StoreError
from modelpack.store.filesystem import read_own, write_atomically
from modelpack.store.tree import Tree

#: Limits of the file: the oldest blobs, and the oldest places of a blob, are dropped.
MAX_BLOBS: Final = 4096
MAX_PLACES: Final = 4
#: Seconds to wait for another process that changes the store.
PATIENCE: Final = 2.0
_MAX_BYTES: Final = 4 * 1024 * 1024
_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class BlobPlaces:
    """The file of one store; a damaged one, or one of another version, counts as empty."""

    tree: Tree

    def of(self, digest: Digest) -> list[str]:
        """Return the places (`registry/repository`) of the blob, the latest first."""
        return self._read().get(str(digest), [])

    def note(self, digests: Iterable[Digest], place: str) -> None:
        """Record that `place` has these blobs, unless the store is locked or not writable."""
        wanted = [str(digest) for digest in digests]
        lock = self.tree.lock().held(patience=PATIENCE)
        with suppress(OSError, StoreError, LockedError), lock:
            known = self._read()
            if all(place in known.get(digest, ())[:1] for digest in wanted):
                return
            for digest in wanted:
                others = [other for other in known.pop(digest, ()) if other != place]
                known[digest] = [place, *others][:MAX_PLACES]
            latest = list(known.items())[-MAX_BLOBS:]
            while len(content := _encoded(dict(latest))) > _MAX_BYTES:
                latest = latest[len(latest) // 2 + 1 :]
            path = self.tree.ingest / "places.json"
            write_atomically(path, content, by_way_of=self.tree.ingest)

    def _read(self) -> dict[str, list[str]]:
        with suppress(OSError, ValueError, RecursionError):
            value = json.loads(read_own(self.tree.ingest / "places.json", _MAX_BYTES))
            if isinstance(value, dict) and value.get("version") == _VERSION:
                found = value.get("blobs")
                if isinstance(found, dict):
                    return {digest: _strings(places) for digest, places in found.items()}
        return {}


def _encoded(known: dict[str, list[str]]) -> bytes:
    return json.dumps({"version": _VERSION, "blobs": known}, separators=(",", ":")).encode()


def _strings(value: object) -> list[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []
