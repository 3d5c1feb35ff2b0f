"""KV cache sizing: choose the blocks, tokens per step and tokens per request that fit in memory.

The KV cache gets `kv_cache_bytes`, or the share `gpu_memory_utilization` of the GPU's memory, less
the weights. On a CPU it gets half a gigabyte, or enough for one full context if that is more, up to
a quarter of the free memory: allocating more would slow down the start by seconds. vllm-metal's
VLLM_METAL_MEMORY_FRACTION overrides the share. The cache is never larger than `max_num_seqs`
requests of the full context can use. `step_shapes` lists the shapes of steps to warm up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from modelpack_engine.config import (
    CPU_BATCHED_TOKENS,
    GPU_BATCHED_TOKENS,
    LARGE_GPU_NUM_SEQS,
    NUM_SEQS,
    PACKED_BATCHED_TOKENS,
    EngineConfig,
)
from modelpack_engine.core.batch import StepShape
from modelpack_engine.core.block_manager import window_blocks
from modelpack_engine.core.buckets import EXACT, FEW, Buckets, round_up, sizes_up_to
from modelpack_engine.core.scheduler import OVERTAKING, SchedulerConfig
from modelpack_engine.errors import EngineError, OutOfMemoryError
from modelpack_engine.layers.blocks import (
    BlockEmbedding,
    BlockLinear,
    BlockSwitchLinear,
    most_rows,
)
from modelpack_engine.layers.matmul import FEW_ROWS
from modelpack_engine.platform import device
from modelpack_engine.platform.environment import memory_fraction
from modelpack_engine.runner.model_layout import WindowGroup

# Tokens of one prompt in a step: running sequences wait that long for their next token.
_GPU_CHUNK = 512

# The context length at which attention takes half of the time of a prompt's row.
_GPU_CONTEXT = 4096

# On a CPU: the largest share of the free memory, and the default bytes, of the KV cache.
_CPU_SHARE = 0.25
_CPU_BYTES = 512 * 1024**2

# Memory for everything other than weights, KV cache and steps' arrays.
_RESERVE = 256 * 1024**2

# The memory of a CUDA device that runs many sequences by default.
_LARGE_GPU = 32 << 30

# Steps that the device holds at a time: one runs while the next is launched.
_STEPS = 2

# Steps' arrays may take one part in this many of a GPU's memory; otherwise steps get fewer rows.
_STEPS_SHARE = 6

# With more of steps' arrays than one part in this many of the memory for the engine, or than this
# many bytes if that is more, MLX waits for the GPU (benchmarks/results/engine-h200.md).
_LIMIT_SHARE, _LEAST_LIMIT = 12, 1536 * 1024**2
_FEWEST_ROWS = 256
_FEWEST_BLOCKS = 4

#: The memory of all arrays of a step, as a factor of the linear layers' outputs: it includes norms,
#: residual sums, rotations and activations, less the arrays that the GPU frees before two steps are
#: launched. Measured: 1.55 for Llama-3.2-1B's shape (benchmarks/results/engine-h200.md).
_MEMORY_FACTOR = 1.6

#: The arrays of a step that is recorded, as a factor of a step's: all that its kernels write.
#: 1.13 to 1.19 by the shapes of models of 1 to 32 billion parameters. Of packed weights, norms and
#: SwiGLU are computed twice while a step is recorded (layers/add_norm.py): 1.64 at 8 billion.
_RECORDED_FACTOR, _RECORDED_PACKED_FACTOR = 1.2, 1.7
#: The part of `step_bytes` that one weight may take which such a step computes in full.
_WEIGHT_PART = 4
#: The most rows of such a step: with more, prompts take the GPU longer than MLX takes the host.
MOST_RECORDED_ROWS = 4096

#: The most experts that a token is routed to; a layer's weights do not say how many.
_MOST_EXPERTS = 8

#: Sizes of the mixed steps to warm up: decode rows, tokens of chunks, tokens of contexts.
_MIXED_ROWS, _MIXED_CHUNKS, _USUAL_CONTEXT = (8, 32, 64, 128), (128, 256, 512), 1024
#: The longest contexts whose steps are warmed up at load; those of longer ones are in idle time.
_FIRST_CONTEXT = 4096


@dataclass(frozen=True, slots=True)
class StepMemory:
    """The bytes of a step's arrays: `per_row` for each row, and `per_step` in any case."""

    per_row: int = 0
    per_step: int = 0


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of an engine; `step_bytes` is the most memory of steps' arrays, about."""

    num_blocks: int
    max_model_len: int
    max_num_batched_tokens: int
    buckets: Buckets
    max_prefill_chunk: int | None = None
    whole_steps: bool = False
    prefill_context: int | None = None
    step_bytes: int = 0
    #: The rows of a step whose arrays fit in `step_bytes` while it is recorded, and the bytes of a
    #: row then.
    recorded_rows: int = MOST_RECORDED_ROWS
    recorded_row_bytes: int = 0
    #: The most bytes of a weight that a recorded step computes in full; None sets no limit.
    recorded_weight_bytes: int | None = None
    #: The rows that the arrays of recurrent states have at first.
    state_rows: int = 1
    #: Layers with smaller windows than others, and the blocks of each such group.
    groups: tuple[WindowGroup, ...] = ()
    window_blocks: tuple[int, ...] = ()

    @property
    def window_pools(self) -> tuple[tuple[int, int], ...]:
        """The window and the blocks of each group of layers with smaller windows."""
        pairs = zip(self.groups, self.window_blocks, strict=True)
        return tuple((group.window, count) for group, count in pairs)

    def cache_bytes(self, block_size: int, bytes_per_token: int) -> int:
        """Return the bytes of the KV cache; a token takes `bytes_per_token` in all layers."""
        own = bytes_per_token - sum(group.bytes_per_token for group in self.groups)
        pairs = zip(self.groups, self.window_blocks, strict=True)
        others = sum(group.bytes_per_token * count for group, count in pairs)
        return (self.num_blocks * own + others) * block_size

    def scheduler_config(self, config: EngineConfig) -> SchedulerConfig:
        """Return the scheduler's limits."""
        return SchedulerConfig(
            max_num_seqs=max_num_seqs(config),
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_model_len=self.max_model_len,
            max_prefill_chunk=config.max_prefill_chunk or self.max_prefill_chunk,
            max_waiting=config.max_waiting,
            whole_steps=self.whole_steps,
            prefill_context=self.prefill_context,
            overtaking=OVERTAKING if config.scheduling_policy == "shortest-first" else 0,
            buckets=self.buckets,
        )

    def full_step(self, config: EngineConfig) -> tuple[int, ...]:
        """Return the lengths of prompts that fill a step, as far as blocks and requests allow."""
        length = min(self.scheduler_config(config).chunk_rows, self.max_model_len)
        count = min(
            self.max_num_batched_tokens // length,
            (min((self.num_blocks, *self.window_blocks)) - 1) // _blocks(length, config.block_size),
            max_num_seqs(config),
        )
        return (length,) * count

    def step_shapes(self, config: EngineConfig, rows: int = 0) -> list[StepShape]:
        """Return the shapes of steps of these sizes, with at least up to `rows` decode rows."""
        limits = self.scheduler_config(config)
        return step_shapes(
            self.buckets,
            max_num_seqs=max(rows, limits.max_num_seqs),
            max_chunk=limits.chunk_rows,
            max_model_len=self.max_model_len,
            block_size=config.block_size,
        )


def on_gpu() -> bool:
    """Return whether MLX computes on a GPU by default."""
    return mx.default_device() != mx.Device(mx.cpu)


def max_num_seqs(config: EngineConfig) -> int:
    """Return how many sequences run at the same time: as configured, or the device's default."""
    if config.max_num_seqs is not None:
        return config.max_num_seqs
    is_large = on_gpu() and mx.cuda.is_available() and device.total_memory() >= _LARGE_GPU
    return LARGE_GPU_NUM_SEQS if is_large else NUM_SEQS


class Cached(Protocol):
    """The bytes that a model caches; `ModelLayout` implements it."""

    @property
    def bytes_per_token(self) -> int:
        """The bytes of one token's keys and values in all layers."""

    @property
    def snapshot_bytes(self) -> int:
        """The bytes of all snapshots of recurrent state."""

    @property
    def bytes_per_sequence(self) -> int:
        """The bytes of one sequence's recurrent state in all layers."""


def choose_sizes(
    layout: Cached | None,
    context_length: int,
    config: EngineConfig,
    *,
    draft_bytes: int = 0,
    draft_state_bytes: int = 0,
    window: int | None = None,
    groups: tuple[WindowGroup, ...] = (),
    step_memory: StepMemory = StepMemory(),  # it is frozen
    span: int = 0,
    picture_bytes: int = 0,
    packed: bool = False,
) -> Sizes:
    """Return the sizes for a model with the caches of `layout` (None: not paged).

    A token takes `draft_bytes` more bytes in the KV cache of a draft model, whose recurrent states
    take `draft_state_bytes`. If every layer has an attention window of at most `window` tokens, a
    request holds no more tokens than the window and one step. `groups` of layers with smaller
    windows have blocks of their own, unless no request is long enough to release any. On CUDA,
    steps' arrays take `step_memory`. By default, a step can compute `span` tokens of one prompt.
    Pictures that layers attend to take `picture_bytes`. With `packed`, for the library for CPUs,
    steps are larger by default, and one prompt may fill a step: its threads then wait for each
    other less often.

    Raises `OutOfMemoryError`, saying what would fit, if the KV cache cannot hold one request of
    `config.max_model_len` tokens, or a few blocks if that is not set.
    """
    asked = config.max_model_len
    if asked is not None and not 1 < asked <= context_length:
        raise EngineError(
            f"max_model_len is {asked}, but this model's context is {context_length}",
            hint=f"choose 2 to {context_length}",
        )
    packaged = config.default_model_len or 0
    wanted = asked or (min(packaged, context_length) if packaged > 1 else context_length)
    per_block = (layout.bytes_per_token + draft_bytes) * config.block_size if layout else 0
    gpu = on_gpu()
    buckets = FEW if gpu else EXACT
    if not (gpu and mx.cuda.is_available()):  # elsewhere MLX frees arrays before a step ends
        step_memory = StepMemory()
    on_cpu = PACKED_BATCHED_TOKENS if packed else CPU_BATCHED_TOKENS
    default = _rows_of_a_step(step_memory.per_row) if gpu else on_cpu
    num_seqs = max_num_seqs(config)
    span = buckets.pad_chunk(span)
    default = max(default, span + buckets.pad_rows(num_seqs) if span else 0)
    tokens = max(config.max_num_batched_tokens or default, 2 * num_seqs)
    most_of_prompt = config.max_prefill_chunk or max(tokens if packed else tokens // 2, span)
    step_bytes = _STEPS * tokens * step_memory.per_row + step_memory.per_step
    if step_bytes:
        memory = int(device.total_memory() * _memory_share(config))
        step_bytes = min(step_bytes, max(_LEAST_LIMIT, memory // _LIMIT_SHARE))

    def held(length: int, window: int | None = window) -> int:
        """Return the most blocks that a request of `length` tokens holds at once."""
        blocks = _blocks(length, config.block_size)
        if window is None:
            return blocks
        chunk = SchedulerConfig(
            num_seqs, tokens, wanted, most_of_prompt, buckets=buckets
        ).chunk_rows
        return min(blocks, window_blocks(window, chunk, config.block_size))

    most = held(wanted)
    if all(held(wanted, group.window) >= most for group in groups):
        groups = ()
    of_groups = [
        _Pool(group.bytes_per_token * config.block_size, held(wanted, group.window))
        for group in groups
    ]
    own = _Pool(per_block - sum(pool.block_bytes for pool in of_groups), most)
    num_blocks, *of_windows = [num_seqs * pool.held + 1 for pool in (own, *of_groups)]
    state_rows = 1
    if layout and per_block:
        one_context = _bytes_of_a_request(own, of_groups)
        default = _bytes_of_a_request(own, of_groups, shared=True)
        restored = gpu and (config.kv_offload_dir is not None or bool(config.kv_offload_memory))
        snapshot_bytes = layout.snapshot_bytes * (1 + restored)  # in slots, and from the offload
        others = snapshot_bytes + step_bytes + picture_bytes + draft_state_bytes
        state_rows = _state_rows(layout, num_seqs, config, others)
        state_bytes = state_rows * layout.bytes_per_sequence
        budget = _kv_budget(config, default, others + state_bytes)
        required = asked is not None
        num_blocks, *of_windows = _share_budget(budget, num_seqs, own, of_groups, required=required)
        if num_blocks < _FEWEST_BLOCKS:
            raise OutOfMemoryError(
                f"the KV cache has {budget} bytes, but a block of {config.block_size} tokens "
                f"takes {per_block}",
                hint=f"give it at least {per_block * _FEWEST_BLOCKS} bytes (kv_cache_bytes)",
            )
    capacity = (num_blocks - 1) * config.block_size
    if num_blocks - 1 >= most:
        capacity = max(capacity, wanted)
    for pool, count in zip(of_groups, of_windows, strict=True):
        if count - 1 < pool.held:
            capacity = min(capacity, (count - 1) * config.block_size)
    if asked is not None and capacity < asked:
        raise OutOfMemoryError(
            f"the KV cache holds {capacity} tokens, fewer than max_model_len {asked}",
            hint=f"lower max_model_len to {capacity}, or give the cache "
            f"{one_context} bytes (kv_cache_bytes)",
        )
    weight_bytes = min(step_memory.per_step, step_bytes // _WEIGHT_PART)
    factor = _RECORDED_PACKED_FACTOR if step_memory.per_step else _RECORDED_FACTOR
    recorded_row_bytes = int(factor * step_memory.per_row)
    return Sizes(
        num_blocks,
        min(wanted, capacity + 1),
        tokens,
        buckets,
        max_prefill_chunk=max(_GPU_CHUNK, span) if gpu else most_of_prompt,
        whole_steps=packed,
        prefill_context=_GPU_CONTEXT if gpu else None,
        step_bytes=step_bytes,
        recorded_rows=_recorded_rows(step_bytes - weight_bytes, recorded_row_bytes),
        recorded_weight_bytes=weight_bytes if step_bytes else None,
        recorded_row_bytes=recorded_row_bytes,
        state_rows=state_rows,
        groups=groups,
        window_blocks=tuple(of_windows),
    )


@dataclass(frozen=True, slots=True)
class _Pool:
    """The bytes of a block of a group of layers, and the most blocks that a request holds."""

    block_bytes: int
    held: int


# The layers that see all tokens get this many times the blocks of those with a window. Both pools
# are then full of requests of this many times the tokens that sliding layers hold; longer ones
# leave sliding blocks unused, shorter ones full blocks. For Gemma 3 27B (10 and 52 layers, window
# 1024, chunks of 512), compared with equal pools: requests shorter than the window have 67% of the
# tokens, and those of 6000 tokens and more 2.7 times as many. With a factor of 2, it would be 86%
# and 1.7 times; with 8, 47% and 3.8 times.
_FULL_PER_SLIDING = 4


def _bytes_of_a_request(own: _Pool, windows: list[_Pool], *, shared: bool = False) -> int:
    """Return the bytes of the pools that hold a request; if `shared`, also several short ones."""
    least = (own.held + 1) // _FULL_PER_SLIDING if shared else 0
    others = (max(pool.held + 1, least) * pool.block_bytes for pool in windows)
    return (own.held + 1) * own.block_bytes + sum(others)


def _share_budget(
    budget: int, num_seqs: int, own: _Pool, windows: list[_Pool], *, required: bool
) -> list[int]:
    """Return the blocks of the pool `own`, and of the pools of layers with smaller windows.

    No pool gets more than `num_seqs` requests hold in all layers: blocks that no request holds keep
    prefixes. A request that fits in equal pools always fits: a pool is smaller than those only if
    it holds all that a request needs. If a request of the full context is `required`, it fits if
    the budget is enough for it alone; otherwise the context is shortened, as window pools with the
    blocks of one request would run short ones one by one.
    """
    useful = num_seqs * own.held + 1
    block_bytes = sum(pool.block_bytes for pool in windows)
    equal = budget // (own.block_bytes + block_bytes)
    if not windows:
        return [min(useful, equal)]
    count = max(
        budget // (_FULL_PER_SLIDING * own.block_bytes + block_bytes),
        (budget - useful * own.block_bytes) // block_bytes,
    )
    spare = max(0, budget - _bytes_of_a_request(own, windows)) // block_bytes
    if not required and budget < _bytes_of_a_request(own, windows, shared=True):
        spare = count
    counts = [
        min(useful, max(min(count, pool.held + 1 + spare), min(pool.held + 1, equal)))
        for pool in windows
    ]
    taken = sum(pool.block_bytes * n for pool, n in zip(windows, counts, strict=True))
    return [min(useful, (budget - taken) // own.block_bytes), *counts]


def _blocks(tokens: int, block_size: int) -> int:
    return -(-tokens // block_size)


def _rows_of_a_step(row_bytes: int) -> int:
    """Return the default rows of a step: halved until steps' arrays take little enough memory."""
    rows = GPU_BATCHED_TOKENS
    if row_bytes:
        room = device.total_memory() // _STEPS_SHARE
        while rows > _FEWEST_ROWS and _STEPS * rows * row_bytes > room:
            rows //= 2
    return rows


def _state_rows(layout: Cached, num_seqs: int, config: EngineConfig, others: int) -> int:
    """Return the rows of recurrent states: of each running sequence before and after a step.

    On a GPU, they get half of the free memory less `others` at most: a step rarely has as many
    sequences as it may have. There are more once they are needed. On a CPU, there are none before.
    """
    if not (on_gpu() and layout.bytes_per_sequence):
        return 1
    room = _room(_memory_share(config), others)
    return max(2, min(2 * num_seqs, room // 2 // layout.bytes_per_sequence))


def _room(share: float, others: int) -> int:
    """Return the bytes of a GPU's memory that are free, less `others`; it may use a share."""
    total = int(device.total_memory() * share)
    return total - device.used_memory() - _RESERVE - others


def _kv_budget(config: EngineConfig, one_context: int, others: int) -> int:
    """Return the bytes of the KV cache: as configured, or the free memory less `others`."""
    share = _memory_share(config)
    if config.kv_cache_bytes is not None:
        return config.kv_cache_bytes
    if not on_gpu():
        return min(int(device.available_memory() * _CPU_SHARE), max(_CPU_BYTES, one_context))
    return max(0, _room(share, others))


def _memory_share(config: EngineConfig) -> float:
    share = memory_fraction()
    if share is None:
        share = config.gpu_memory_utilization
    if not 0 < share <= 1:
        raise EngineError(f"gpu_memory_utilization is {share}, expected above 0, up to 1")
    return share


def _recorded_rows(step_bytes: int, per_row: int) -> int:
    if not (step_bytes and per_row):
        return MOST_RECORDED_ROWS
    return min(MOST_RECORDED_ROWS, step_bytes // per_row)


def limit_memory(planned: int, step_bytes: int) -> None:
    """Make MLX wait for the GPU while steps' arrays take more than `step_bytes`; 0 sets no limit.

    `planned` are the bytes of weights and KV cache, some of which may not exist yet. The limit is
    the process's; the engine that is made last sets it, and counts the arrays of others.
    """
    if step_bytes:
        mx.set_memory_limit(max(planned, mx.get_active_memory()) + step_bytes)


def step_memory(model: nn.Module, vocab_size: int, max_num_seqs: int = 1) -> StepMemory:
    """Estimate the memory of a step of `model`, without the head, which runs on few rows.

    A head counts if its values are computed in full for `max_num_seqs` rows.

    MLX frees an array when the GPU is done with it, and by then the host has launched most of the
    step: so the arrays of all layers count, up to the limit from which MLX waits (`limit_memory`).
    With many rows, quantised weights are dequantised.
    """
    outputs = dequantised = table = 0
    head: int | None = None
    norms: list[int] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.QuantizedLinear | BlockLinear):
            size = module["weight"].shape[0]
            if size == vocab_size and "layers" not in name:
                head = _values_of_head(module, max_num_seqs)
                continue
            outputs += size
            if isinstance(module, nn.QuantizedLinear):
                dequantised += size * module["scales"].shape[1] * module.group_size
            elif isinstance(module, BlockLinear):
                dequantised += size * module.kind.inputs(module["weight"].shape[1])
        elif isinstance(module, SwitchLinear | QuantizedSwitchLinear | BlockSwitchLinear):
            experts, size, words = module["weight"].shape
            outputs += size * min(experts, _MOST_EXPERTS)
            if isinstance(module, BlockSwitchLinear):
                dequantised += experts * size * module.kind.inputs(words)
        elif isinstance(module, nn.QuantizedEmbedding | BlockEmbedding):
            if module["weight"].shape[0] == vocab_size:
                table = _values_of_head(module, max_num_seqs)
        elif isinstance(module, nn.RMSNorm | nn.LayerNorm) and "weight" in module:
            norms.append(module["weight"].dtype.size)
    dequantised += table if head is None else head
    itemsize = max(norms, default=mx.bfloat16.size)  # the outputs have the type of the norms
    return StepMemory(int(outputs * _MEMORY_FACTOR) * itemsize, dequantised * itemsize)


def _values_of_head(module: Any, rows: int) -> int:
    """Return how many values of a head are in memory to multiply so many rows: all or none."""
    outputs, words = module["weight"].shape
    if isinstance(module, BlockLinear | BlockEmbedding):
        return int(outputs * module.kind.inputs(words)) if rows > most_rows() else 0
    if not isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding):
        return 0
    if rows <= FEW_ROWS or module.mode != "affine" or module.bits not in (4, 8):
        return 0  # MLX multiplies by it as it is
    return int(outputs * module["scales"].shape[1] * module.group_size)


def step_shapes(
    buckets: Buckets, *, max_num_seqs: int, max_chunk: int, max_model_len: int, block_size: int
) -> list[StepShape]:
    """Return the shapes to warm up: all sizes of decode rows alone and of a chunk alone.

    Mixed steps combine the same kernels, so a few of their many combinations are enough.
    """
    widths = sizes_up_to(-(-max_model_len // block_size), buckets.table_width)
    shapes = [
        StepShape(rows, width)
        for rows in sizes_up_to(max_num_seqs, buckets.rows)
        for width in widths
    ]
    shapes += [
        StepShape(0, width, length)
        for length in sizes_up_to(max_chunk, buckets.chunk)
        for width in widths
        if width * block_size >= length
    ]
    usual = round_up(-(-min(max_model_len, _USUAL_CONTEXT) // block_size), buckets.table_width)
    shapes += [
        StepShape(rows, usual, length)
        for rows in _MIXED_ROWS
        if rows <= round_up(max_num_seqs, buckets.rows)
        for length in _MIXED_CHUNKS
        if length <= round_up(max_chunk, buckets.chunk)
    ]
    return shapes


def by_context(
    shapes: Sequence[StepShape], buckets: Buckets, block_size: int
) -> tuple[list[StepShape], list[StepShape]]:
    """Return the shapes to warm up at load, and those of long contexts, for idle time, in order.

    Chunks come first: a recurrent model has no states before its first chunk.
    """
    columns = buckets.pad_table_width(-(-_FIRST_CONTEXT // block_size))
    first = [shape for shape in shapes if shape.table_width <= columns]
    later = [shape for shape in shapes if shape.table_width > columns]
    return first, sorted(later, key=lambda shape: shape.decode_rows)
