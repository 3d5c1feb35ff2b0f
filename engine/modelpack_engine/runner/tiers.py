"""TierSearch: find the fastest tier in which a model passes the self-test.

The tiers are "paged" (unmodified classes), "patched" (a few lines of some classes replaced) and
"per-sequence" (some attention modules run once per sequence).

The self-test runs three steps of the adapted model on its real weights. Two sequences with 21
tokens in total, whose blocks are out of order, take part: a prompt runs in two chunks, the second
chunk in one step with a decode row of the other sequence, and then both sequences decode. The
logits of every sampled row are compared with those of a plain forward pass with mlx-lm's cache.

On a GPU, a full step of prompts is compared as well, since the number of rows decides which kernels
run.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from modelpack_engine import kernels
from modelpack_engine.attention.cache_handle import LostHandleError
from modelpack_engine.attention.metadata import StepInputs
from modelpack_engine.core.batch import Chunk, StepBatch
from modelpack_engine.core.buckets import Buckets
from modelpack_engine.errors import EngineError
from modelpack_engine.layers import kernels as fused_kernels
from modelpack_engine.platform import cuda_graphs
from modelpack_engine.platform.device import Staging
from modelpack_engine.runner.model_layout import ModelLayout
from modelpack_engine.runner.paged import PagedRunner

logger = logging.getLogger(__name__)

#: The lengths of the self-test's sequences, by id.
_LENGTHS = {1: 3, 2: 18}

#: How far the centred cosine of two rows of logits may be from 1. Some GPUs round float32 matmuls
#: to TF32; with 16 bits, a router may choose another expert.
_TOLERANCE = {mx.float32: 1e-4, mx.float16: 2e-2, mx.bfloat16: 2e-2}

#: If a model's own logits differ by more when it computes a prompt in parts, `_NOISE` times that
#: difference is allowed, up to `_MOST`.
_NOISE, _MOST = 4, 0.5

#: The average distance allowed in a full step, or `_NOISE` times the model's own if that is more;
#: wrong logits are at a distance near 1. Of 16 layers of Qwen3-Next's shape, whose random experts
#: are nearly equal, logits in bfloat16 are 0.11 off, and those in float32 less than 0.000001.
_FULL = 0.2

#: The tolerance with quantised keys and values, by bits; a larger distance is logged.
QUANTISED = {8: 2e-2, 4: 0.2}

#: Exceptions that a model's code may raise when it runs on rows or caches of an unknown kind.
MODEL_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, EngineError, LookupError, RuntimeError,
    TypeError, ValueError,
)  # fmt: skip


@dataclass
class TierSearch:
    """Searches for a model's tier: at first all attention runs on rows, then less and less of it.

    Pools have `num_blocks` blocks, and those of layers with smaller windows `window_blocks`.
    `notes` say how the model runs, and what was refused and why. With `self_test`, the logits of
    each tier are compared, including those of prompts of `full_step` tokens. Without it, a forward
    pass is only checked for layers that lose their handles.
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
    window_blocks: tuple[int, ...] = ()
    paged_runner: type[PagedRunner] = PagedRunner
    notes: list[str] = field(default_factory=list)

    def find(self) -> PagedRunner | None:
        """Return the runner of the first tier that passes the self-test; None if none does."""
        per_sequence: frozenset[str] = frozenset()
        compiled, fused = self.compiled, self._can_fuse()
        while True:
            runner = self._make(per_sequence, fused=fused, compiled=compiled)
            problem, culprit = self._try(runner)
            if problem is None:
                self.notes += runner.adapted.notes()
                if runner.adapted.states and runner.slow_with_graphs and cuda_graphs.are_used():
                    self.notes.append(cuda_graphs.SLOW)
                if self.layout.quantised:
                    self._quantise(runner)
                return runner
            every = runner.adapted.attention_classes()
            runner.undo()
            if runner.adapted.fused:
                self._refuse("fused layers", problem)
                fused = False
            elif runner.compiled is not None:
                self._refuse("compiled steps", problem)
                compiled = False
            else:
                self._refuse("per-sequence tier" if per_sequence else "paged tier", problem)
                more = per_sequence | {culprit} if culprit else every
                if more <= per_sequence:
                    more = every
                if more <= per_sequence:
                    return None
                per_sequence = frozenset(more)

    def _make(self, per_sequence: frozenset[str], *, fused: bool, compiled: bool) -> PagedRunner:
        return self.paged_runner(
            self.model,
            self.layout.without_quantisation(),
            self.step,
            staging=self.staging,
            num_blocks=self._num_tested if self.layout.quantised else self.num_blocks,
            window_blocks=(
                (self._num_tested,) * len(self.window_blocks)
                if self.layout.quantised
                else self.window_blocks
            ),
            buckets=self.buckets,
            per_sequence=per_sequence,
            fold=mx.cuda.is_available(),
            fused=fused,
            compiled=compiled,
        )

    @property
    def _num_tested(self) -> int:
        """The blocks that the self-test needs."""
        return blocks_needed(self.step.block_size, self.full_step)

    def _quantise(self, runner: PagedRunner) -> None:
        """Replace the pools of a tier that passed by quantised ones, and note if logits change."""
        runner.replace_pools(self.layout, self.num_blocks, *self.window_blocks)
        paged = runner.adapted.paged
        bits = min(kv.layout.quantised.bits for kv in paged if kv.layout.quantised)
        problem, _ = self._try(runner, QUANTISED[bits])
        if problem is not None:
            note = f"quantised keys and values change the output of this model: {problem}"
            logger.warning("%s: %s", model_name(self.model), note)
            self.notes.append(note)

    def _can_fuse(self) -> bool:
        """Return whether layers may run by fused kernels: on a GPU where these pass their tests."""
        if self.step.exact or not kernels.available().write:
            return False
        dtypes = {kv.dtype for kv in self.layout.kv_layouts()}
        wrong = [verdict for dtype in dtypes if (verdict := fused_kernels.verdict(dtype))]
        if wrong:
            self._refuse("fused layers", wrong[0])
        return not wrong

    def _try(
        self, runner: PagedRunner, tolerance: float | None = None
    ) -> tuple[str | None, str | None]:
        """Return the problem of a tier, if any, and the class of the module at fault, if known."""
        if self._num_tested > min((self.num_blocks, *self.window_blocks)):
            return None, None
        try:
            problem = compare(
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

    def _refuse(self, what: str, why: str) -> None:
        self.notes.append(refuse(self.model, what, why))


def model_name(model: nn.Module) -> str:
    """Return the name of the Python module that defines a model's class."""
    return type(model).__module__.rpartition(".")[2]


def refuse(model: nn.Module, what: str, why: str) -> str:
    """Log that a model runs without `what`, such as a tier; return a note about it."""
    logger.warning("%s runs with no %s: %s", model_name(model), what, why)
    return f"no {what}: {why}"


def compare(
    model: nn.Module,
    forward: Callable[[StepBatch, mx.array], mx.array],
    *,
    block_size: int,
    vocab_size: int,
    compute: bool = True,
    tolerance: float | None = None,
    full_step: Sequence[int] = (),
) -> str | None:
    """Return None if `forward` agrees with mlx-lm, otherwise a description of the difference.

    `model` is called with mlx-lm's own cache, for which swapped classes behave as before.
    Exceptions of `forward` are passed on. Without `compute`, the steps are only built, which finds
    layers that lose their handles. `tolerance` defaults to that of the logits' type. With a
    `full_step`, one more step is compared: prompts of these lengths.
    """
    tokens = _tokens(_LENGTHS, vocab_size)
    steps = _steps(tokens, block_size)
    if not compute:
        for batch, _ in steps:
            forward(batch, mx.array(batch.token_ids, mx.int32))
        return None
    expected = {seq_id: _plain(model, ids).squeeze(0) for seq_id, ids in tokens.items()}
    for batch, sampled in steps:
        logits = forward(batch, mx.array(batch.token_ids, mx.int32))
        rows = mx.concatenate([expected[seq_id][at : at + 1] for seq_id, at in sampled])
        if logits.shape != rows.shape:
            return f"logits have the shape {logits.shape}, expected {rows.shape}"
        limit = _TOLERANCE.get(rows.dtype, 2e-2) if tolerance is None else tolerance
        distance = float(mx.max(_distance(logits, rows)))
        if limit < distance <= _MOST and tolerance is None:
            limit = max(limit, min(_MOST, _NOISE * _noise(model, tokens, expected)))
        if not distance <= limit:
            return (
                f"logits of a step with {len(batch.decode_seq_ids)} decode rows and "
                f"{len(batch.chunks)} chunks are off by {distance:.2g} (1 - cosine), "
                f"expected at most {limit:.2g}"
            )
    if not full_step:
        return None
    tokens = _tokens(dict(enumerate(full_step, 1)), vocab_size)
    return _compare_full(model, forward, tokens, block_size)


def _plain(model: nn.Module, ids: list[int]) -> mx.array:
    """Return mlx-lm's logits [1, tokens, vocabulary] of a sequence.

    Functions that mlx-lm compiles run uncompiled: on CUDA, compiling one takes four seconds.
    """
    with uncompiled():
        logits: mx.array = model(mx.array([ids]), cache=make_prompt_cache(model))
        mx.eval(logits)
    return logits


@contextmanager
def uncompiled() -> Iterator[None]:
    """Switch `mx.compile` off on CUDA, unless it is off, for functions called in this context."""
    if not mx.cuda.is_available() or "MLX_DISABLE_COMPILE" in os.environ:
        yield
        return
    mx.disable_compile()
    try:
        yield
    finally:
        mx.enable_compile()


def blocks_needed(block_size: int, full_step: Sequence[int] = ()) -> int:
    """Return how many blocks the self-test needs, the null block included."""
    return 1 + max(
        sum(-(-length // block_size) for length in lengths)
        for lengths in (_LENGTHS.values(), full_step)
    )


def _compare_full(
    model: nn.Module,
    forward: Callable[[StepBatch, mx.array], mx.array],
    tokens: dict[int, list[int]],
    block_size: int,
) -> str | None:
    """Compare a step of whole prompts; return a description of the difference, if any."""
    chunks = [(seq_id, 0, len(ids)) for seq_id, ids in tokens.items()]
    tables = _tables(tokens, block_size)
    batch, _ = _step(tokens, tables, block_size, decode=[], chunks=chunks)
    logits = forward(batch, mx.array(batch.token_ids, mx.int32))
    expected = [_plain(model, ids)[:, -1] for ids in tokens.values()]
    distances = [
        float(_distance(logits[row : row + 1], wanted)) for row, wanted in enumerate(expected)
    ]
    distance, limit = sum(distances) / len(distances), _FULL
    if limit < distance <= _MOST:
        noise = sum(
            float(_distance(_in_parts(model, ids)[-1:], wanted))
            for ids, wanted in zip(tokens.values(), expected, strict=True)
        )
        limit = max(limit, min(_MOST, _NOISE * noise / len(tokens)))
    if distance <= limit:
        return None
    return (
        f"logits of a step with prompts of {len(batch.token_ids)} tokens are off by {distance:.2g} "
        f"(1 - cosine, their mean), expected at most {limit:.2g}"
    )


def _tokens(lengths: dict[int, int], vocab_size: int) -> dict[int, list[int]]:
    """Return token ids for sequences of these lengths, by seq_id."""
    return {
        seq_id: [(5 * i * i + 3 * i + seq_id) % min(vocab_size, 241) for i in range(length)]
        for seq_id, length in lengths.items()
    }


def _tables(tokens: dict[int, list[int]], block_size: int) -> dict[int, list[int]]:
    """Return block tables for the sequences, with blocks in descending order."""
    blocks = list(range(1, blocks_needed(block_size, [len(ids) for ids in tokens.values()])))
    return {
        seq_id: [blocks.pop() for _ in range(-(-len(ids) // block_size))]
        for seq_id, ids in tokens.items()
    }


def _noise(model: nn.Module, tokens: dict[int, list[int]], expected: dict[int, mx.array]) -> float:
    """Return how far a model's logits differ when it computes the prompts in parts.

    Latent attention, for one, uses different matmuls for one token and for several.
    """
    most = 0.0
    for seq_id, ids in tokens.items():
        distances = _distance(_in_parts(model, ids), expected[seq_id])
        most = max(most, float(mx.max(distances)))
    return most


def _in_parts(model: nn.Module, ids: list[int]) -> mx.array:
    """Return mlx-lm's logits [tokens, vocabulary] of a sequence that it computes in parts."""
    cache, half = make_prompt_cache(model), len(ids) // 2
    pieces = ids[:half], ids[half:-1], ids[-1:]
    with uncompiled():
        found = [model(mx.array([piece]), cache=cache) for piece in pieces if piece]
        return mx.concatenate([logits.squeeze(0) for logits in found])


def _distance(a: mx.array, b: mx.array) -> mx.array:
    """Return 1 - cosine of the centred rows of two matrices."""
    a, b = a.astype(mx.float32), b.astype(mx.float32)
    # Some models forbid tokens: minus infinity must be in the same places.
    finite = mx.isfinite(b)
    same = mx.all(mx.isfinite(a) == finite, axis=-1)
    a, b = mx.where(finite, a, 0), mx.where(finite, b, 0)
    a = a - a.mean(axis=-1, keepdims=True)
    b = b - b.mean(axis=-1, keepdims=True)
    norms = mx.linalg.norm(a, axis=-1) * mx.linalg.norm(b, axis=-1)
    distance = 1 - (a * b).sum(axis=-1) / mx.maximum(norms, 1e-30)
    return mx.where(same, distance, mx.inf)


def _steps(
    tokens: dict[int, list[int]], block_size: int
) -> list[tuple[StepBatch, list[tuple[int, int]]]]:
    """Return the steps, each with the (sequence, position) of its sampled rows."""
    tables = _tables(tokens, block_size)
    return [
        _step(tokens, tables, block_size, decode=[], chunks=[(1, 0, 1), (2, 0, 9)]),
        _step(tokens, tables, block_size, decode=[(1, 1)], chunks=[(2, 9, 17)]),
        _step(tokens, tables, block_size, decode=[(1, 2), (2, 17)], chunks=[]),
    ]


def _step(
    tokens: dict[int, list[int]],
    blocks: dict[int, list[int]],
    block_size: int,
    *,
    decode: list[tuple[int, int]],
    chunks: list[tuple[int, int, int]],
) -> tuple[StepBatch, list[tuple[int, int]]]:
    """Return a step of rows (sequence, position) and chunks (sequence, start, stop).

    Decode rows and the last row of each chunk are sampled.
    """
    rows = list(decode)
    made = []
    for seq_id, start, stop in chunks:
        length = stop - start
        table = tuple(blocks[seq_id][: -(-stop // block_size)])
        made.append(Chunk(len(rows), length, length, stop, table, seq_id))
        rows += [(seq_id, position) for position in range(start, stop)]
    sampled = [*range(len(decode)), *(chunk.row + chunk.length - 1 for chunk in made)]
    tables = [blocks[seq_id][: position // block_size + 1] for seq_id, position in decode]
    width = max(map(len, tables), default=0)
    batch = StepBatch(
        token_ids=[tokens[seq_id][position] for seq_id, position in rows],
        positions=[position for _, position in rows],
        slots=[
            blocks[seq_id][position // block_size] * block_size + position % block_size
            for seq_id, position in rows
        ],
        from_previous=(),
        num_decode=len(decode),
        decode_tables=[table + [0] * (width - len(table)) for table in tables],
        decode_lengths=[position + 1 for _, position in decode],
        decode_seq_ids=tuple(seq_id for seq_id, _ in decode),
        chunks=tuple(made),
        sample_rows=tuple(sampled),
        sample_seqs=(),
    )
    return batch, [rows[row] for row in sampled]
