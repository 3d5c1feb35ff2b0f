"""The best tier in which a model answers as mlx-lm alone would, found when it is loaded.

    handles     unmodified classes on rows; attention reads the paged cache
    patched     the same, with our subclass for attention that mlx-lm computes by hand
    pieces      some attention modules run sequence by sequence, on keys gathered from the pages
    contiguous  one forward per request with mlx-lm's own cache: correct, slow

A tier is left when a layer loses its handles, or when the self-test finds other logits.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn

from modelpack_engine.adaptation import self_test as tests
from modelpack_engine.adaptation.layout import ModelLayout
from modelpack_engine.adaptation.paged import PagedRunner
from modelpack_engine.attention import kernels
from modelpack_engine.attention.handles import LostHandleError
from modelpack_engine.attention.pools import KVLayout
from modelpack_engine.attention.step import StepInputs
from modelpack_engine.buckets import Buckets
from modelpack_engine.errors import EngineError
from modelpack_engine.fusion import kernels as fused_kernels
from modelpack_engine.managed_memory import Staging

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


def model_name(model: nn.Module) -> str:
    """Return the name of the module that a model's class is in."""
    return type(model).__module__.rpartition(".")[2]


def leave(model: nn.Module, tier: str, why: str) -> str:
    """Log that a model does not run in a tier; return a note of it."""
    logger.warning("%s does not run in %s: %s", model_name(model), tier, why)
    return f"not in {tier}: {why}"


@dataclass
class TierSearch:
    """Looks for a model's tier: all on rows, then more and more attention modules in pieces.

    Pools have `num_blocks` blocks. `notes` say what was left, and how the model runs. With
    `self_test` a tier's logits are compared, also of prompts of `full_step` tokens; else only what
    a forward pass attends to is looked at.
    """

    model: nn.Module
    layout: ModelLayout
    step: StepInputs
    staging: Staging
    buckets: Buckets
    num_blocks: int
    self_test: bool
    compiled: bool
    full_step: tuple[int, ...]
    kind: type[PagedRunner] = PagedRunner
    notes: list[str] = field(default_factory=list)

    def find(self) -> PagedRunner | None:
        """Return the model in its tier; None if it answers otherwise in all that are paged."""
        in_pieces: frozenset[str] = frozenset()
        compiled, fused = self.compiled, self._can_fuse()
        while True:
            runner = self._make(in_pieces, fused=fused, compiled=compiled)
            problem, culprit = self._try(runner)
            if problem is None:
                self.notes += runner.adapted.notes()
                if self.layout.quantised:
                    self._quantise(runner)
                return runner
            every = runner.adapted.attention_classes()
            runner.undo()
            if runner.adapted.fused:
                self._leave("fused layers", problem)
                fused = False
            elif runner.compiled is not None:
                self._leave("compiled steps", problem)
                compiled = False
            else:
                self._leave("pieces" if in_pieces else "handles", problem)
                more = in_pieces | {culprit} if culprit else every
                if more <= in_pieces:
                    more = every
                if more <= in_pieces:
                    return None
                in_pieces = frozenset(more)

    def _make(self, in_pieces: frozenset[str], *, fused: bool, compiled: bool) -> PagedRunner:
        num_blocks = self._num_tested if self.layout.quantised else self.num_blocks
        return self.kind(
            self.model,
            self.layout.without_quantisation(),
            self.step,
            staging=self.staging,
            num_blocks=num_blocks,
            buckets=self.buckets,
            in_pieces=in_pieces,
            fold=mx.cuda.is_available(),
            fused=fused,
            compiled=compiled,
        )

    @property
    def _num_tested(self) -> int:
        """Blocks that the self-test needs."""
        return tests.blocks_needed(self.step.block_size, self.full_step)

    def _quantise(self, runner: PagedRunner) -> None:
        """Give the caches of a tier that is right the quantised pools that are wanted."""
        runner.replace_pools(self.layout, self.num_blocks)
        paged = runner.adapted.paged
        bits = min(kv.layout.quantised.bits for kv in paged if kv.layout.quantised)
        problem, _ = self._try(runner, tests.QUANTISED[bits])
        if problem is not None:
            note = f"quantised keys and values change what this model says: {problem}"
            logger.warning("%s: %s", model_name(self.model), note)
            self.notes.append(note)

    def _can_fuse(self) -> bool:
        """Return whether layers may run by fused kernels: on a GPU where these are right."""
        if self.step.exact or not kernels.available().write:
            return False
        contents = [leaf.content for leaf in self.layout.leaves()]
        dtypes = {content.dtype for content in contents if isinstance(content, KVLayout)}
        wrong = [verdict for dtype in dtypes if (verdict := fused_kernels.verdict(dtype))]
        if wrong:
            self._leave("fused layers", wrong[0])
        return not wrong

    def _try(
        self, runner: PagedRunner, tolerance: float | None = None
    ) -> tuple[str | None, str | None]:
        """Return what is wrong with a tier, and the class of the module at fault, if known."""
        if self._num_tested > self.num_blocks:
            return None, None
        try:
            problem = tests.compare(
                self.model,
                runner.forward,
                block_size=self.step.block_size,
                vocab_size=self.layout.vocab_size,
                compute=self.self_test,
                tolerance=tolerance,
                full_step=self.full_step if tolerance is None else (),
            )
        except LostHandleError as error:
            return str(error), runner.adapted.owner_class(error)
        except MODEL_ERRORS as error:
            return f"{type(error).__name__}: {error}", None
        finally:
            runner.adapted.reset()
        return problem, None

    def _leave(self, tier: str, why: str) -> None:
        self.notes.append(leave(self.model, tier, why))
