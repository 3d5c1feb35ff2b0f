"""ModelRunner: a step's batch in, the sampled rows' logits out, for any mlx-lm model.

A model runs on pages in the best tier that is right for it, or else on mlx-lm's own caches.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Self

import mlx.core as mx
import mlx.nn as nn

from modelpack_engine import kernels
from modelpack_engine.attention.metadata import StepInputs
from modelpack_engine.attention.paged import BlockContents
from modelpack_engine.config import BLOCK_SIZE, EngineConfig, KVCacheDtype, parse_kv_cache_dtype
from modelpack_engine.core.batch import StepBatch
from modelpack_engine.core.block_manager import PrefixSnapshots
from modelpack_engine.core.buckets import EXACT, Buckets
from modelpack_engine.errors import ModelLoadError
from modelpack_engine.patches import functions
from modelpack_engine.platform.memory import Staging, keep_freed_memory
from modelpack_engine.platform.metal import uses_paged_attention
from modelpack_engine.runner.fallback import ContiguousRunner
from modelpack_engine.runner.kv_cache_size import Sizes
from modelpack_engine.runner.model_layout import (
    ModelLayout,
    UnknownCacheError,
    find_layout,
    with_cache_type,
)
from modelpack_engine.runner.paged import PagedRunner
from modelpack_engine.runner.tiers import MODEL_ERRORS, TierSearch, leave, model_name
from modelpack_engine.runner.warm_up import PADDING_SEQ_ID, StepShape, padding_batch


class ModelRunner:
    """Runs one model over one pool of KV blocks.

    `num_blocks` blocks of `block_size` tokens are allocated at once, block 0 being trash. `dtype`
    is the type of the pools (default: that of the model's keys), or `kv_cache_dtype` by its name;
    quantised pools are put in place when the self-test has found a tier without. `exact` shapes
    are for CPUs, where a new shape costs nothing; the default follows MLX's default device. `paged`
    False asks for the contiguous tier; by default, vllm-metal's VLLM_METAL_USE_PAGED_ATTENTION=0
    does. Steps are `compiled` by default where a kernel writes the pools. On GPUs, the self-test
    tries a `full_step`, too: prompts of so many tokens each.

    `tier` and `notes` say how the model runs; `supports_prefix_cache` is False in the contiguous
    tier. Raises `OutOfMemoryError` if the pools do not fit, `ModelLoadError` if mlx-lm cannot.
    """

    #: What runs a model on pages.
    pages: type[PagedRunner] = PagedRunner

    def __init__(
        self,
        model: nn.Module,
        *,
        num_blocks: int,
        block_size: int = BLOCK_SIZE,
        dtype: mx.Dtype | None = None,
        buckets: Buckets = EXACT,
        self_test: bool = True,
        exact: bool | None = None,
        paged: bool | None = None,
        compiled: bool | None = None,
        kv_cache_dtype: KVCacheDtype = "auto",
        full_step: tuple[int, ...] = (),
    ) -> None:
        functions.install()
        self.model = model
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.buckets = buckets
        self.notes: tuple[str, ...] = ()
        #: Where the host puts what steps are handed over in.
        self.staging = Staging()
        if exact is None:
            exact = mx.default_device() == mx.Device(mx.cpu)
        if exact:
            keep_freed_memory()
            functions.install(functions.swiglu_patches(model))
        self._paged: PagedRunner | None = None
        if paged is None:
            paged = uses_paged_attention()
        self.layout = self._find_layout()
        if self.layout is not None and paged:
            if dtype is not None:
                self.layout = self.layout.with_dtype(dtype)
            self.layout = with_cache_type(self.layout, kv_cache_dtype)
            if compiled is None:
                compiled = not exact and kernels.available().write
            search = TierSearch(
                model=model,
                layout=self.layout,
                step=StepInputs(block_size, exact=exact, staging=self.staging),
                staging=self.staging,
                buckets=buckets,
                num_blocks=num_blocks,
                self_test=self_test,
                compiled=compiled,
                full_step=() if exact else full_step,
                kind=self.pages,
            )
            self._paged = search.find()
            self.notes += tuple(search.notes)
        self._contiguous: ContiguousRunner | None = None
        if self._paged is None:
            if kv_cache_dtype != "auto":
                why = "this model's cache is not paged"
                self.notes += (leave(model, f"a KV cache of type {kv_cache_dtype}", why),)
            self._contiguous = ContiguousRunner(model)

    @classmethod
    def sized(cls, model: nn.Module, sizes: Sizes, config: EngineConfig) -> Self:
        """Return the runner of an engine of these sizes."""
        return cls(
            model,
            num_blocks=sizes.num_blocks,
            block_size=config.block_size,
            buckets=sizes.buckets,
            self_test=config.self_test,
            kv_cache_dtype=parse_kv_cache_dtype(config.kv_cache_dtype),
            full_step=sizes.full_step(config),
        )

    def _find_layout(self) -> ModelLayout | None:
        try:
            return find_layout(self.model)
        except UnknownCacheError as error:
            self.notes += (leave(self.model, "paged tiers", str(error)),)
            return None
        except MODEL_ERRORS as error:
            raise ModelLoadError(
                f"mlx-lm cannot run {model_name(self.model)}: {type(error).__name__}: {error}"
            ) from error

    # What it is.

    @property
    def tier(self) -> str:
        """Return "handles", "patched", "pieces" or "contiguous"; see `adaptation.tiers`."""
        return "contiguous" if self._paged is None else self._paged.tier

    @property
    def fused(self) -> dict[str, int]:
        """Return how many modules of a kind run by fused kernels."""
        return {} if self._paged is None else dict(self._paged.adapted.fused)

    @property
    def supports_prefix_cache(self) -> bool:
        """Whether blocks of one sequence may serve another, with a snapshot of recurrent state."""
        return self._paged is not None

    @property
    def can_go_back(self) -> bool:
        """Whether a sequence can drop its last tokens: a recurrent state has no way back."""
        return self._paged is not None and self.snapshots is None

    @property
    def snapshots(self) -> PrefixSnapshots | None:
        """Where sequences of a recurrent model may start, besides their beginning."""
        return None if self._paged is None else self._paged.adapted.snapshots

    @property
    def writes_in_place(self) -> bool:
        """Whether a step may be launched while the one before runs, and copies no pool for it.

        MLX's own updates copy what an earlier step still holds; our kernel writes to the pool.
        """
        return self._paged is not None and self._paged.writes_in_place

    @property
    def bytes_per_block(self) -> int:
        """Bytes that one block takes in all layers."""
        return 0 if self.layout is None else self.layout.bytes_per_token * self.block_size

    # A step.

    def forward(self, batch: StepBatch, token_ids: mx.array) -> mx.array:
        """Build a step: return logits [rows, vocabulary] of its sampled rows, not yet computed.

        `token_ids` int32 [rows] are the batch's, with those of the previous step filled in.
        Evaluate the result together with `pools()`, after the step before has been read: then no
        pool is copied.
        """
        if self._paged is not None:
            return self._paged.forward(batch, token_ids)
        assert self._contiguous is not None
        self._contiguous.release(batch.released)
        return self._contiguous.forward(batch, token_ids, list(batch.sample_rows))

    def is_compiled(self, batch: StepBatch) -> bool:
        """Return whether a step's forward pass is one that MLX has compiled."""
        return self._paged is not None and self._paged.is_compiled(batch)

    def pools(self) -> list[mx.array]:
        """Return what the last step writes, to be evaluated with its logits.

        Keep none of these: a second reference makes the next step copy a pool.
        """
        return self._runs.pools()

    def release(self, seq_ids: Iterable[int]) -> None:
        """Drop what is kept for sequences beside their blocks."""
        self._runs.release(seq_ids)

    @property
    def _runs(self) -> PagedRunner | ContiguousRunner:
        found = self._paged or self._contiguous
        assert found is not None
        return found

    def scrub(self, blocks: Iterable[int]) -> None:
        """Zero blocks that hold values which are not numbers.

        Masked keys still meet a product with zero, and zero times NaN is NaN: blocks of a sequence
        whose logits were NaN have to be scrubbed before another sequence gets them.
        """
        if self._paged is not None:
            self._paged.adapted.scrub(list(blocks), self.block_size)

    def scrub_slots(self, slots: list[int]) -> None:
        """Zero the keys and values of single tokens: those of rejected rows, if not numbers."""
        if self._paged is not None:
            self._paged.adapted.scrub_slots(slots)

    def block_contents(self) -> BlockContents | None:
        """Return the way to what blocks hold, None if there are none."""
        return None if self._paged is None else self._paged.adapted.block_contents()

    def undo(self) -> None:
        """Give the model back as it was; the runner is of no use then."""
        if self._paged is not None:
            self._paged.undo()

    def warm_up(self, shapes: Iterable[StepShape]) -> mx.Dtype | None:
        """Run steps of padding of the given shapes, which compiles what they need.

        Chunks first: only from then on does a recurrent model have states. Nothing in the
        contiguous tier, where every length is a shape. Returns the type of logits, if any were
        computed.
        """
        dtype = None
        if self._contiguous is not None:
            return dtype
        for shape in sorted(shapes, key=lambda shape: shape.decode_rows):
            batch = padding_batch(shape, self.block_size)
            logits = self.forward(batch, mx.zeros((batch.num_rows,), mx.int32))
            mx.eval(logits, self.pools())
            self.release([PADDING_SEQ_ID])
            dtype = logits.dtype
        return dtype
