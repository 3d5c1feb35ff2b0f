"""ModelRunner: the interface that runs a model, and `make_runner`, which chooses an implementation.

`Engine` hands a runner the batch of each step. `PagedRunner` computes all token rows in one forward
pass, on KV blocks. `FallbackRunner` runs one forward pass per request, on mlx-lm's own caches.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn

from modelpack_engine import kernels
from modelpack_engine.attention.metadata import AdapterRows, StepInputs
from modelpack_engine.attention.paged import BlockContents
from modelpack_engine.config import BLOCK_SIZE, EngineConfig, KVCacheDtype, parse_kv_cache_dtype
from modelpack_engine.core.batch import StepBatch, StepShape
from modelpack_engine.core.block_manager import PrefixSnapshots
from modelpack_engine.core.buckets import EXACT, Buckets
from modelpack_engine.errors import ModelLoadError
from modelpack_engine.patches import functions
from modelpack_engine.platform.device import Staging, keep_freed_memory
from modelpack_engine.platform.environment import uses_paged_attention
from modelpack_engine.runner.cpu import CpuBlocks
from modelpack_engine.runner.fallback import FallbackRunner
from modelpack_engine.runner.kv_cache_size import Sizes
from modelpack_engine.runner.model_layout import (
    ModelLayout,
    UnknownCacheError,
    find_layout,
    with_cache_type,
)
from modelpack_engine.runner.paged import PagedRunner
from modelpack_engine.runner.recurrent import StateContents
from modelpack_engine.runner.tiers import MODEL_ERRORS, TierSearch, model_name, refuse


class ModelRunner(Protocol):
    """Runs one model: takes the batch of a step, and returns the logits of its sampled rows."""

    model: nn.Module
    #: The sizes that the arrays of a batch are padded to.
    buckets: Buckets
    #: The host's buffers for the inputs of steps.
    staging: Staging
    #: How the model is run, and which faster ways were refused and why.
    notes: tuple[str, ...]

    #: Whether the logits are computed when `forward` returns.
    computes_at_once: bool

    @property
    def layout(self) -> ModelLayout | None:
        """The layout of the model's caches; None if a cache is of an unknown kind."""

    @property
    def adapter_rows(self) -> AdapterRows | None:
        """The adapters of the rows that a step computes; None if it supports no adapters."""

    @property
    def tier(self) -> str:
        """How the model is run: "paged", "patched", "per-sequence" or "fallback"."""

    @property
    def fused(self) -> Mapping[str, int]:
        """How many modules of each kind run by fused kernels."""

    @property
    def supports_prefix_cache(self) -> bool:
        """Whether sequences may share blocks; recurrent models share them up to a snapshot."""

    @property
    def snapshots(self) -> PrefixSnapshots | None:
        """Snapshots of recurrent state, from which sequences may start; None without such state."""

    @property
    def can_go_back(self) -> bool:
        """Whether a sequence can drop its last tokens, if a step verified them as a proposal."""

    @property
    def writes_in_place(self) -> bool:
        """Whether a step may be launched while the previous one runs, without copying the pools.

        Our kernel writes into the pools. MLX's own updates copy an array that another step holds.
        """

    def forward(
        self, batch: StepBatch, token_ids: mx.array, input_embeddings: mx.array | None = None
    ) -> mx.array:
        """Build the graph of a step; return the logits [rows, vocabulary] of its sampled rows.

        Rows of padding may follow.
        `token_ids` int32 [rows] are the batch's, including those that the previous step sampled.
        `input_embeddings` [rows, width] replace those of the model's table.
        Evaluate the logits together with `pools()`, after the previous step has been read: MLX then
        copies no pool.
        """

    def pools(self) -> list[mx.array]:
        """Return the arrays that the last step writes, to evaluate together with its logits.

        Do not keep them: with a second reference, MLX copies a pool in the next step.
        """

    def release(self, seq_ids: Iterable[int]) -> None:
        """Drop the state of sequences that is not in blocks."""

    def verified(self, seq_id: int, num_tokens: int) -> None:
        """Keep the recurrent state after the first `num_tokens` rows of a proposal; 0 is before it.

        Call this before the next step is built.
        """

    def scrub(self, blocks: Iterable[int], group: int = 0) -> None:
        """Zero blocks of a sequence whose logits are or may be NaN, before another one gets them.

        They are blocks of the layers of `group`: window pools count from 1.
        Masked values are multiplied by zero, and zero times NaN is NaN.
        """

    def scrub_slots(self, slots: list[int], group: int = 0) -> None:
        """Zero the keys and values of single tokens: rejected proposals whose logits were NaN."""

    def block_contents(self) -> Sequence[BlockContents | CpuBlocks]:
        """Return the access to the contents of blocks, for each group of layers."""

    def state_contents(self) -> StateContents | None:
        """Return the access to the contents of snapshots; None if there are no snapshots."""

    def warm_up(self, shapes: Iterable[StepShape]) -> mx.Dtype | None:
        """Run steps of padding in these shapes, which compiles their kernels.

        Returns the type of the logits; None if no step was run.
        """

    def undo(self) -> None:
        """Restore the model's classes; the runner is unusable afterwards."""


def make_runner(
    model: nn.Module,
    *,
    num_blocks: int,
    window_blocks: tuple[int, ...] = (),
    block_size: int = BLOCK_SIZE,
    dtype: mx.Dtype | None = None,
    buckets: Buckets = EXACT,
    self_test: bool = True,
    exact: bool | None = None,
    paged: bool | None = None,
    compiled: bool | None = None,
    kv_cache_dtype: KVCacheDtype = "auto",
    full_step: tuple[int, ...] = (),
    paged_runner: type[PagedRunner] = PagedRunner,
    fallback_runner: type[FallbackRunner] = FallbackRunner,
) -> ModelRunner:
    """Return a runner of `model`: paged if a tier passes the self-test, or a fallback.

    The KV cache has `num_blocks` blocks of `block_size` tokens; block 0 is the null block. With
    `window_blocks`, layers with smaller windows than others have as many blocks of their own, for
    each window in descending order. `dtype` is the type of keys and values (default: the model's
    own), and `kv_cache_dtype` names one. The self-test runs before keys and values are quantised.

    `exact` shapes are not padded: the default on a CPU, where a new shape costs nothing. `paged` is
    True by default, unless vllm-metal's VLLM_METAL_USE_PAGED_ATTENTION is 0. `compiled` steps are
    the default where a kernel writes the pools. On a GPU, the self-test also runs a `full_step` of
    prompts with these numbers of tokens.

    Raises `OutOfMemoryError` if the KV cache does not fit, and `ModelLoadError` if mlx-lm cannot
    run the model.
    """
    functions.install()
    staging = Staging()
    if exact is None:
        exact = mx.default_device() == mx.Device(mx.cpu)
    if exact:
        keep_freed_memory()
        functions.install(functions.swiglu_patches(model))
    layout: ModelLayout | None = None
    notes: tuple[str, ...] = ()
    try:
        layout = find_layout(model)
    except UnknownCacheError as error:
        notes = (refuse(model, "paged attention", str(error)),)
    except MODEL_ERRORS as error:
        why = f"{type(error).__name__}: {error}"
        raise ModelLoadError(f"mlx-lm cannot run {model_name(model)}: {why}") from error
    if layout is not None and (uses_paged_attention() if paged is None else paged):
        if dtype is not None:
            layout = layout.with_dtype(dtype)
        layout = with_cache_type(layout, kv_cache_dtype)
        if compiled is None:
            compiled = not exact and kernels.available().write
        search = TierSearch(
            model=model,
            layout=layout,
            step=StepInputs(block_size, exact=exact, staging=staging),
            staging=staging,
            buckets=buckets,
            num_blocks=num_blocks,
            window_blocks=window_blocks,
            self_test=self_test,
            compiled=compiled,
            full_step=() if exact else full_step,
            paged_runner=paged_runner,
        )
        runner = search.find()
        notes += tuple(search.notes)
        if runner is not None:
            runner.notes = notes
            return runner
    if kv_cache_dtype != "auto":
        notes += (
            refuse(model, f"KV cache of type {kv_cache_dtype}", "this model's cache is not paged"),
        )
    return fallback_runner(model, layout, buckets, staging, notes)


def make_engine_runner(
    model: nn.Module,
    sizes: Sizes,
    config: EngineConfig,
    *,
    paged_runner: type[PagedRunner] = PagedRunner,
    fallback_runner: type[FallbackRunner] = FallbackRunner,
) -> ModelRunner:
    """Return the runner for an engine of these sizes."""
    runner = make_runner(
        model,
        num_blocks=sizes.num_blocks,
        window_blocks=sizes.window_blocks,
        block_size=config.block_size,
        buckets=sizes.buckets,
        self_test=config.self_test,
        kv_cache_dtype=parse_kv_cache_dtype(config.kv_cache_dtype),
        full_step=sizes.full_step(config),
        paged_runner=paged_runner,
        fallback_runner=fallback_runner,
    )
    if isinstance(runner, PagedRunner):
        runner.adapted.rows.reserved = sizes.state_rows
    return runner
