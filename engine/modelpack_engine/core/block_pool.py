"""BlockPool: the blocks of one group of layers: free, in use, or kept for the prefix cache.

A pool knows the ids and hashes of its blocks, not their contents. `BlockManager` has a pool for
each group of layers, and the tables of sequences.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable

#: The block that padding rows write to; it is never allocated.
NULL_BLOCK = 0


class BlockPool:
    """`num_blocks` blocks; one of them is the null block.

    The group's layers see `window` tokens, or all of them if it is None.
    `evicted` is called with a block that is allocated again and the hash of the content it had.
    """

    def __init__(self, num_blocks: int, window: int | None = None) -> None:
        assert num_blocks > 1, "there must be a block in addition to the null block"
        assert window is None or window > 0
        self.window = window
        self.evicted: Callable[[int, bytes], None] | None = None
        self._ref_counts = [0] * num_blocks
        # The last is taken first: blocks that were never used take no memory on a CPU.
        self._free = [*reversed(range(NULL_BLOCK + 1, num_blocks))]
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self._doubtful: set[int] = set()  # may hold NaN
        self._to_scrub: set[int] = set()

    # Counts, in blocks.

    @property
    def num_total(self) -> int:
        """The blocks that can be allocated: all but the null block."""
        return len(self._ref_counts) - 1

    @property
    def num_available(self) -> int:
        """The blocks that are free, or cached and can be evicted."""
        return len(self._free) + len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_total - self.num_available

    @property
    def num_cached(self) -> int:
        """The blocks that no sequence uses, kept for the prefix cache."""
        return len(self._cached)

    def num_idle(self, blocks: Iterable[int]) -> int:
        """Return how many of `blocks` no sequence uses: sharing them makes fewer available."""
        return sum(block != NULL_BLOCK and not self._ref_counts[block] for block in blocks)

    def num_unseen(self, num_tokens: int, block_size: int) -> int:
        """Return how many whole blocks are before the window of the token after `num_tokens`."""
        return 0 if self.window is None else max(0, num_tokens - self.window) // block_size

    # References.

    def allocate(self) -> int:
        """Return a block of unknown content; evict the least recently used one if none is free."""
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            hash_ = self._hash_of.pop(block)
            del self._block_of[hash_]
            if self.evicted is not None:
                self.evicted(block, hash_)
        assert self._ref_counts[block] == 0
        self._ref_counts[block] = 1
        if block in self._doubtful:
            self._doubtful.remove(block)
            self._to_scrub.add(block)
        return block

    def doubt(self, blocks: Iterable[int]) -> None:
        """Have blocks scrubbed when they are allocated again: their content may be NaN."""
        self._doubtful.update(block for block in blocks if block != NULL_BLOCK)

    def take_to_scrub(self) -> list[int]:
        """Return the allocated blocks whose old content is to be overwritten, each once."""
        blocks, self._to_scrub = sorted(self._to_scrub), set()
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Add a reference to each of `blocks`, except the null block, which is not counted."""
        counts, cached = self._ref_counts, self._cached
        for block in blocks:
            if block == NULL_BLOCK:
                continue
            if counts[block] == 0:
                del cached[block]
            counts[block] += 1

    def release(self, block: int) -> None:
        """Drop a reference; an unreferenced block is cached if it has a hash, or free."""
        assert self._ref_counts[block] > 0, f"block {block} is released too often"
        self._ref_counts[block] -= 1
        if self._ref_counts[block] == 0:
            if block in self._hash_of:
                self._cached[block] = None
            else:
                self._free.append(block)

    def release_all(self, blocks: Iterable[int]) -> None:
        """Drop a reference to each of `blocks`, in this order, except the null block."""
        for block in blocks:
            if block != NULL_BLOCK:
                self.release(block)

    def release_unseen(self, table: list[int], num_unseen: int, *, doubtful: bool = False) -> None:
        """Replace the first `num_unseen` blocks of a table by the null block, and release them.

        If they are `doubtful`, `doubt` them.
        """
        first = num_unseen = min(num_unseen, len(table))
        while first and table[first - 1] != NULL_BLOCK:
            first -= 1
        if doubtful:
            self.doubt(table[first:num_unseen])
        self.release_all(table[first:num_unseen])
        table[first:num_unseen] = [NULL_BLOCK] * (num_unseen - first)

    # Contents, by hash.

    def find(self, hash_: bytes) -> int | None:
        """Return the block with the content of `hash_`, if there is one."""
        return self._block_of.get(hash_)

    def find_all(self, hashes: Iterable[bytes]) -> list[int | None]:
        """Return what `find` does for each of `hashes`, in a third of the time."""
        return list(map(self._block_of.get, hashes))

    def publish(self, block: int, hash_: bytes) -> None:
        """Add a full block to the prefix cache by its hash, unless the hash is already there."""
        assert self._ref_counts[block] > 0, f"block {block} is not in use"
        if hash_ not in self._block_of and block not in self._hash_of:
            self._block_of[hash_] = block
            self._hash_of[block] = hash_

    def withdraw(self, blocks: Iterable[int]) -> list[int]:
        """Remove the blocks of a table from the prefix cache: their content may be wrong.

        Return those with one reference, which can be overwritten.
        """
        exclusive = []
        for block in blocks:
            hash_ = self._hash_of.pop(block, None)
            if hash_ is not None:
                del self._block_of[hash_]
            if self._ref_counts[block] == 1:
                exclusive.append(block)
        return exclusive

    def published(self) -> list[tuple[int, bytes]]:
        """Return the blocks of the prefix cache with their hashes, in reverse order of eviction."""
        idle = [(block, self._hash_of[block]) for block in reversed(self._cached)]
        return [item for item in self._hash_of.items() if item[0] not in self._cached] + idle

    def forget_content(self) -> None:
        """Empty the prefix cache: the contents of all blocks may be wrong."""
        self._free.extend(self._cached)
        self._cached.clear()
        self._block_of.clear()
        self._hash_of.clear()
