"""PrefixOffload: which blocks leave the device and which come back, as the scheduler sees it.

The block manager tells what it evicts, and asks for what a prompt needs next. What is said here is
done by the mover right after a step has been scheduled, before that step writes to any block.
"""

from __future__ import annotations

from collections.abc import Iterable

from modelpack_engine.offload.tiers import Load, OffloadTiers


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
