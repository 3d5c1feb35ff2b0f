"""BlockManager: the block tables of sequences, their prefix cache, and recurrent snapshots.

The scheduler allocates blocks here, from a `BlockPool`. Neither knows the contents of blocks.

Equal hashes mean equal keys and values. A block's keys and values depend on its tokens, on every
token before them, and on the model, adapter and media. So hashes are chained: each covers its
parent's hash and the media in its block, and the first parent covers model and adapter. The hash
function is BLAKE2b with 128 bits. Clients cannot make it collide, so the manager compares hashes,
not tokens.

A recurrent layer cannot continue from keys and values alone, so sequences of such a model share a
prefix up to the last block that has a snapshot of the state. `BlockManager.snapshot_of` says where
snapshots are taken.
"""

from __future__ import annotations

import hashlib
import struct
import sys
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Tokens
from functools import lru_cache, partial
from itertools import islice
from typing import cast

from modelpack_engine.config import BLOCK_SIZE
from modelpack_engine.core.block_pool import NULL_BLOCK, BlockPool
from modelpack_engine.core.sequence import Restore, Sequence
from modelpack_engine.offload.tiers import PrefixOffload, group_key, state_key
from modelpack_engine.request import Media

HASH_SIZE = 16  # bytes

#: Blocks whose hashes are cached together, as prompts often begin alike.
_CACHED_TOGETHER = 16

_BLOCK = hashlib.blake2b(digest_size=HASH_SIZE, person=b"kv block")


def root_hash(*parts: bytes) -> bytes:
    """Return the parent hash of first blocks for one combination of `parts`: model and salt."""
    root = hashlib.blake2b(digest_size=HASH_SIZE, person=b"kv root")
    for part in parts:
        root.update(struct.pack("<Q", len(part)) + part)
    return root.digest()


def block_hashes(parent: bytes, token_ids: Tokens[int], block_size: int) -> list[bytes]:
    """Return the hashes of the full blocks of `token_ids` after `parent`; ids are below 2**32."""
    ids = array("I", token_ids)  # packs in 0.4 of the time of `struct`
    if sys.byteorder == "big":
        ids.byteswap()
    packed = ids.tobytes()
    size = struct.calcsize(f"<{block_size}I")
    hashes: list[bytes] = []
    for start in range(0, len(packed), _CACHED_TOGETHER * size):
        run = packed[start : start + _CACHED_TOGETHER * size]
        hashes += _hashes(hashes[-1] if hashes else parent, run, size)
    return hashes


@lru_cache(maxsize=4096)
def _hashes(parent: bytes, packed: bytes, size: int) -> tuple[bytes, ...]:
    """Return the hashes of the full blocks in `packed` tokens, `size` bytes for each block."""
    hashes = []
    for end in range(size, len(packed) + 1, size):
        block = _BLOCK.copy()  # twice as fast as a new object
        block.update(parent + packed[end - size : end])
        hashes.append(parent := block.digest())
    return tuple(hashes)


def cache_salt(adapter: str = "", *, owner: str | None = None) -> bytes:
    """Return the salt of a sequence: sequences share prefixes only if their salts are equal.

    It covers the adapter's name and the owner of the request: requests of other owners must not
    find its prompts in the cache. It is empty without both. Hashes of blocks cover media.
    """
    content = root_hash(adapter.encode()) if adapter else b""
    if owner is None:
        return content
    return b"owner" + root_hash(owner.encode(), content)


class PrefixSnapshots:
    """At most `limit` recurrent states, by the hash of the block that they come after (LRU).

    The runner makes and reads the states; the block manager only stores them. `evicted` is called
    with the hash and the state of each that is dropped for another. With `within_chunks`, the
    runner can keep a state from within a chunk; otherwise chunks end where a snapshot is taken.
    """

    def __init__(self, limit: int, *, within_chunks: bool = False) -> None:
        self.limit, self.within_chunks = limit, within_chunks
        self.evicted: Callable[[bytes, object], None] | None = None
        self._states: OrderedDict[bytes, object] = OrderedDict()
        self._unnamed: dict[int, tuple[int, object]] = {}  # by seq_id: index of a block, and state

    def __contains__(self, hash_: bytes) -> bool:
        return hash_ in self._states

    def __len__(self) -> int:
        return len(self._states)

    def put(self, hash_: bytes, state: object) -> None:
        """Keep a state; drop the least recently used one beyond the limit."""
        if not self.limit:
            return
        self._states[hash_] = state
        self._states.move_to_end(hash_)
        if len(self._states) > self.limit:
            self.evict_oldest()

    def put_unnamed(self, seq_id: int, index: int, state: object) -> None:
        """Keep the state after block `index` of a sequence until the block's hash is known."""
        self._unnamed[seq_id] = (index, state)

    def name(self, seq_id: int, index: int, hash_: bytes) -> None:
        """Keep the unnamed state after block `index` of a sequence, if there is one, by hash."""
        if seq_id in self._unnamed and self._unnamed[seq_id][0] == index:
            self.put(hash_, self._unnamed.pop(seq_id)[1])

    def drop_unnamed(self, seq_id: int) -> None:
        """Forget the unnamed state of a sequence."""
        self._unnamed.pop(seq_id, None)

    def get(self, hash_: bytes) -> object:
        """Return a state that is present, and mark it as used."""
        self._states.move_to_end(hash_)
        return self._states[hash_]

    def evict_oldest(self) -> None:
        """Drop the least recently used state, if there is one."""
        if self._states:
            self.evict(next(iter(self._states)))

    def evict(self, hash_: bytes) -> None:
        """Drop the state after a block, if there is one."""
        state = self._states.pop(hash_, None)
        if state is not None and self.evicted is not None:
            self.evicted(hash_, state)

    def items(self) -> list[tuple[bytes, object]]:
        """Return hashes and states, in reverse order of eviction."""
        return list(reversed(self._states.items()))

    def discard(self, hashes: Iterable[bytes]) -> None:
        """Drop states whose content is wrong."""
        for hash_ in hashes:
            self._states.pop(hash_, None)

    def clear(self) -> None:
        """Drop all states."""
        self._states.clear()
        self._unnamed.clear()


#: Blocks whose hashes are computed together, which is several times as fast as one by one.
HASHED_AT_ONCE = 64


def window_blocks(window: int, chunk: int, block_size: int) -> int:
    """Return the most blocks that hold `window` tokens and a chunk of `chunk` tokens after them."""
    return -(-(window + chunk + block_size - 1) // block_size)


class BlockManager:
    """Allocates `num_blocks` blocks of `block_size` tokens each; one of them is the null block.

    `model_id` names the weights: blocks of another model never match. Without prefix caching, no
    blocks are shared. With an `offload`, evicted blocks may be restored. With `snapshots`, prefixes
    are shared up to blocks that have a snapshot; one is taken every `snapshot_interval` tokens.

    If every layer has an attention window of at most `window` tokens, blocks before the window are
    released while their sequence runs, and its table has the null block in their place.

    Layers with a smaller window than the others may have blocks of their own: `window_pools` are
    pairs (window, number of blocks), and a sequence has one more table for each of them. Tables of
    a sequence have the same length, and pools the same hashes. All other counts are of the pool of
    the layers that see most: it limits the length of a sequence.

    A model may compute NaN for a prompt, which shows when its first token is sampled. With
    `doubts`, the blocks that a sequence releases before are scrubbed when allocated again.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int = BLOCK_SIZE,
        *,
        model_id: str = "",
        enable_prefix_caching: bool = True,
        snapshots: PrefixSnapshots | None = None,
        snapshot_interval: int = 0,
        window: int | None = None,
        window_pools: Iterable[tuple[int, int]] = (),
        doubts: bool = True,
    ) -> None:
        assert block_size > 0
        assert snapshot_interval % block_size == 0, "snapshots belong to whole blocks"
        self.window, self._doubts = window, doubts
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._model_id = model_id.encode()
        self.pool = BlockPool(num_blocks, window)
        self.window_pools = tuple(BlockPool(count, smaller) for smaller, count in window_pools)
        #: Whether sequences release blocks while they run.
        self.releases_blocks = window is not None or bool(self.window_pools)
        self._pools = (self.pool, *self.window_pools)
        self.pool.evicted = self._evicted
        self.offload: PrefixOffload | None = None
        self.snapshots = snapshots if enable_prefix_caching else None
        self.snapshot_interval = snapshot_interval if self.snapshots is not None else 0

    def set_offload(self, offload: PrefixOffload) -> None:
        """Keep evicted blocks and snapshots in `offload`, and restore them from there."""
        assert offload.num_groups == len(self._pools)
        self.offload = offload
        for group, pool in enumerate(self.window_pools, 1):
            pool.evicted = partial(offload.evict, group=group)
        if self.snapshots is not None:
            self.snapshots.evicted = offload.evict_state

    # Counts, in blocks.

    @property
    def num_total(self) -> int:
        """The blocks that can be allocated: all but the null block."""
        return self.pool.num_total

    @property
    def num_available(self) -> int:
        """The blocks that are free, or cached and can be evicted."""
        return self.pool.num_available

    @property
    def num_used(self) -> int:
        return self.pool.num_used

    @property
    def num_cached(self) -> int:
        """The blocks that no sequence uses, kept for the prefix cache."""
        return self.pool.num_cached

    def blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks `num_tokens` tokens need."""
        return -(-num_tokens // self.block_size)

    def can_allocate(self, num_blocks: int) -> bool:
        return num_blocks <= self.num_available

    # Contents.

    def _evicted(self, block: int, hash_: bytes) -> None:
        if self.offload is not None:
            self.offload.evict(block, hash_)
        if self.snapshots is not None:
            self.snapshots.evict(hash_)

    def withdraw(self, sequence: Sequence) -> list[list[int]]:
        """Remove the blocks of a sequence from the prefix cache: their content may be wrong.

        Return the blocks that no other sequence uses, which can be overwritten, for each pool.
        """
        if self.offload is not None:
            self.offload.discard(sequence.block_hashes)
        if self.snapshots is not None:
            self.snapshots.discard(sequence.block_hashes)
        return [pool.withdraw(table) for pool, table in self._tables(sequence)]

    def take_to_scrub(self) -> list[list[int]]:
        """Return the allocated blocks that may hold NaN, for each pool; each of them once."""
        return [pool.take_to_scrub() for pool in self._pools]

    def published(self, group: int = 0) -> list[tuple[int, bytes]]:
        """Return a group's blocks in the prefix cache with their hashes, the last evicted first.

        Group 0 is the pool of the layers that see most; the window pools are groups from 1.
        """
        return self._pools[group].published()

    def forget_content(self) -> None:
        """Empty the prefix cache: the contents of all blocks may be wrong."""
        for pool in self._pools:
            pool.forget_content()
        if self.snapshots is not None:
            self.snapshots.clear()

    # A sequence's tables.

    def _tables(self, sequence: Sequence) -> Iterator[tuple[BlockPool, list[int]]]:
        """Yield the pools with the tables of a sequence."""
        if len(sequence.window_tables) < len(self.window_pools):
            sequence.window_tables = [[] for _ in self.window_pools]
        yield self.pool, sequence.block_table
        yield from zip(self.window_pools, sequence.window_tables, strict=True)

    def most_held(self, chunk: int, pool: BlockPool | None = None) -> int | None:
        """Return the most blocks of a pool that a sequence of any length holds at once.

        It computes up to `chunk` tokens in a step. Return None if there is no such limit.
        """
        pool = pool or self.pool
        if pool.window is None:
            return None
        held = window_blocks(pool.window, chunk, self.block_size)
        return held if held <= pool.num_total else None

    def capacity(self, chunk: int, max_model_len: int) -> int:
        """Return the most tokens of a sequence that computes up to `chunk` tokens in a step."""
        limits = []
        for pool in self._pools:
            limit = pool.num_total * self.block_size
            unlimited = self.most_held(chunk, pool) is not None
            limits.append(max(limit, max_model_len) if unlimited else limit)
        return min(limits)

    def lacking_of_windows(self, sequences: Iterable[Sequence], chunk: int) -> list[int]:
        """Return how many blocks of each window pool prompts need, and one token after each.

        Blocks that they hold are not counted, but those that they may share are.
        """
        lacking = [0] * len(self.window_pools)
        for sequence in sequences if self.window_pools else ():
            needed = self.blocks_for(sequence.num_prefill_tokens + 1) - len(sequence.block_table)
            for index, (pool, table) in enumerate(islice(self._tables(sequence), 1, None)):
                held = len(table) - table.count(NULL_BLOCK)
                most = self.most_held(chunk, pool) or pool.num_total
                lacking[index] += max(0, min(needed, most - held))
        return lacking

    def can_allocate_windows(self, counts: Iterable[int]) -> bool:
        """Return whether each window pool has as many blocks as `counts` says."""
        pairs = zip(self.window_pools, counts, strict=True)
        return all(count <= pool.num_available for pool, count in pairs)

    def num_held(self, sequence: Sequence, matched: list[int] | None = None) -> int:
        """Return how many blocks a sequence holds, or would hold with the `matched` blocks."""
        shared = len(matched) - matched.count(NULL_BLOCK) if matched else 0
        return len(sequence.block_table) - sequence.num_unseen_blocks + shared

    def release_unseen(self, sequence: Sequence) -> None:
        """Release the blocks before the window; call it for sequences of submitted steps.

        One more token than the next one sees is kept: the newest may have to be computed again.
        """
        if not self.releases_blocks:
            return
        doubtful = self._doubts and sequence.is_doubtful
        for pool, table in self._tables(sequence):
            unseen = pool.num_unseen(sequence.num_computed_tokens, self.block_size)
            pool.release_unseen(table, unseen, doubtful=doubtful)
        unseen = self.pool.num_unseen(sequence.num_computed_tokens, self.block_size)
        sequence.num_unseen_blocks = max(sequence.num_unseen_blocks, unseen)

    def room_for(self, sequence: Sequence) -> int:
        """Return how many more tokens a sequence could compute with all available blocks."""
        available = min(pool.num_available for pool in self._pools)
        blocks = len(sequence.block_table) + available
        return blocks * self.block_size - sequence.num_computed_tokens

    def grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Extend a sequence's tables to hold `num_tokens`; return False if blocks are lacking."""
        missing = self.blocks_for(num_tokens) - len(sequence.block_table)
        if missing <= 0:
            return True
        if not self.can_allocate(missing):
            return False
        if not self.can_allocate_windows([missing] * len(self.window_pools)):
            return False
        for pool, table in self._tables(sequence):
            table.extend(pool.allocate() for _ in range(missing))
        return True

    def free(self, sequence: Sequence) -> None:
        """Release the whole tables, last block first, so that a prefix is evicted last."""
        if sequence.restore is not None:
            self._drop_restore(sequence, sequence.restore)
        for pool, table in self._tables(sequence):
            if self._doubts and sequence.is_doubtful:
                pool.doubt(table)
            pool.release_all(reversed(table))
            table.clear()
        sequence.num_published_blocks = 0
        sequence.snapshot = None
        if self.snapshots is not None:
            self.snapshots.drop_unnamed(sequence.seq_id)
        sequence.num_unseen_blocks = 0
        sequence.restore_from = 0
        if self.offload is not None:
            self.offload.drop(sequence.seq_id)

    # A sequence's prefix.

    def match_prefix(self, sequence: Sequence) -> list[int]:
        """Return the cached blocks of the tokens that the sequence would compute next.

        The block of the last token is never returned, since its logits are needed. Blocks before
        the window are returned as the null block.
        """
        return self._match(sequence)[0]

    def num_cached_tokens(self, sequence: Sequence) -> int:
        """Return how many tokens of a new sequence the prefix cache has.

        Most sequences have none. Without a window, the hash of the first block shows that.
        """
        size = self.block_size
        if sequence.media:
            return len(self.match_prefix(sequence)) * size
        if self.window is None and self._shareable(sequence) and self._may_share(sequence):
            root = root_hash(self._model_id, sequence.cache_salt)
            if self.pool.find(block_hashes(root, sequence.token_ids(0, size), size)[0]) is None:
                return 0
        return len(self.match_prefix(sequence)) * size

    def _match(self, sequence: Sequence) -> tuple[list[int], int]:
        """Return the cached blocks that a sequence can continue from, and how many are cached."""
        blocks: list[int] = []
        if not self._may_share(sequence):
            return blocks, 0
        if self.window is not None:
            return self._match_window(sequence, self.window)
        indices, first = self._shareable(sequence), len(sequence.block_table)
        hashes, pool = sequence.block_hashes, self.pool
        for start in range(indices.start, indices.stop, HASHED_AT_ONCE):
            stop = min(start + HASHED_AT_ONCE, indices.stop)
            if pool.find(self._hash(sequence, start)) is None:
                break
            self._hash(sequence, stop - 1)
            found = pool.find_all(hashes[start:stop])
            known = found.index(None) if None in found else len(found)
            blocks += cast("list[int]", found[:known])
            if known < len(found):
                break
        usable = reach = len(blocks)
        while usable:
            covered = self._covered(sequence, usable)
            if covered == usable and self._may_go_on(hashes[first + usable - 1]):
                break
            usable = min(covered, usable - 1)
        return blocks[:usable], reach

    def _covered(self, sequence: Sequence, count: int, offload: PrefixOffload | None = None) -> int:
        """Return `count` if all window pools have what follows, or the next count to try.

        That is the blocks of the next `count` that the token after them sees. Those that are only
        in an `offload` count too.
        """
        hashes, first = sequence.block_hashes, len(sequence.block_table)
        for group, pool in enumerate(self.window_pools, 1):
            for index in range(first + count - 1, self._first_seen(pool, first, count) - 1, -1):
                known = pool.find(hashes[index]) is not None
                if not known and not (offload and offload.has_block(hashes[index], group)):
                    return index - first
        return count

    def _first_seen(self, pool: BlockPool, first: int, count: int) -> int:
        """Return the first of `count` blocks from `first` that the token after them sees."""
        return max(first, pool.num_unseen((first + count) * self.block_size, self.block_size))

    def _match_window(self, sequence: Sequence, window: int) -> tuple[list[int], int]:
        """Return what `_match` returns, for a window: only the blocks within it must be cached."""
        indices = self._shareable(sequence)
        hashes = [self._hash(sequence, index) for index in indices]
        found = self.pool.find_all(hashes)
        best, first_seen, reach, run = 0, 0, 0, 0
        for count, block in enumerate(found, 1):
            run = 0 if block is None else run + 1
            tokens = (indices.start + count) * self.block_size
            unseen = max(0, tokens - window) // self.block_size
            seen = min(count, indices.start + count - unseen)
            if block is not None and run >= seen:
                reach = count
                if self._may_go_on(hashes[count - 1]) and self._covered(sequence, count) == count:
                    best, first_seen = count, count - seen
        seen_blocks = [block for block in found[first_seen:best] if block is not None]
        return [NULL_BLOCK] * first_seen + seen_blocks, reach

    def _may_go_on(self, hash_: bytes) -> bool:
        """Return whether a sequence may continue after a cached block: it may need a snapshot."""
        return self.snapshots is None or hash_ in self.snapshots

    def share_prefix(self, sequence: Sequence) -> int:
        """Append the cached blocks to a sequence; return how many tokens they hold.

        Offloaded blocks that have been fetched are restored into newly allocated blocks.
        """
        num_tokens = 0
        if sequence.restore is None:
            blocks, reach = self._match(sequence)
            if self.snapshots is not None and reach > len(blocks):
                sequence.branch = (len(sequence.block_table) + reach) * self.block_size
            self.pool.share(blocks)
            num_tokens = self._extend(sequence, [blocks, *self._shared(sequence, len(blocks))])
            if blocks and self.snapshots is not None:
                last = len(sequence.block_table) - 1
                sequence.snapshot = self.snapshots.get(self._hash(sequence, last))
        if self.offload is not None:
            num_tokens += self._restore(sequence, self.offload)
        return num_tokens

    def _shared(self, sequence: Sequence, count: int) -> Iterator[list[int]]:
        """Share the next `count` blocks of each window pool, which are cached, and yield them."""
        first = len(sequence.block_table)
        stop = first + count
        for pool in self.window_pools:
            seen_from = min(self._first_seen(pool, first, count), stop)
            found = pool.find_all(sequence.block_hashes[seen_from:stop])
            blocks = [block for block in found if block is not None]
            assert len(blocks) == stop - seen_from, "the match said that they are cached"
            pool.share(blocks)
            yield [NULL_BLOCK] * (seen_from - first) + blocks

    def _extend(self, sequence: Sequence, blocks: list[list[int]]) -> int:
        """Append computed blocks of all pools to a sequence; return how many tokens they hold."""
        count = len(blocks[0])
        if not count:
            return 0
        stop = (len(sequence.block_table) + count) * self.block_size
        for (pool, table), more in zip(self._tables(sequence), blocks, strict=True):
            pool.release_unseen(table, pool.num_unseen(stop, self.block_size))
            assert len(more) == count
            table.extend(more)
        sequence.num_published_blocks += count
        sequence.num_computed_tokens += count * self.block_size
        self.release_unseen(sequence)
        return count * self.block_size

    def _restore(self, sequence: Sequence, offload: PrefixOffload) -> int:
        """Append blocks that have been fetched from the offload; return how many tokens they hold.

        Blocks that a sequence cannot continue from yet, without a snapshot or with a gap in the
        window, are held in `sequence.restore`. They are released if something cannot be fetched, or
        if a pool has no block for it: the sequence holds its own window and a part of the later
        one, and no other sequence has to release a block. It then computes a token before it
        restores again, as two sequences could otherwise take turns and compute nothing.
        """
        if sequence.restore is None and sequence.num_computed_tokens >= sequence.restore_from:
            sequence.restore = self._restorable(sequence, offload)
        if (restore := sequence.restore) is None:
            offload.fetch(sequence.seq_id, [])
            if self._may_share(sequence) and self._shareable(sequence):
                offload.tiers.scan()
            return 0
        last = self._hash(sequence, restore.stop - 1)
        keys = list(self._missing(sequence, restore)) if offload.has_blocks else []
        if self.snapshots is not None and last not in self.snapshots:
            keys.append(state_key(last))
        contents = dict(zip(keys, offload.fetch(sequence.seq_id, keys), strict=False))
        num_usable = self._hold(sequence, restore, contents, offload)
        count = restore.stop - len(sequence.block_table)
        if all(len(blocks) == count for blocks in restore.blocks):
            if self.snapshots is None or last in self.snapshots:
                num_usable = count
            elif (content := contents.get(state_key(last))) is not None:
                num_usable = count
                self.snapshots.put(last, offload.make_state(content))
        usable = [blocks[:num_usable] for blocks in restore.blocks]
        restore.blocks = [blocks[num_usable:] for blocks in restore.blocks]
        num_tokens = self._extend(sequence, usable)
        if num_tokens and self.snapshots is not None:
            last = self._hash(sequence, len(sequence.block_table) - 1)
            if last in self.snapshots:
                sequence.snapshot = self.snapshots.get(last)
        if restore.lacks_blocks:
            offload.fetch(sequence.seq_id, [])
            sequence.restore_from = sequence.num_computed_tokens + 1
        if len(sequence.block_table) == restore.stop or not offload.awaits(sequence.seq_id):
            self._drop_restore(sequence, restore)
        return num_tokens

    def _drop_restore(self, sequence: Sequence, restore: Restore) -> None:
        """Release the blocks that a sequence holds and has not used."""
        for pool, blocks in zip(self._pools, restore.blocks, strict=True):
            pool.release_all(reversed(blocks))
        sequence.restore = None

    def _restorable(self, sequence: Sequence, offload: PrefixOffload) -> Restore | None:
        """Return the longest prefix that the device and the offload have, if there is one.

        Only the blocks within each window are needed, and a snapshot after the last block.
        """
        if not self._may_share(sequence):
            return None
        indices = self._shareable(sequence)
        first, run, counts = indices.start, 0, list[int]()
        for count, index in enumerate(indices, 1):
            hash_ = self._hash(sequence, index)
            if self.pool.find(hash_) is not None or offload.has_block(hash_):
                run += 1
                if run > index - self._first_seen(self.pool, first, count):
                    counts.append(count)
            elif self.window is None:
                break
            else:
                run = 0
        limit = len(indices)
        for count in reversed(counts):
            hash_ = sequence.block_hashes[first + count - 1]
            if count > limit or not (self._may_go_on(hash_) or offload.has_state(hash_)):
                continue
            limit = self._covered(sequence, count, offload)
            if limit == count:
                first_seen = [self._first_seen(pool, first, count) for pool in self._pools]
                return Restore(first + count, first_seen, [[] for _ in self._pools])
        return None

    def _missing(self, sequence: Sequence, restore: Restore) -> Iterator[bytes]:
        """Yield the keys of the blocks that are neither held nor on the device."""
        for group, pool in enumerate(self._pools):
            start = len(sequence.block_table) + len(restore.blocks[group])
            for index in range(max(start, restore.first_seen[group]), restore.stop):
                hash_ = self._hash(sequence, index)
                if pool.find(hash_) is None:
                    yield group_key(hash_, group)

    def _hold(
        self,
        sequence: Sequence,
        restore: Restore,
        contents: dict[bytes, bytes],
        offload: PrefixOffload,
    ) -> int:
        """Add blocks to `restore`, in each pool up to the first that was not found.

        Return how many of its blocks the sequence can continue from.
        """
        num_usable = 0
        for group, (pool, blocks) in enumerate(zip(self._pools, restore.blocks, strict=True)):
            start = len(sequence.block_table) + len(blocks)
            unseen = max(0, restore.first_seen[group] - start)
            blocks += [NULL_BLOCK] * unseen
            held = len(blocks)
            hashes = [self._hash(sequence, index) for index in range(start + unseen, restore.stop)]
            # All are held before one is allocated, which might evict one of them.
            found = pool.find_all(hashes)
            pool.share(block for block in found if block is not None)
            for place, hash_ in enumerate(hashes):
                block, key = found[place], group_key(hash_, group)
                if block is None:
                    if offload.has_blocks and key not in contents:
                        break
                    if not pool.num_available:
                        restore.lacks_blocks = True
                        break
                    found[place] = block = pool.allocate()
                    if offload.has_blocks:
                        offload.restore(block, contents[key], group)
                    pool.publish(block, hash_)
                blocks.append(block)
                if not self.releases_blocks and self._may_go_on(hash_):
                    num_usable = len(blocks)
            others = found[len(blocks) - held :]
            pool.release_all(block for block in reversed(others) if block is not None)
        return num_usable

    def awaits_blocks(self, sequence: Sequence) -> bool:
        """Return whether the next blocks of a sequence are being loaded from the offload."""
        return self.offload is not None and self.offload.awaits(sequence.seq_id)

    @property
    def is_awaited(self) -> bool:
        """Whether any sequence awaits blocks from the offload."""
        return self.offload is not None and self.offload.is_awaited

    def num_idle(self, blocks: list[int]) -> int:
        """Return how many of `blocks` no sequence uses: sharing them makes fewer available."""
        return self.pool.num_idle(blocks)

    def next_hash(self, sequence: Sequence) -> bytes | None:
        """Return the hash of the block that a sequence computes next, if it could be shared."""
        indices = self._shareable(sequence)
        if not indices or not self._may_share(sequence):
            return None
        return self._hash(sequence, indices[0])

    def most_until_snapshot(self, sequence: Sequence, length: int) -> int:
        """Return how many of a prompt's next `length` tokens a chunk may have.

        It takes one snapshot: at its end or, if that is possible, within it.
        """
        ends = self._snapshot_places(sequence, length)
        if self.snapshots is None or not ends:
            return length
        if self.snapshots.within_chunks and len(ends) == 1:
            return length
        return ends[0] - sequence.num_computed_tokens

    def snapshot_of(self, sequence: Sequence, length: int) -> tuple[int, bytes] | None:
        """Return after how many tokens the next chunk of a prompt takes a snapshot, and its hash.

        The hash is that of the block that ends there. None stands for no snapshot. A chunk of
        `length` tokens that completes a prompt, with a block, takes one there if it has no other.
        """
        if self.snapshots is None:
            return None
        start = sequence.num_computed_tokens
        places = self._snapshot_places(sequence, length)
        end = places[0] if places else start + length
        if not places and (end != sequence.num_prefill_tokens or end % self.block_size):
            return None
        return end - start, self._hash(sequence, end // self.block_size - 1)

    def _snapshot_places(self, sequence: Sequence, length: int) -> list[int]:
        """Return the first positions of snapshots in a prompt's next `length` tokens.

        They are at the end of the last full block before the last token, for requests that continue
        the prompt, where the prompt leaves a cached prefix that has no snapshot, for requests that
        share this prefix, and at multiples of `snapshot_interval`.
        """
        start, interval = sequence.num_computed_tokens, self.snapshot_interval
        ends = {sequence.branch, self._last_shareable(sequence)}
        if interval:
            ends |= {(start // interval + count) * interval for count in (1, 2)}
        return sorted(end for end in ends if start < end <= start + length)

    def _last_shareable(self, sequence: Sequence) -> int:
        """Return the end of a prompt's last block that can be shared."""
        return (sequence.num_prefill_tokens - 1) // self.block_size * self.block_size

    def hashes_between(self, sequence: Sequence, start: int, stop: int) -> list[bytes]:
        """Return the hashes of the blocks that the tokens from `start` to `stop` complete."""
        if not self.enable_prefix_caching:
            return []
        blocks = range(start // self.block_size, stop // self.block_size)
        return [self._hash(sequence, index) for index in blocks]

    def publish_prefix(self, sequence: Sequence) -> None:
        """Publish the full blocks of known tokens that submitted steps have computed."""
        first = sequence.num_published_blocks * self.block_size
        if not self.enable_prefix_caching or first + self.block_size > sequence.num_computed_tokens:
            return
        full = min(sequence.num_computed_tokens, sequence.num_known_tokens) // self.block_size
        for index in range(sequence.num_published_blocks, full):
            hash_ = self._hash(sequence, index)
            for pool, table in self._tables(sequence):
                pool.publish(table[index], hash_)
            sequence.num_published_blocks = index + 1
            if self.snapshots is not None:
                self.snapshots.name(sequence.seq_id, index, hash_)

    def _shareable(self, sequence: Sequence) -> range:
        # The block of the last token is left out: its logits are needed.
        last = (sequence.num_prefill_tokens - 1) // self.block_size
        return range(len(sequence.block_table), last)

    def _may_share(self, sequence: Sequence) -> bool:
        # Only whole blocks are shared, so the computed tokens must end with a block. Requests for
        # log-probabilities of the prompt need its logits.
        between = sequence.num_computed_tokens == len(sequence.block_table) * self.block_size
        return self.enable_prefix_caching and between and not sequence.wants_prompt_logprobs

    def _hash(self, sequence: Sequence, index: int) -> bytes:
        """Return the hash of a full block of known tokens."""
        hashes, size = sequence.block_hashes, self.block_size
        if index >= len(hashes):
            start, known = len(hashes) * size, sequence.num_known_tokens // size * size
            stop = max((index + 1) * size, min(start + HASHED_AT_ONCE * size, known))
            parent = hashes[-1] if hashes else root_hash(self._model_id, sequence.cache_salt)
            if not sequence.media or start >= sequence.media[-1].stop:
                hashes += block_hashes(parent, sequence.token_ids(start, stop), size)
                return hashes[index]
            # The parent's hash covers the digest in all later blocks of a picture.
            while start < stop:
                parent = _with_media(parent, sequence.media, start, start + size)
                later = (each.start for each in sequence.media if each.start >= start + size)
                end = min(stop, next(later, stop) // size * size)
                hashes += block_hashes(parent, sequence.token_ids(start, end), size)
                parent, start = hashes[-1], end
        return hashes[index]


def _with_media(parent: bytes, media: Tokens[Media], start: int, stop: int) -> bytes:
    """Return the parent hash of a block [start, stop), with the media that begin in it."""
    found = [each for each in media if start <= each.start < stop]
    if not found:
        return parent
    return root_hash(parent, *(b"%d %b" % (each.start, each.digest) for each in found))
