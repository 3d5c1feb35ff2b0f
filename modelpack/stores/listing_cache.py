"""What `list` shows of each model, kept so that a store of thousands is listed at once.

`ingest/listing.json` has a few facts for each manifest, by its digest. A digest stands for the same
bytes for ever, so a fact is never out of date; what is missing is read anew, and a file that is
damaged or of another version counts as empty.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from modelpack.stores.durability import read_own, write_atomically
from modelpack.stores.tree import Tree

#: Grows when the facts change their meaning or their order.
VERSION: Final = 1
_MAX_BYTES: Final = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class ListingCache:
    """The facts of one store, as lists of JSON values."""

    tree: Tree

    def read(self) -> dict[str, list[Any]]:
        """Return the facts by digest; who reads them checks them."""
        with suppress(OSError, ValueError, RecursionError):
            value = json.loads(read_own(self.tree.ingest / "listing.json", _MAX_BYTES))
            if isinstance(value, dict) and value.get("version") == VERSION:
                facts = value.get("models")
                if isinstance(facts, dict):
                    return facts
        return {}

    def write(self, facts: Mapping[str, list[Any]]) -> None:
        """Replace the facts; a store that cannot be written to goes without."""
        content = json.dumps({"version": VERSION, "models": facts}, separators=(",", ":")).encode()
        if len(content) > _MAX_BYTES:
            return
        path = self.tree.ingest / "listing.json"
        with suppress(OSError):
            write_atomically(path, content, by_way_of=self.tree.ingest)
