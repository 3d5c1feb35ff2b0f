"""BlockMover: copy KV blocks between the pools and the offload tiers, between two steps."""

from __future__ import annotations

import hashlib
import logging
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
from modelpack_engine.offload.tiers import BlockMemory, OffloadTiers, PrefixOffload
from modelpack_engine.outputs import OffloadStats
from modelpack_engine.runner.model_runner import ModelRunner

_log = logging.getLogger(__name__)

IDENTITY_SIZE = 16  # bytes

#: Increased whenever the format of a block's bytes changes.
VERSION = 1

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
    """Copies blocks of a runner's pools; without an `offload`, it does nothing."""

    def __init__(
        self, runner: ModelRunner, blocks: BlockManager, offload: PrefixOffload | None
    ) -> None:
        self._runner, self._blocks, self._offload = runner, blocks, offload
        self._contents = runner.block_contents()
        self._saving: list[tuple[list[bytes], mx.array]] = []
        self._num_saved = 0

    def move(self, *, has_step: bool, in_flight: bool) -> None:
        """Save and restore the blocks that scheduling requested; call it before building the step.

        If there is no step to build and none in flight, wait for blocks that are being loaded.
        """
        offload, contents = self._offload, self._contents
        if offload is None or contents is None:
            return
        evicted, restored = offload.take()
        try:
            if evicted:
                self._save(evicted)
            if restored:
                contents.write(*zip(*restored, strict=True))
        except BaseException:
            self._blocks.forget_content()
            raise
        if has_step or in_flight:
            return
        if restored:
            mx.async_eval(self._runner.pools())
        elif offload.is_awaited:
            offload.wait(_WAIT)

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
            self._num_saved += len(hashes)

    def forget(self) -> None:
        """Drop the gathered blocks, after a step that failed."""
        self._saving.clear()
        if self._offload is not None:
            self._offload.take()

    def stats(self) -> OffloadStats:
        """Return counters since the start, and current gauges."""
        if self._offload is None or self._contents is None:
            return OffloadStats()
        offload, length = self._offload, self._contents.length
        directory = offload.tiers.directory
        return OffloadStats(
            restores=offload.num_restores,
            restored_tokens=offload.num_restored * self._blocks.block_size,
            memory_hits=offload.num_restored - offload.num_from_disk,
            disk_hits=offload.num_from_disk,
            saved_bytes=self._num_saved * length,
            restored_bytes=offload.num_restored * length,
            dropped_files=directory.num_dropped if directory else 0,
            memory_bytes=offload.tiers.memory.num_bytes,
            disk_bytes=directory.num_bytes if directory else 0,
        )

    def close(self) -> None:
        """Write the whole prefix cache to disk for the next start, the newest blocks first."""
        if self._offload is None or self._contents is None:
            return
        tiers = self._offload.tiers
        self.collect()
        if tiers.directory is not None:
            room = tiers.directory.limit // self._contents.length
            found = [pair for pair in self._blocks.published() if pair[1] not in tiers][:room]
            step = max(_LAST_BATCH // self._contents.length, 1)
            for start in range(0, len(found), step):
                self._save(found[start : start + step])
                self.collect()
                if not tiers.flush(_LAST_SECONDS):
                    break
        tiers.close(_LAST_SECONDS)
        self._offload = None

    def _save(self, blocks: Sequence[tuple[int, bytes]]) -> None:
        assert self._contents is not None
        rows = self._contents.read([block for block, _ in blocks])
        mx.async_eval(rows)
        self._saving.append(([hash_ for _, hash_ in blocks], rows))


def open_offload(
    config: EngineConfig, runner: ModelRunner, blocks: BlockManager, model_id: str
) -> BlockMover:
    """Return the mover for the blocks of `runner`, and set the offload of `blocks`.

    Raises `EngineError` for a directory that cannot be used, or for weights without a name: their
    blocks on disk could be mistaken for those of other weights.
    """
    wanted = config.kv_offload_dir is not None or config.kv_offload_memory
    contents = runner.block_contents()
    paged = blocks.enable_prefix_caching and blocks.snapshots is None
    if not wanted or contents is None or not paged:
        if wanted:
            _log.warning("no KV offload: the prefix cache is off, or the model has recurrent state")
        return BlockMover(runner, blocks, None)
    directory = None
    if config.kv_offload_dir is not None:
        if not model_id:
            raise EngineError(
                "cannot keep KV blocks on disk: the weights have no name",
                hint="give the engine a model_id",
            )
        device = str(mx.default_device())
        versions = [__version__, version("mlx"), version("mlx-lm")]
        directory = BlockDirectory(
            Path(config.kv_offload_dir),
            cache_identity(model_id, blocks.block_size, [device, *versions, *contents.describe()]),
            length=contents.length,
            limit=_DISK if config.kv_offload_disk is None else config.kv_offload_disk,
        )
    limit = _MEMORY if config.kv_offload_memory is None else config.kv_offload_memory
    tiers = OffloadTiers(BlockMemory(limit), directory, length=contents.length)
    blocks.offload = PrefixOffload(tiers, per_step=max(_PER_STEP // contents.length, 1))
    mover = BlockMover(runner, blocks, blocks.offload)
    weakref.finalize(mover, tiers.close, 0.0)  # ends the thread of an engine that was not closed
    return mover
