"""Offloaded KV blocks and recurrent states by hash, in bounded memory (LRU) and on disk.

The block manager calls `PrefixOffload`: it reports the blocks that it evicts, and requests those
that a prompt needs next. `OffloadTiers` keeps the contents, with a thread for the files. The block
mover copies the requested blocks after a step is scheduled, before that step writes to any block.

Group 0 of a model's layers has its blocks under their hashes. Layers with blocks of their own, in
window pools, have them under `group_key`. The snapshot of the recurrent state after a block is a
content of its own, under `state_key`.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import takewhile

from modelpack_engine.offload.directory import BlockDirectory


def state_key(hash_: bytes) -> bytes:
    """Return the key of the recurrent state after the block with this hash."""
    return hashlib.blake2b(hash_, digest_size=len(hash_), person=b"kv state").digest()


def group_key(hash_: bytes, group: int) -> bytes:
    """Return the key of a block with this hash; window pools are groups from 1."""
    if not group:
        return hash_
    person = b"kv group %d" % group
    return hashlib.blake2b(hash_, digest_size=len(hash_), person=person).digest()


class BlockMemory:
    """The contents of blocks by hash, at most `limit` bytes. Not thread-safe."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.num_bytes = 0
        self._blocks: OrderedDict[bytes, bytes] = OrderedDict()

    def __contains__(self, hash_: bytes) -> bool:
        return hash_ in self._blocks

    def __len__(self) -> int:
        return len(self._blocks)

    def put(self, hash_: bytes, content: bytes) -> None:
        """Keep a block if the limit allows, and evict the least recently used blocks."""
        self.discard(hash_)
        if len(content) > self.limit:
            return
        while self.num_bytes + len(content) > self.limit:
            _, dropped = self._blocks.popitem(last=False)
            self.num_bytes -= len(dropped)
        self._blocks[hash_] = content
        self.num_bytes += len(content)

    def get(self, hash_: bytes) -> bytes | None:
        """Return a block and mark it as used; None if it is not present."""
        content = self._blocks.get(hash_)
        if content is not None:
            self._blocks.move_to_end(hash_)
        return content

    def discard(self, hash_: bytes) -> None:
        """Drop a block, if it is present."""
        content = self._blocks.pop(hash_, None)
        if content is not None:
            self.num_bytes -= len(content)


#: The most bytes of blocks that wait to be written.
_LONGEST_QUEUE = 256 * 1024**2
#: The most bytes of blocks that were read and not used yet; no more are read beyond that.
_MOST_STAGED = 256 * 1024**2
#: Seconds between two scans for the files of other servers, and the least ratio of this interval
#: to the duration of a scan.
_SCAN_EVERY = 2.0
_SCAN_FACTOR = 20


@dataclass(slots=True, eq=False)
class Load:
    """A request for the blocks `hashes`; `contents` has those that were found once it is `done`."""

    hashes: list[bytes]
    contents: dict[bytes, bytes] = field(default_factory=dict)
    done: bool = False
    staged: int = 0  # bytes that were read
    num_read: int = 0
    given_up: bool = False


class OffloadTiers:
    """The contents of blocks and states by hash.

    Call it from one thread; it accesses files in a thread of its own. `close` writes the blocks
    that are still waiting.
    """

    def __init__(self, memory: BlockMemory, directory: BlockDirectory | None) -> None:
        self.memory = memory
        self.directory = directory
        self._state = threading.Condition()
        self._loads: deque[Load] = deque()
        self._writes: OrderedDict[bytes, bytes] = OrderedDict()
        self._queued = 0  # bytes in `_writes`
        self._removals: deque[bytes] = deque()
        self._staged = 0
        self._closing = False
        self._deadline = float("inf")
        self._next_scan = time.monotonic() + _SCAN_EVERY
        self._scan = False
        self._thread: threading.Thread | None = None
        if directory is not None:
            self._thread = threading.Thread(
                target=self._run, args=(directory,), name="modelpack-offload", daemon=True
            )
            self._thread.start()

    def __contains__(self, hash_: bytes) -> bool:
        on_disk = self.directory is not None and hash_ in self.directory
        return on_disk or hash_ in self.memory or hash_ in self._writes

    def save(self, hash_: bytes, content: bytes) -> None:
        """Keep a block in memory, and queue it for the directory."""
        self.memory.put(hash_, content)
        if self.directory is None:
            return
        with self._state:
            if self._queued < _LONGEST_QUEUE and hash_ not in self._writes:
                self._writes[hash_] = content
                self._queued += len(content)
                self._state.notify_all()

    def load(self, hashes: list[bytes]) -> Load:
        """Start loading blocks; the load is done at once if memory has all of them."""
        load = Load(hashes)
        for hash_ in hashes:
            if (content := self.memory.get(hash_) or self._writes.get(hash_)) is not None:
                load.contents[hash_] = content
        load.done = len(load.contents) == len(hashes) or self._thread is None
        if not load.done:
            with self._state:
                self._loads.append(load)
                self._state.notify_all()
        return load

    def finish(self, load: Load) -> None:
        """End a load: its contents were used, or are not needed any more."""
        with self._state:
            load.given_up = True
            self._staged -= load.staged
            load.staged = 0
            self._state.notify_all()

    def wait(self, load: Load, timeout: float) -> None:
        """Wait until a load is done, for at most `timeout` seconds."""
        with self._state:
            self._state.wait_for(lambda: load.done, timeout)

    def scan(self) -> None:
        """Let the thread scan for files of other servers, if the last scan was long enough ago."""
        if self._thread is not None and time.monotonic() >= self._next_scan and not self._scan:
            with self._state:
                self._scan = True
                self._state.notify_all()

    def discard(self, hashes: Iterable[bytes]) -> None:
        """Drop blocks whose content is wrong."""
        with self._state:
            for hash_ in hashes:
                self.memory.discard(hash_)
                self._unqueue(hash_)
                if self.directory is not None:
                    self.directory.forget(hash_)
                    self._removals.append(hash_)
            self._state.notify_all()

    def flush(self, timeout: float) -> bool:
        """Wait until all blocks are written; return False after `timeout` seconds."""
        with self._state:
            return self._state.wait_for(lambda: not self._writes, timeout)

    def close(self, timeout: float) -> None:
        """Write the waiting blocks for at most `timeout` seconds, and end the thread."""
        with self._state:
            self._closing = True
            self._deadline = time.monotonic() + timeout
            self._state.notify_all()
        if self._thread is not None:
            self._thread.join(timeout + 1)

    # The thread

    def _run(self, directory: BlockDirectory) -> None:
        while True:
            with self._state:
                self._state.wait_for(self._has_work)
                if self._closing and (not self._writes or time.monotonic() > self._deadline):
                    for unread in self._loads:
                        unread.done = True
                    self._state.notify_all()
                    return
                load = self._next_load()
                removals, self._removals = self._removals, deque()
                scan, self._scan = self._scan, False
                write = None if load or not self._writes else next(iter(self._writes.items()))
            for hash_ in removals:
                directory.discard(hash_)
            if load is not None:
                self._read(directory, load)
            elif write is not None:
                directory.write(*write)
            if scan:
                begin = time.monotonic()
                directory.refresh()
                took = time.monotonic() - begin
                self._next_scan = begin + max(_SCAN_EVERY, _SCAN_FACTOR * took)
            if write is not None:
                with self._state:
                    self._unqueue(write[0])
                    self._state.notify_all()

    def _unqueue(self, hash_: bytes) -> None:
        content = self._writes.pop(hash_, None)
        if content is not None:
            self._queued -= len(content)

    def _has_work(self) -> bool:
        can_load = bool(self._loads) and self._staged < _MOST_STAGED
        return can_load or bool(self._writes or self._removals or self._scan or self._closing)

    def _next_load(self) -> Load | None:
        while self._loads and self._staged < _MOST_STAGED:
            load = self._loads.popleft()
            if not load.given_up:
                return load
        return None

    def _read(self, directory: BlockDirectory, load: Load) -> None:
        """Read the blocks that memory did not have, up to the first one that is not found."""
        read: dict[bytes, bytes] = {}
        for hash_ in load.hashes:
            if load.given_up:
                break
            if hash_ in load.contents:
                continue
            content = directory.read(hash_)
            if content is None:
                break
            read[hash_] = content
        with self._state:
            if not load.given_up:
                load.contents |= read
                load.num_read = len(read)
                load.staged = sum(map(len, read.values()))
                self._staged += load.staged
            load.done = True
            self._state.notify_all()


#: A group of layers, a block of it, and its key or content.
Evicted = tuple[int, int, bytes]
Restored = tuple[int, int, bytes]


class PrefixOffload:
    """The blocks and states to move between the device and `tiers`.

    At most `per_step` blocks are loaded at a time, and restored in one step. `make_state` returns
    the snapshot with a content. `num_groups` groups of layers have blocks of their own. Without
    `has_blocks`, the model keeps nothing in its blocks.
    """

    def __init__(
        self,
        tiers: OffloadTiers,
        *,
        per_step: int,
        make_state: Callable[[bytes], object] | None = None,
        num_groups: int = 1,
        has_blocks: bool = True,
    ) -> None:
        assert per_step > 0
        self.tiers = tiers
        self.per_step = per_step
        self.num_groups = num_groups
        self.has_blocks = has_blocks
        self.num_restored = self.num_from_disk = self.num_restores = 0
        self.num_restored_states = self.restored_bytes = 0
        #: Restored blocks of the layers that see most; the others have blocks of the same tokens.
        self.num_restored_blocks = 0
        self._make_state = make_state
        self._evicted: list[Evicted] = []
        self._evicted_states: list[tuple[bytes, object]] = []
        self._restored: dict[tuple[int, int], bytes] = {}  # by group and block
        self._left = per_step
        self._loads: dict[int, Load] = {}  # by seq_id
        self._waiting: set[int] = set()
        self._restoring: set[int] = set()

    # Calls of the block manager

    def evict(self, block: int, hash_: bytes, group: int = 0) -> None:
        """Save a block of a group of layers that is about to be overwritten."""
        restored = self._restored.pop((group, block), None)
        key = group_key(hash_, group)
        if key in self.tiers:
            self.tiers.memory.get(key)  # marks it as used
        elif restored is not None:  # it is not on the device yet
            self.tiers.save(key, restored)
        elif self.has_blocks:
            self._evicted.append((group, block, key))

    def evict_state(self, hash_: bytes, state: object) -> None:
        """Save the state after a block before it is dropped."""
        key = state_key(hash_)
        if key in self.tiers:
            self.tiers.memory.get(key)
        else:
            self._evicted_states.append((key, state))

    def has_block(self, hash_: bytes, group: int = 0) -> bool:
        """Return whether a block of a group can be fetched, or needs no content."""
        return not self.has_blocks or group_key(hash_, group) in self.tiers

    def has_state(self, hash_: bytes) -> bool:
        """Return whether the state after a block can be fetched."""
        return state_key(hash_) in self.tiers

    def make_state(self, content: bytes) -> object:
        """Return the snapshot of a fetched state."""
        assert self._make_state is not None, "the model has recurrent state"
        self.num_restored_states += 1
        return self._make_state(content)

    def discard(self, hashes: Iterable[bytes]) -> None:
        """Drop blocks whose content is wrong, of all groups, and the states after them."""
        hashes = list(hashes)
        keys = [group_key(hash_, group) for group in range(self.num_groups) for hash_ in hashes]
        states = map(state_key, hashes) if self._make_state is not None else ()
        self.tiers.discard([*keys, *states])

    def fetch(self, seq_id: int, hashes: list[bytes]) -> list[bytes]:
        """Return the contents of the first blocks of `hashes` that are loaded.

        `hashes` are the keys of what a sequence needs next. While they are being loaded, the result
        is empty and the sequence `awaits` them: call this again in the next step.
        """
        self._waiting.discard(seq_id)
        load = self._loads.get(seq_id)
        if load is not None and not (hashes and hashes[0] in load.hashes):
            self._finish(seq_id)
            load = None
        if load is None:
            load = self._begin(seq_id, hashes)
        if load is None:
            return []
        self._waiting.add(seq_id)
        if not load.done or self._left <= 0:
            return []
        contents: list[bytes] = []
        for hash_ in hashes:
            if hash_ not in load.contents:
                break
            contents.append(load.contents[hash_])
        self._count(seq_id, load, contents)
        self._finish(seq_id)
        self._waiting.discard(seq_id)
        if contents and self._begin(seq_id, hashes[len(contents) :]) is not None:
            self._waiting.add(seq_id)
        return contents

    def awaits(self, seq_id: int) -> bool:
        """Return whether the next blocks of a sequence were being loaded at its last `fetch`."""
        return seq_id in self._waiting

    @property
    def is_awaited(self) -> bool:
        """Whether any sequence awaits blocks."""
        return bool(self._waiting)

    def restore(self, block: int, content: bytes, group: int = 0) -> None:
        """Write fetched content to a block of a group of layers before the next step."""
        self._restored[group, block] = content
        self.num_restored_blocks += not group

    def drop(self, seq_id: int) -> None:
        """Forget a sequence that ended or was preempted."""
        self._finish(seq_id)
        self._waiting.discard(seq_id)
        self._restoring.discard(seq_id)

    # Calls of the block mover

    def take(self) -> tuple[list[Evicted], list[Restored]]:
        """Return and clear the blocks to save, with their keys, and to restore, with contents."""
        restored = [(*place, content) for place, content in self._restored.items()]
        taken = self._evicted, restored
        self._evicted, self._restored = [], {}
        self._left = self.per_step
        return taken

    def take_states(self) -> list[tuple[bytes, object]]:
        """Return and clear (key, snapshot) pairs to save."""
        taken, self._evicted_states = self._evicted_states, []
        return taken

    def wait(self, timeout: float) -> None:
        """Wait until the oldest load is done, for at most `timeout` seconds."""
        if self._loads:
            self.tiers.wait(next(iter(self._loads.values())), timeout)

    # Details

    def _begin(self, seq_id: int, hashes: list[bytes]) -> Load | None:
        """Start loading the first `per_step` blocks; return None if the first is not available."""
        if not hashes:
            return None
        if hashes[0] not in self.tiers:
            self.tiers.scan()
            return None
        if any(hashes[0] in load.hashes for load in self._loads.values()):
            self._waiting.add(seq_id)  # it then finds the blocks in the prefix cache
            return None
        run = list(takewhile(self.tiers.__contains__, hashes[: self.per_step]))
        self._loads[seq_id] = load = self.tiers.load(run)
        return load

    def _finish(self, seq_id: int) -> None:
        load = self._loads.pop(seq_id, None)
        if load is not None:
            self.tiers.finish(load)

    def _count(self, seq_id: int, load: Load, contents: list[bytes]) -> None:
        num_blocks = len(contents)
        self._left -= num_blocks
        self.num_restored += num_blocks
        self.restored_bytes += sum(map(len, contents))
        self.num_from_disk += min(load.num_read, num_blocks)
        if num_blocks and seq_id not in self._restoring:
            self._restoring.add(seq_id)
            self.num_restores += 1
