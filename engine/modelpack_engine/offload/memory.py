"""Blocks in host memory: bounded in bytes, the least recently used go first."""

from __future__ import annotations

from collections import OrderedDict


class BlockMemory:
    """Contents of blocks by hash, `limit` bytes at most. For one thread."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.num_bytes = 0
        self._blocks: OrderedDict[bytes, bytes] = OrderedDict()

    def __contains__(self, hash_: bytes) -> bool:
        return hash_ in self._blocks

    def __len__(self) -> int:
        return len(self._blocks)

    def put(self, hash_: bytes, content: bytes) -> None:
        """Keep a block, and drop what it leaves no room for; one above the limit is not kept."""
        self.discard(hash_)
        if len(content) > self.limit:
            return
        while self.num_bytes + len(content) > self.limit:
            _, dropped = self._blocks.popitem(last=False)
            self.num_bytes -= len(dropped)
        self._blocks[hash_] = content
        self.num_bytes += len(content)

    def get(self, hash_: bytes) -> bytes | None:
        """Return a block, which counts as its use."""
        content = self._blocks.get(hash_)
        if content is not None:
            self._blocks.move_to_end(hash_)
        return content

    def discard(self, hash_: bytes) -> None:
        """Drop a block, if it is there."""
        content = self._blocks.pop(hash_, None)
        if content is not None:
            self.num_bytes -= len(content)
