"""ModelRunner: a step's batch in, the sampled rows' logits out, for any mlx-lm model.

At load it chooses the best tier in which the model answers as mlx-lm alone would:

    handles     unmodified classes on rows; attention reads the paged cache
    patched     the same, with our subclass for attention that mlx-lm computes by hand
    pieces      some attention modules run sequence by sequence, on keys gathered from the pages
    contiguous  one forward per request with mlx-lm's own cache: correct, slow

A tier is left when a layer loses its handles, or when the self-test finds other logits.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import cached_property
from typing import Self

import mlx.core as mx
import mlx.nn as nn

from modelpack_engine import recurrence
from modelpack_engine.adaptation import cpu_activations
from modelpack_engine.adaptation import self_test as tests
from modelpack_engine.adaptation.adapted import Adapted
from modelpack_engine.adaptation.cache_types import with_cache_type
from modelpack_engine.adaptation.compiled import CompiledSteps
from modelpack_engine.adaptation.contiguous import ContiguousRunner
from modelpack_engine.adaptation.layout import ModelLayout, UnknownCacheError, find_layout
from modelpack_engine.adaptation.warm_up import PADDING_SEQ_ID, StepShape, padding_batch
from modelpack_engine.attention import handles, kernels, rotations
from modelpack_engine.attention.contents import BlockContents
from modelpack_engine.attention.handles import LostHandleError
from modelpack_engine.attention.pools import KVLayout
from modelpack_engine.attention.step import StepInputs
from modelpack_engine.batch import StepBatch
from modelpack_engine.buckets import EXACT, Buckets
from modelpack_engine.config import BLOCK_SIZE, EngineConfig
from modelpack_engine.errors import EngineError, ModelLoadError, OutOfMemoryError
from modelpack_engine.fusion import kernels as fused_kernels
from modelpack_engine.kv_types import KVCacheDtype, parse_kv_cache_dtype
from modelpack_engine.malloc import keep_freed_memory
from modelpack_engine.managed_memory import Staging
from modelpack_engine.sizing import Sizes
from modelpack_engine.snapshots import PrefixSnapshots
from modelpack_engine.vllm_metal import uses_paged_attention

logger = logging.getLogger(__name__)


#: What a model's code may raise when it is given rows or caches that it was not written for.
MODEL_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EngineError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)


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
        handles.install()
        rotations.install()
        recurrence.install()
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
            cpu_activations.install(model)
        self._step = StepInputs(block_size, exact=exact, staging=self.staging)
        self._adapted: Adapted | None = None
        self._compiled: CompiledSteps | None = None
        self._contiguous: ContiguousRunner | None = None
        if paged is None:
            paged = uses_paged_attention()
        self.layout = self._find_layout()
        if self.layout is not None and paged:
            if dtype is not None:
                self.layout = self.layout.with_dtype(dtype)
            self.layout = with_cache_type(self.layout, kv_cache_dtype)
            if compiled is None:
                compiled = not exact and kernels.available().write
            self._full_step = () if exact else full_step
            self._adapt(self.layout, self_test, compiled)
        if self._adapted is None:
            if kv_cache_dtype != "auto":
                self._leave(
                    f"a KV cache of type {kv_cache_dtype}", "this model's cache is not paged"
                )
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

    # Load.

    def _find_layout(self) -> ModelLayout | None:
        try:
            return find_layout(self.model)
        except UnknownCacheError as error:
            self._leave("paged tiers", str(error))
            return None
        except MODEL_ERRORS as error:
            raise ModelLoadError(
                f"mlx-lm cannot run {self._name}: {type(error).__name__}: {error}"
            ) from error

    def _adapt(self, layout: ModelLayout, self_test: bool, compiled: bool) -> None:
        """Find the best tier: all on rows, then more and more attention modules in pieces."""
        in_pieces: frozenset[str] = frozenset()
        quantised = layout.quantised
        needed = tests.blocks_needed(self.block_size, self._full_step)
        num_blocks = needed if quantised else self.num_blocks
        fold = mx.cuda.is_available()
        fused = self._can_fuse(layout)
        while True:
            adapted = Adapted(
                self.model,
                layout.without_quantisation(),
                self._step,
                num_blocks=num_blocks,
                buckets=self.buckets,
                in_pieces=in_pieces,
                fold=fold,
                fused=fused,
            )
            self._adapted = adapted
            self._allocate(adapted.pools())
            if compiled and CompiledSteps.can_run(adapted):
                self._compiled = CompiledSteps(
                    self.model, adapted, self._step, self.buckets, self.staging
                )
            problem, culprit = self._try(adapted, layout, self_test)
            if problem is None:
                self.notes += adapted.notes()
                if quantised:
                    self._quantise(adapted, layout, self_test)
                return
            if adapted.fused:
                self._leave("fused layers", problem)
                fused = False
                self._drop(adapted)
                continue
            if self._compiled is not None:
                self._leave("compiled steps", problem)
                compiled = False
                self._drop(adapted)
                continue
            every = adapted.attention_classes()
            self._drop(adapted)
            self._leave("pieces" if in_pieces else "handles", problem)
            more = in_pieces | {culprit} if culprit else every
            if more <= in_pieces:
                more = every
            if more <= in_pieces:
                return
            in_pieces = frozenset(more)

    def _quantise(self, adapted: Adapted, layout: ModelLayout, self_test: bool) -> None:
        """Give the caches of a tier that is right the quantised pools that are wanted."""
        adapted.replace_pools(layout, self.num_blocks)
        self._allocate(adapted.pools())
        bits = min(kv.layout.quantised.bits for kv in adapted.paged if kv.layout.quantised)
        problem, _ = self._try(adapted, layout, self_test, tests.QUANTISED[bits])
        if problem is not None:
            note = f"quantised keys and values change what this model says: {problem}"
            logger.warning("%s: %s", self._name, note)
            self.notes += (note,)

    def _can_fuse(self, layout: ModelLayout) -> bool:
        """Return whether layers may run by fused kernels: on a GPU where these are right."""
        if self._step.exact or not kernels.available().write:
            return False
        dtypes = {
            leaf.content.dtype for leaf in layout.leaves() if isinstance(leaf.content, KVLayout)
        }
        wrong = [verdict for dtype in dtypes if (verdict := fused_kernels.verdict(dtype))]
        if wrong:
            self._leave("fused layers", wrong[0])
        return not wrong

    def _drop(self, adapted: Adapted) -> None:
        adapted.undo()
        self._adapted = self._compiled = None

    def _try(
        self,
        adapted: Adapted,
        layout: ModelLayout,
        self_test: bool,
        tolerance: float | None = None,
    ) -> tuple[str | None, str | None]:
        """Return what is wrong with a tier, and the class of the module at fault, if known."""
        if tests.blocks_needed(self.block_size, self._full_step) > self.num_blocks:
            return None, None
        try:
            problem = tests.compare(
                self.model,
                self.forward,
                block_size=self.block_size,
                vocab_size=layout.vocab_size,
                compute=self_test,
                tolerance=tolerance,
                full_step=self._full_step if tolerance is None else (),
            )
        except LostHandleError as error:
            return str(error), adapted.owner_class(error)
        except MODEL_ERRORS as error:
            return f"{type(error).__name__}: {error}", None
        finally:
            adapted.reset()
        return problem, None

    def _leave(self, tier: str, why: str) -> None:
        logger.warning("%s does not run in %s: %s", self._name, tier, why)
        self.notes += (f"not in {tier}: {why}",)

    @property
    def _name(self) -> str:
        return type(self.model).__module__.rpartition(".")[2]

    def _allocate(self, pools: list[mx.array]) -> None:
        try:
            mx.eval(pools)
        except RuntimeError as error:
            size = sum(pool.nbytes for pool in pools)
            raise OutOfMemoryError(
                f"{self.num_blocks} blocks of the KV cache take {size} bytes: {error}",
                hint="give the KV cache less memory",
            ) from error

    # What it is.

    @property
    def tier(self) -> str:
        """Return "handles", "patched", "pieces" or "contiguous"; see the module's docstring."""
        if self._adapted is None:
            return "contiguous"
        if self._adapted.in_pieces:
            return "pieces"
        return "patched" if self._adapted.patched else "handles"

    @property
    def supports_prefix_cache(self) -> bool:
        """Whether blocks of one sequence may serve another, with a snapshot of recurrent state."""
        return self._adapted is not None

    @property
    def can_go_back(self) -> bool:
        """Whether a sequence can drop its last tokens: a recurrent state has no way back."""
        return self._adapted is not None and self.snapshots is None

    @property
    def snapshots(self) -> PrefixSnapshots | None:
        """Where sequences of a recurrent model may start, besides their beginning."""
        return None if self._adapted is None else self._adapted.snapshots

    @cached_property
    def writes_in_place(self) -> bool:
        """Whether a step may be launched while the one before runs, and copies no pool for it.

        MLX's own updates copy what an earlier step still holds; our kernel writes to the pool.
        """
        adapted = self._adapted
        return adapted is not None and adapted.writes_in_place

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
        self.release(batch.released)
        rows = list(batch.sample_rows)
        if self._contiguous is not None:
            return self._contiguous.forward(batch, token_ids, rows)
        adapted = self._adapted
        assert adapted is not None
        count = len(rows)
        logits: mx.array
        if self._compiled is not None:
            if self._compiled.takes(batch):
                adapted.begin(batch)
                logits = self._compiled.forward(batch, token_ids, rows)
                adapted.finish(batch)
                return logits
            self._compiled.forget()
        padded = self.buckets.pad_rows(count) or 1
        self._step.begin(batch, rows + [0] * (padded - count))
        adapted.begin(batch)
        try:
            logits = self.model(token_ids[:, None], cache=adapted.caches)
            adapted.close()
        except BaseException:
            adapted.abandon()
            raise
        finally:
            self._step.end()
        adapted.finish(batch)
        if not self._step.rows_taken:
            logits = logits[self._step.sample_rows]
        if logits.shape[0] != padded:
            raise EngineError(f"the model made logits of {logits.shape[0]} rows, expected {padded}")
        return logits[:count, -1]

    def is_compiled(self, batch: StepBatch) -> bool:
        """Return whether a step's forward pass is one that MLX has compiled."""
        return self._compiled is not None and self._compiled.takes(batch)

    def pools(self) -> list[mx.array]:
        """Return what the last step writes, to be evaluated with its logits.

        Keep none of these: a second reference makes the next step copy a pool.
        """
        if self._contiguous is not None:
            return self._contiguous.pools()
        assert self._adapted is not None
        return self._adapted.pools()

    def release(self, seq_ids: Iterable[int]) -> None:
        """Drop what is kept for sequences beside their blocks."""
        if self._contiguous is not None:
            self._contiguous.release(seq_ids)
        elif self._adapted is not None:
            self._adapted.rows.release(seq_ids)

    def scrub(self, blocks: Iterable[int]) -> None:
        """Zero blocks that hold values which are not numbers.

        Masked keys still meet a product with zero, and zero times NaN is NaN: blocks of a sequence
        whose logits were NaN have to be scrubbed before another sequence gets them.
        """
        if self._adapted is not None:
            self._adapted.scrub(list(blocks), self.block_size)

    def scrub_slots(self, slots: list[int]) -> None:
        """Zero the keys and values of single tokens: those of rejected rows, if not numbers."""
        if self._adapted is not None:
            self._adapted.scrub_slots(slots)

    def block_contents(self) -> BlockContents | None:
        """Return the way to what blocks hold, None if there are none."""
        return None if self._adapted is None else self._adapted.block_contents()

    def undo(self) -> None:
        """Give the model back as it was; the runner is of no use then."""
        if self._adapted is not None:
            self._adapted.undo()

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
