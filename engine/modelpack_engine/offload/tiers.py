"""OffloadTiers: offloaded KV blocks by hash, in bounded memory (LRU) and then on disk."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from modelpack_engine.offload.directory import BlockDirectory


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


#: Bytes of blocks that wait to be written, at most.
_LONGEST_QUEUE = 256 * 1024**2
#: Bytes of blocks that have been read and not been taken, beyond which nothing more is read.
_MOST_STAGED = 256 * 1024**2
#: Seconds between two looks at what other servers have written, and how many times longer it is
#: at least than a look takes.
_LOOK_EVERY = 2.0
_LOOK_FACTOR = 20


@dataclass(slots=True, eq=False)
class Load:
    """Blocks on their way from memory or disk: of `hashes`, those in `contents` once `done`."""

    hashes: list[bytes]
    contents: dict[bytes, bytes] = field(default_factory=dict)
    done: bool = False
    staged: int = 0  # bytes that were read for it
    num_read: int = 0
    given_up: bool = False


class OffloadTiers:
    """Contents of blocks by hash. One thread calls it; its own does what touches files.

    `length` is the bytes of every block. Close it to have written what waits to be.
    """

    def __init__(
        self, memory: BlockMemory, directory: BlockDirectory | None, *, length: int
    ) -> None:
        self.memory = memory
        self.directory = directory
        self.length = length
        self._state = threading.Condition()
        self._loads: deque[Load] = deque()
        self._writes: OrderedDict[bytes, bytes] = OrderedDict()
        self._removals: deque[bytes] = deque()
        self._staged = 0
        self._closing = False
        self._deadline = float("inf")
        self._next_look = time.monotonic() + _LOOK_EVERY
        self._look = False
        self._thread: threading.Thread | None = None
        if directory is not None:
            self._thread = threading.Thread(
                target=self._run, args=(directory,), name="modelpack-offload", daemon=True
            )
            self._thread.start()

    def __contains__(self, hash_: bytes) -> bool:
        on_disk = self.directory is not None and hash_ in self.directory
        return on_disk or hash_ in self.memory or hash_ in self._writes

    @property
    def num_disk_bytes(self) -> int:
        """Bytes of the directory's files, all models together."""
        return 0 if self.directory is None else self.directory.num_bytes

    @property
    def num_dropped(self) -> int:
        """Files that were not what they should be."""
        return 0 if self.directory is None else self.directory.num_dropped

    def save(self, hash_: bytes, content: bytes) -> None:
        """Keep a block in memory, and have it written."""
        assert len(content) == self.length
        self.memory.put(hash_, content)
        if self.directory is None:
            return
        with self._state:
            if len(self._writes) * self.length < _LONGEST_QUEUE:
                self._writes[hash_] = content
                self._state.notify_all()

    def use(self, hash_: bytes) -> None:
        """Note that a block is wanted still."""
        self.memory.get(hash_)

    def load(self, hashes: list[bytes]) -> Load:
        """Begin to load blocks; it is done at once if memory has them all."""
        load = Load(hashes)
        for hash_ in hashes:
            content = self.memory.get(hash_) or self._writes.get(hash_)
            if content is not None:
                load.contents[hash_] = content
        load.done = len(load.contents) == len(hashes) or self._thread is None
        if not load.done:
            with self._state:
                self._loads.append(load)
                self._state.notify_all()
        return load

    def finish(self, load: Load) -> None:
        """Take note that a load was taken, or that nobody wants it."""
        with self._state:
            load.given_up = True
            self._staged -= load.staged
            load.staged = 0
            self._state.notify_all()

    def wait(self, load: Load, timeout: float) -> None:
        """Return when a load is done, or after `timeout` seconds."""
        with self._state:
            self._state.wait_for(lambda: load.done, timeout)

    def look(self) -> None:
        """Have the thread look for what other servers have written, if it is time to."""
        if self._thread is not None and time.monotonic() >= self._next_look and not self._look:
            with self._state:
                self._look = True
                self._state.notify_all()

    def discard(self, hashes: Iterable[bytes]) -> None:
        """Drop blocks that hold what they should not."""
        with self._state:
            for hash_ in hashes:
                self.memory.discard(hash_)
                self._writes.pop(hash_, None)
                if self.directory is not None:
                    self.directory.forget(hash_)
                    self._removals.append(hash_)
            self._state.notify_all()

    def flush(self, timeout: float) -> bool:
        """Return True when nothing waits to be written any more, False after `timeout` seconds."""
        with self._state:
            return self._state.wait_for(lambda: not self._writes, timeout)

    def close(self, timeout: float) -> None:
        """Write what waits to be, for `timeout` seconds at most, and end the thread."""
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
                look, self._look = self._look, False
                write = None if load or not self._writes else next(iter(self._writes.items()))
            for hash_ in removals:
                directory.discard(hash_)
            if load is not None:
                self._read(directory, load)
            elif write is not None:
                directory.write(*write)
            if look:
                begin = time.monotonic()
                directory.refresh()
                took = time.monotonic() - begin
                self._next_look = begin + max(_LOOK_EVERY, _LOOK_FACTOR * took)
            if write is not None:
                with self._state:
                    self._writes.pop(write[0], None)
                    self._state.notify_all()

    def _has_work(self) -> bool:
        can_load = bool(self._loads) and self._staged < _MOST_STAGED
        return can_load or bool(self._writes or self._removals or self._look or self._closing)

    def _next_load(self) -> Load | None:
        while self._loads and self._staged < _MOST_STAGED:
            load = self._loads.popleft()
            if not load.given_up:
                return load
        return None

    def _read(self, directory: BlockDirectory, load: Load) -> None:
        """Read what memory did not have, up to the first block that is not to be had."""
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


class PrefixOffload:
    """What moves between blocks on the device and `tiers`.

    `per_step` blocks are loaded at a time; when a step restores that many, the rest waits.
    """

    def __init__(self, tiers: OffloadTiers, *, per_step: int) -> None:
        assert per_step > 0
        self.tiers = tiers
        self.per_step = per_step
        self.num_restored = 0
        self.num_from_disk = 0
        self.num_restores = 0
        self._evicted: list[tuple[int, bytes]] = []
        self._restored: list[tuple[int, bytes]] = []
        self._left = per_step
        self._loads: dict[int, Load] = {}  # by the sequence that it is for
        self._waiting: set[int] = set()
        self._restoring: set[int] = set()

    # What the block manager says.

    def evict(self, block: int, hash_: bytes) -> None:
        """Take note that a block is about to be overwritten."""
        if hash_ in self.tiers:
            self.tiers.use(hash_)
        else:
            self._evicted.append((block, hash_))

    def fetch(self, seq_id: int, hashes: list[bytes]) -> list[bytes]:
        """Return the contents of the first of `hashes`, as far as they are here.

        `hashes` are what a sequence needs next. Those that are on their way are none of them: the
        sequence `awaits` them, and they are asked for again in the next step.
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
        self._count(seq_id, load, len(contents))
        self._finish(seq_id)
        self._waiting.discard(seq_id)
        if contents and self._begin(seq_id, hashes[len(contents) :]) is not None:
            self._waiting.add(seq_id)
        return contents

    def awaits(self, seq_id: int) -> bool:
        """Whether what a sequence needs next is on its way, as of the last `fetch`."""
        return seq_id in self._waiting

    @property
    def is_awaited(self) -> bool:
        """Whether any sequence waits."""
        return bool(self._waiting)

    def restore(self, block: int, content: bytes) -> None:
        """Have a block hold what was fetched."""
        self._restored.append((block, content))

    def drop(self, seq_id: int) -> None:
        """Forget a sequence that has ended, or starts again."""
        self._finish(seq_id)
        self._waiting.discard(seq_id)
        self._restoring.discard(seq_id)

    def distrust(self, hashes: Iterable[bytes]) -> None:
        """Drop blocks whose content turned out to be wrong."""
        self.tiers.discard(hashes)

    # What the mover does about it.

    def take(self) -> tuple[list[tuple[int, bytes]], list[tuple[int, bytes]]]:
        """Return (block, hash) to save and then (block, content) to restore, once."""
        taken = self._evicted, self._restored
        self._evicted, self._restored = [], []
        self._left = self.per_step
        return taken

    def wait(self, timeout: float) -> None:
        """Wait until one of the loads is done."""
        for load in self._loads.values():
            if not load.done:
                self.tiers.wait(load, timeout)
            return

    # Details

    def _begin(self, seq_id: int, hashes: list[bytes]) -> Load | None:
        """Load the first of `hashes`, up to a step's worth; None if the first is not to be had."""
        if not hashes:
            return None
        if hashes[0] not in self.tiers:
            self.tiers.look()
            return None
        if any(hashes[0] in load.hashes for load in self._loads.values()):
            self._waiting.add(seq_id)  # and finds them in the cache then
            return None
        run = []
        for hash_ in hashes[: self.per_step]:
            if hash_ not in self.tiers:
                break
            run.append(hash_)
        self._loads[seq_id] = load = self.tiers.load(run)
        return load

    def _finish(self, seq_id: int) -> None:
        load = self._loads.pop(seq_id, None)
        if load is not None:
            self.tiers.finish(load)

    def _count(self, seq_id: int, load: Load, num_blocks: int) -> None:
        self._left -= num_blocks
        self.num_restored += num_blocks
        self.num_from_disk += min(load.num_read, num_blocks)
        if num_blocks and seq_id not in self._restoring:
            self._restoring.add(seq_id)
            self.num_restores += 1
