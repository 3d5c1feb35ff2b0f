"""From the engine's settings to an offload, and to the mover that serves it."""

from __future__ import annotations

import logging
import weakref
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx

from modelpack import __version__
from modelpack_engine.block_manager import BlockManager
from modelpack_engine.config import EngineConfig
from modelpack_engine.errors import EngineError
from modelpack_engine.model_runner import ModelRunner
from modelpack_engine.offload.directory import BlockDirectory
from modelpack_engine.offload.identity import cache_identity
from modelpack_engine.offload.memory import BlockMemory
from modelpack_engine.offload.mover import BlockMover
from modelpack_engine.offload.prefixes import PrefixOffload
from modelpack_engine.offload.tiers import OffloadTiers

_log = logging.getLogger(__name__)

#: Bytes that are taken where a directory is given, and nothing more is said.
_MEMORY = 1024**3
_DISK = 16 * 1024**3
#: Bytes that a step restores: a few milliseconds of copying.
_PER_STEP = 16 * 1024**2


def open_offload(
    config: EngineConfig, runner: ModelRunner, blocks: BlockManager, model_id: str
) -> BlockMover:
    """Return what moves the blocks of `runner`; `blocks` gets to know the offload.

    Raises `EngineError` for a directory that cannot be used, or for weights without a name, whose
    blocks nobody could find again safely.
    """
    wanted = config.kv_offload_dir is not None or config.kv_offload_memory
    contents = runner.block_contents()
    paged = blocks.enable_prefix_caching and blocks.snapshots is None
    if not wanted or contents is None or not paged:
        if wanted:
            _log.warning("no prefixes are offloaded: they are not cached, or have recurrent state")
        return BlockMover(runner, blocks, None)
    directory = None
    if config.kv_offload_dir is not None:
        if not model_id:
            raise EngineError(
                "KV blocks of weights without a name cannot be kept on disk",
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
    weakref.finalize(mover, tiers.close, 0.0)  # the thread of an engine that nobody closed
    return mover
