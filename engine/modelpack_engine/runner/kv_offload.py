"""BlockMover: copy KV blocks and recurrent states to and from the offload, between two steps."""

from __future__ import annotations

import hashlib
import logging
import time
import weakref
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx

from modelpack import __version__
from modelpack_engine.config import EngineConfig
from modelpack_engine.core.block_manager import BlockManager
from modelpack_engine.errors import EngineError
from modelpack_engine.offload.directory import BlockDirectory
from modelpack_engine.offload.tiers import (
    BlockMemory,
    OffloadTiers,
    PrefixOffload,
    group_key,
    state_key,
)
from modelpack_engine.outputs import OffloadStats
from modelpack_engine.runner.model_runner import ModelRunner
from modelpack_engine.runner.recurrent import SlotSnapshot, Snapshot

_log = logging.getLogger(__name__)

IDENTITY_SIZE = 16  # bytes

#: Increased whenever the format of a block's bytes changes.
VERSION = 2

#: Seconds that the engine waits for a file when it has nothing else to do.
_WAIT = 0.05

#: Bytes of one batch, and seconds for all batches, when blocks are saved at shutdown.
_LAST_BATCH = 64 * 1024**2
_LAST_SECONDS = 20.0

#: Default bytes in memory and on disk if only a directory is configured.
_MEMORY = 1024**3
_DISK = 16 * 1024**3

#: Bytes that a step restores: a few milliseconds of copying.
_PER_STEP = 16 * 1024**2


def cache_identity(model_id: str, block_size: int, parts: Iterable[str]) -> bytes:
    """Return a digest that is equal for engines which can use each other's blocks.

    `model_id` names the weights. `parts` describe what else the bytes depend on: the types and
    shapes of each layer's cache in order, the device, and the versions of the libraries.
    """
    text = "\0".join([f"kv {VERSION}", model_id, str(block_size), *parts])
    return hashlib.blake2b(text.encode(), digest_size=IDENTITY_SIZE, person=b"kv offload").digest()


class BlockMover:
    """Copies and overwrites blocks of a runner's pools; without an `offload`, copies none."""

    def __init__(
        self, runner: ModelRunner, blocks: BlockManager, offload: PrefixOffload | None
    ) -> None:
        self._runner, self._blocks, self._offload = runner, blocks, offload
        self._contents = runner.block_contents()
        self._states = runner.state_contents()
        self._saving: list[tuple[list[bytes], mx.array]] = []
        self._saved_bytes = 0

    @property
    def has_offload(self) -> bool:
        """Whether blocks are copied to an offload, and from it."""
        return self._offload is not None

    def move(self, scrub: Sequence[Sequence[int]] = (), *, has_step: bool, in_flight: bool) -> None:
        """Save and restore the blocks that scheduling requested; call it before building the step.

        In between, overwrite the blocks `scrub` of each group: their content is wanted no more.
        If there is no step to build and none in flight, wait for blocks that are being loaded.
        """
        offload = self._offload
        if offload is None:
            self._scrub(scrub)
            return
        evicted, restored = offload.take()
        try:
            for group in range(len(self._contents)):
                self._save(group, [(block, key) for of, block, key in evicted if of == group])
            self._scrub(scrub)
            for group, contents in enumerate(self._contents):
                pairs = [(block, content) for of, block, content in restored if of == group]
                if pairs:
                    contents.write(*zip(*pairs, strict=True))
            for key, state in offload.take_states():
                self._save_state(key, state)
        except BaseException:
            self._blocks.forget_content()
            raise
        if has_step or in_flight:
            return
        if restored:
            mx.async_eval(self._runner.pools())
        elif offload.is_awaited:
            offload.wait(_WAIT)

    def _scrub(self, scrub: Sequence[Sequence[int]]) -> None:
        for group, blocks in enumerate(scrub):
            if blocks:
                self._runner.scrub(blocks, group)

    def collect(self) -> None:
        """Copy the gathered blocks to the host; call it after reading the previous step."""
        if self._offload is None:
            return
        saving, self._saving = self._saving, []
        for hashes, rows in saving:
            view = memoryview(rows).cast("B")  # type: ignore[arg-type]
            for row, hash_ in enumerate(hashes):
                content = view[row * rows.shape[1] : (row + 1) * rows.shape[1]]
                self._offload.tiers.save(hash_, bytes(content))
            self._saved_bytes += view.nbytes

    def forget(self) -> None:
        """Drop the gathered blocks, after a step that failed."""
        self._saving.clear()
        if self._offload is not None:
            self._offload.take()
            self._offload.take_states()

    def stats(self) -> OffloadStats:
        """Return counters since the start, and current gauges."""
        if self._offload is None:
            return OffloadStats()
        offload = self._offload
        directory = offload.tiers.directory
        return OffloadStats(
            restores=offload.num_restores,
            restored_tokens=offload.num_restored_blocks * self._blocks.block_size,
            memory_hits=offload.num_restored - offload.num_from_disk,
            disk_hits=offload.num_from_disk,
            saved_bytes=self._saved_bytes,
            restored_bytes=offload.restored_bytes,
            dropped_files=directory.num_dropped if directory else 0,
            memory_bytes=offload.tiers.memory.num_bytes,
            disk_bytes=directory.num_bytes if directory else 0,
        )

    def close(self) -> None:
        """Write the whole prefix cache to disk for the next start, the newest blocks first."""
        if self._offload is None:
            return
        tiers = self._offload.tiers
        self.collect()
        if tiers.directory is not None:
            self._write_all(tiers, tiers.directory.limit)
        tiers.close(_LAST_SECONDS)
        self._offload = None

    def _write_all(self, tiers: OffloadTiers, limit: int) -> None:
        """Write the newest snapshots and blocks, up to the limit, while there is time.

        Snapshots, and layers with blocks of their own, take up to half of what is left: without
        them, the blocks of the other layers are of no use.
        """
        deadline = time.monotonic() + _LAST_SECONDS
        written = self._write_states(tiers, limit // 2, deadline)
        for group in reversed(range(len(self._contents))):
            if written is None:
                return
            limit -= written
            part = limit // 2 if group else limit
            written = self._write_blocks(group, tiers, part, deadline)

    def _write_states(self, tiers: OffloadTiers, limit: int, deadline: float) -> int | None:
        """Write the newest snapshots, up to the limit; return their bytes, or None if late."""
        snapshots, states = self._blocks.snapshots, self._states
        if snapshots is None or states is None:
            return 0
        pairs = [(state_key(hash_), state) for hash_, state in snapshots.items()]
        found = [pair for pair in pairs if pair[0] not in tiers][: limit // max(states.length, 1)]
        for key, state in found:
            self._save_state(key, state)
            if not self._flush(tiers, deadline):
                return None
        return len(found) * states.length

    def _write_blocks(
        self, group: int, tiers: OffloadTiers, limit: int, deadline: float
    ) -> int | None:
        """Write a group's newest blocks, up to the limit; return their bytes, or None if late."""
        length = self._contents[group].length
        if not length:
            return 0
        pairs = [(block, group_key(hash_, group)) for block, hash_ in self._blocks.published(group)]
        found = [pair for pair in pairs if pair[1] not in tiers][: limit // length]
        step = max(_LAST_BATCH // length, 1)
        for start in range(0, len(found), step):
            self._save(group, found[start : start + step])
            if not self._flush(tiers, deadline):
                return None
        return len(found) * length

    def _flush(self, tiers: OffloadTiers, deadline: float) -> bool:
        """Queue the blocks that were read, and write them; return False if time ran out."""
        self.collect()
        return tiers.flush(max(deadline - time.monotonic(), 0))

    def _save(self, group: int, blocks: Sequence[tuple[int, bytes]]) -> None:
        """Read blocks of a group; `collect` saves them under their keys."""
        if blocks:
            rows = self._contents[group].read([block for block, _ in blocks])
            mx.async_eval(rows)
            self._saving.append(([key for _, key in blocks], rows))

    def _save_state(self, key: bytes, state: object) -> None:
        assert self._states is not None
        assert isinstance(state, Snapshot | SlotSnapshot)
        if (row := self._states.read(state)) is not None:
            mx.async_eval(row)
            self._saving.append(([key], row))


def open_offload(
    config: EngineConfig, runner: ModelRunner, blocks: BlockManager, model_id: str
) -> BlockMover:
    """Return the mover for the blocks of `runner`, and set the offload of `blocks`.

    Raises `EngineError` for a directory that cannot be used, or for weights without a name: their
    blocks on disk could be mistaken for those of other weights.
    """
    wanted = config.kv_offload_dir is not None or config.kv_offload_memory
    contents = runner.block_contents()
    if not wanted or not contents or not blocks.enable_prefix_caching:
        if wanted:
            _log.warning("no KV offload: the prefix cache is off, or the KV cache is not paged")
        return BlockMover(runner, blocks, None)
    states = runner.state_contents()
    lengths = [each.length for each in contents]
    directory = None
    if config.kv_offload_dir is not None:
        if not model_id:
            raise EngineError(
                "cannot keep KV blocks on disk: the weights have no name",
                hint="give the engine a model_id",
            )
        device = str(mx.default_device())
        parts = [device, __version__, version("mlx"), version("mlx-lm")]
        for group, each in enumerate(contents):
            parts += [f"group {group}", *each.describe()]
        parts += states.describe() if states is not None else []
        directory = BlockDirectory(
            Path(config.kv_offload_dir),
            cache_identity(model_id, blocks.block_size, parts),
            lengths=tuple(dict.fromkeys([*lengths, *([states.length] if states else [])])),
            limit=_DISK if config.kv_offload_disk is None else config.kv_offload_disk,
        )
    limit = _MEMORY if config.kv_offload_memory is None else config.kv_offload_memory
    tiers = OffloadTiers(BlockMemory(limit), directory)
    offload = PrefixOffload(
        tiers,
        per_step=max(_PER_STEP // max(*lengths, 1), 1),
        make_state=None if states is None else states.snapshot,
        num_groups=len(contents),
        has_blocks=any(lengths),
    )
    blocks.set_offload(offload)
    mover = BlockMover(runner, blocks, offload)
    weakref.finalize(mover, tiers.close, 0.0)  # ends the thread of an engine that was not closed
    return mover
