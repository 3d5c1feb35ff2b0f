"""PrefixSnapshots: recurrent state as it was at the end of some prefixes.

A recurrent layer cannot go on from keys and values alone, so a prefix of such a model is shared up
to the last block whose end has a snapshot. Snapshots are taken where a chunk of a prompt ends at
the end of a block: the bounded number of places at which the state is there to be copied.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable


class PrefixSnapshots:
    """At most `limit` states by the hash of the block they come after; what is unused goes first.

    What a state is only the runner knows: to it, and not to the block manager, they are arrays.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._states: OrderedDict[bytes, object] = OrderedDict()

    def __contains__(self, hash_: bytes) -> bool:
        return hash_ in self._states

    def __len__(self) -> int:
        return len(self._states)

    def put(self, hash_: bytes, state: object) -> None:
        """Keep a state; the least recently used one goes if there are too many."""
        if not self.limit:
            return
        self._states[hash_] = state
        self._states.move_to_end(hash_)
        if len(self._states) > self.limit:
            self._states.popitem(last=False)

    def get(self, hash_: bytes) -> object:
        """Return a state that is there, which counts as its use."""
        self._states.move_to_end(hash_)
        return self._states[hash_]

    def discard(self, hashes: Iterable[bytes]) -> None:
        """Drop states that turned out to be wrong."""
        for hash_ in hashes:
            self._states.pop(hash_, None)

    def clear(self) -> None:
        """Drop all."""
        self._states.clear()
