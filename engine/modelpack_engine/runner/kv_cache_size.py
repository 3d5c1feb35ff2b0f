"""Warm-up: the shapes of the steps to compile, and the memory of a step for KV cache sizing."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from modelpack_engine.config import EngineConfig
from modelpack_engine.core.batch import StepShape
from modelpack_engine.core.block_manager import window_blocks
from modelpack_engine.core.buckets import EXACT, FEW, Buckets, round_up, sizes_up_to
from modelpack_engine.core.scheduler import OVERTAKING, SchedulerConfig
from modelpack_engine.errors import EngineError, OutOfMemoryError
from modelpack_engine.platform import device
from modelpack_engine.platform.environment import memory_fraction

#: What norms, sums, rotations and activations add to the outputs of the linear layers, as a factor,
#: less what the GPU is done with before two steps are handed over. Measured: 1.55 for
#: Llama-3.2-1B's shape (benchmarks/results/engine-h200.md).
_BESIDE = 1.6
#: Experts that a token goes to, at most: what a layer is made of does not tell.
_MOST_EXPERTS = 8


@dataclass(frozen=True, slots=True)
class StepMemory:
    """Bytes that a step's arrays take: for each row, and however many there are."""

    per_row: int = 0
    per_step: int = 0


def step_memory(model: nn.Module, vocab_size: int) -> StepMemory:
    """Return about how much memory steps of `model` take; the head runs on few rows.

    MLX gives memory back when the GPU has done what it was handed, and by then the host has handed
    it most of a step: so all layers count. Quantised weights are written out for many rows.
    """
    outputs = written_out = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.QuantizedLinear):
            size = module["weight"].shape[0]
            if size == vocab_size and "layers" not in name:
                continue
            outputs += size
            if isinstance(module, nn.QuantizedLinear):
                written_out += size * module["scales"].shape[1] * module.group_size
        elif isinstance(module, SwitchLinear | QuantizedSwitchLinear):
            experts, size = module["weight"].shape[:2]
            outputs += size * min(experts, _MOST_EXPERTS)
    itemsize = _itemsize(model)
    return StepMemory(int(outputs * _BESIDE) * itemsize, written_out * itemsize)


def _itemsize(model: nn.Module) -> int:
    """Return the bytes of an element of what layers put out: as many as the norms' weights have."""
    sizes = [
        module["weight"].dtype.size
        for _, module in model.named_modules()
        if isinstance(module, nn.RMSNorm | nn.LayerNorm) and "weight" in module
    ]
    return max(sizes, default=mx.bfloat16.size)


#: What mixed steps are warmed up with: decode rows, tokens of chunks, tokens of contexts.
_MIXED_ROWS, _MIXED_CHUNKS, _USUAL_CONTEXT = (8, 32, 64, 128), (128, 256, 512), 1024


def step_shapes(
    buckets: Buckets, *, max_num_seqs: int, max_chunk: int, max_model_len: int, block_size: int
) -> list[StepShape]:
    """Return the shapes that steps up to these limits have: decode alone, and a chunk alone.

    Mixed steps are made of the same parts, whose numbers multiply: some of these are enough.
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


_GPU_TOKENS = 2048
# Of one prompt in a step: others wait for as long for their next token.
_GPU_CHUNK = 512
# From where attention is half of what a row of a prompt takes.
_GPU_CONTEXT = 4096
_CPU_TOKENS = 256
_CPU_SHARE = 0.25
_CPU_BYTES = 512 * 1024**2
# What else is there beside weights, KV cache and steps' arrays.
_RESERVE = 256 * 1024**2
# Steps that the device has at a time: the next is handed over while one runs.
_STEPS = 2
# Of a GPU's memory, what their arrays may take, as a divisor; steps have fewer rows else, but some.
_STEPS_SHARE = 6
_FEWEST_ROWS = 256
_FEWEST_BLOCKS = 4


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the engine is built with; `step_bytes` is what steps' arrays are expected to take."""

    num_blocks: int
    max_model_len: int
    max_num_batched_tokens: int
    buckets: Buckets
    max_prefill_chunk: int | None = None
    prefill_context: int | None = None
    step_bytes: int = 0

    def scheduler_config(self, config: EngineConfig) -> SchedulerConfig:
        """Return the scheduler's limits."""
        return SchedulerConfig(
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_model_len=self.max_model_len,
            max_prefill_chunk=config.max_prefill_chunk or self.max_prefill_chunk,
            max_waiting=config.max_waiting,
            prefill_context=self.prefill_context,
            overtaking=OVERTAKING if config.scheduling_policy == "shortest-first" else 0,
            buckets=self.buckets,
        )

    def full_step(self, config: EngineConfig) -> tuple[int, ...]:
        """Return how long prompts are that fill a step, as far as blocks and requests go."""
        length = min(self.scheduler_config(config).chunk_rows, self.max_model_len)
        count = min(
            self.max_num_batched_tokens // length,
            (self.num_blocks - 1) // _blocks(length, config.block_size),
            config.max_num_seqs,
        )
        return (length,) * count

    def step_shapes(self, config: EngineConfig, rows: int = 0) -> list[StepShape]:
        """Return the shapes of steps of these sizes, up to `rows` decode rows if that is more."""
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


class Cached(Protocol):
    """What is known of a model's cache; `ModelLayout` is one."""

    @property
    def bytes_per_token(self) -> int:
        """What a token takes in all layers that keep keys and values."""
        ...

    @property
    def snapshot_bytes(self) -> int:
        """What snapshots of recurrent state take beside that, together."""
        ...


def choose_sizes(
    layout: Cached | None,
    context_length: int,
    config: EngineConfig,
    *,
    beside: int = 0,
    window: int | None = None,
    step_memory: StepMemory = StepMemory(),  # it is frozen
) -> Sizes:
    """Return the sizes for a model whose caches are laid out as `layout` (None: not paged).

    A token takes `beside` bytes more, in the KV cache of a draft model. Where no layer sees more
    than the last `window` tokens, a request holds no more than these and those of a step. On CUDA,
    steps' arrays take `step_memory`.

    Raises `OutOfMemoryError`, saying what would fit, if the KV cache cannot hold a request of
    `config.max_model_len`, or of a few blocks where none is asked for.
    """
    asked = config.max_model_len
    if asked is not None and not 1 < asked <= context_length:
        raise EngineError(
            f"max_model_len is {asked}, and this model's context is {context_length}",
            hint=f"choose 2 to {context_length}",
        )
    wanted = asked or _default_length(context_length, config)
    per_block = (layout.bytes_per_token + beside) * config.block_size if layout else 0
    gpu = on_gpu()
    buckets = FEW if gpu else EXACT
    if not keeps_steps():
        step_memory = StepMemory()
    default = _rows_of_a_step(step_memory.per_row) if gpu else _CPU_TOKENS
    tokens = max(config.max_num_batched_tokens or default, 2 * config.max_num_seqs)
    step_bytes = _STEPS * tokens * step_memory.per_row + step_memory.per_step

    def held(length: int) -> int:
        """Return the most blocks that a request of `length` tokens holds at a time."""
        blocks = _blocks(length, config.block_size)
        if window is None:
            return blocks
        chunk = SchedulerConfig(
            config.max_num_seqs, tokens, wanted, config.max_prefill_chunk, buckets=buckets
        ).chunk_rows
        return min(blocks, window_blocks(window, chunk, config.block_size))

    useful = config.max_num_seqs * held(wanted) + 1
    num_blocks = useful
    if layout and per_block:
        one_context = (held(wanted) + 1) * per_block
        budget = _kv_budget(config, one_context, layout.snapshot_bytes + step_bytes)
        num_blocks = min(useful, budget // per_block)
        if num_blocks < _FEWEST_BLOCKS:
            raise OutOfMemoryError(
                f"the KV cache gets {budget} bytes, and a block of {config.block_size} tokens "
                f"takes {per_block}",
                hint=f"give it at least {per_block * _FEWEST_BLOCKS} bytes (kv_cache_bytes)",
            )
    capacity = (num_blocks - 1) * config.block_size
    if num_blocks - 1 >= held(wanted):
        capacity = max(capacity, wanted)
    if asked is not None and capacity < asked:
        raise OutOfMemoryError(
            f"the KV cache holds {capacity} tokens, fewer than max_model_len {asked}",
            hint=f"lower max_model_len to {capacity}, or give the cache "
            f"{per_block * (held(asked) + 1)} bytes (kv_cache_bytes)",
        )
    return Sizes(
        num_blocks,
        min(wanted, capacity + 1),
        tokens,
        buckets,
        max_prefill_chunk=_GPU_CHUNK if gpu else None,
        prefill_context=_GPU_CONTEXT if gpu else None,
        step_bytes=step_bytes,
    )


def _default_length(context_length: int, config: EngineConfig) -> int:
    """Return the length of a request where none is asked for: the packager's, if there is one."""
    packaged = config.default_model_len
    return context_length if packaged is None or packaged < 2 else min(packaged, context_length)


def _blocks(tokens: int, block_size: int) -> int:
    return -(-tokens // block_size)


def keeps_steps() -> bool:
    """Return whether MLX keeps all arrays of a step until the device is done with it: on CUDA."""
    return on_gpu() and mx.cuda.is_available()


def _rows_of_a_step(row_bytes: int) -> int:
    """Return how many rows steps have by default: fewer where they would take too much memory."""
    rows = _GPU_TOKENS
    if row_bytes:
        room = device.total_memory() // _STEPS_SHARE
        while rows > _FEWEST_ROWS and _STEPS * rows * row_bytes > room:
            rows //= 2
    return rows


def _kv_budget(config: EngineConfig, one_context: int, others: int) -> int:
    """Return the bytes of the KV cache: those given, or what is left beside `others` bytes."""
    share = memory_fraction()
    if share is None:
        share = config.gpu_memory_utilization
    if not 0 < share <= 1:
        raise EngineError(f"gpu_memory_utilization is {share}, expected above 0, up to 1")
    if config.kv_cache_bytes is not None:
        return config.kv_cache_bytes
    if not on_gpu():
        return min(int(available_memory() * _CPU_SHARE), max(_CPU_BYTES, one_context))
    room = int(device.total_memory() * share) - device.used_memory()
    return max(0, room - _RESERVE - others)


def available_memory() -> int:
    """Return the bytes that can be used without swapping."""
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return pages * size // 2
