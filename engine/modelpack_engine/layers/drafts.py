"""Kernels of drafts by a head: its inputs, which rows were accepted, and the next token.

A draft is a chain of very small kernels, so what counts is how many there are. Places and tokens
are in arrays of more than 8 bytes: MLX keeps smaller ones in the host's memory (CUDA).
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from modelpack_engine.kernels import launch
from modelpack_engine.kernels.plan import logit_simdgroups, norm_simdgroups, vector_width


class DraftShape(NamedTuple):
    """The sequences of a draft, the rows of each, the blocks of its table, and its tokens."""

    sequences: int
    rows: int
    width: int
    num_tokens: int

    def cut(self, numbers: mx.array) -> list[mx.array]:
        """Split the numbers int32 of a draft.

        Positions, slots [sequences * rows], proposed tokens [sequences, rows], tables
        [sequences, width] and lengths [sequences].
        """
        rows = self.sequences * self.rows
        positions, slots, proposed = numbers[: 3 * rows].reshape(3, rows)
        tables, lengths = numbers[3 * rows : -self.sequences], numbers[-self.sequences :]
        return [
            positions, slots, proposed.reshape(self.sequences, self.rows),
            tables.reshape(self.sequences, self.width), lengths,
        ]  # fmt: skip


class Places(NamedTuple):
    """Where the tokens of a draft go, int32.

    `found` [sequences, 1 + tokens] has the number of rows read in all columns. `places`
    [3 * tokens + 1, sequences] are the position, the slot and the number of keys of each token, and
    the last row read.
    """

    found: mx.array
    places: mx.array

    def of_token(self, number: int) -> list[mx.array]:
        """Return the position, the slot and the number of keys of a token, each [sequences]."""
        return [self._row(3 * number + each) for each in range(3)]

    @property
    def last(self) -> mx.array:
        """The last row read [sequences]."""
        return self._row(len(self.places) - 1)

    def _row(self, row: int) -> mx.array:
        # A slice is a view; an index would be a gather, which a kernel computes.
        return self.places[row : row + 1].reshape(-1)


def accepted(ids: mx.array, numbers: mx.array, shape: DraftShape) -> Places:
    """Return the places of a draft whose rows are followed by the drawn tokens `ids`, int32.

    A sequence's rows are read up to the first of `ids` [sequences, rows] that is not the proposed
    token in `numbers`, which `DraftShape.cut` splits.
    """
    if accepted_verdict() is not None:
        return _accepted_by_mlx(ids, numbers, shape)
    return _accepted(ids, numbers, shape)


def _accepted(ids: mx.array, numbers: mx.array, shape: DraftShape) -> Places:
    found, places = launch.run(
        "accepted",
        [ids, numbers],
        [],
        [("ROWS", shape.rows), ("TOKENS", shape.num_tokens)],
        threads=shape.sequences,
        group=32,
        shapes=[
            (shape.sequences, 1 + shape.num_tokens), (3 * shape.num_tokens + 1, shape.sequences),
        ],
        dtypes=[mx.int32, mx.int32],
    )  # fmt: skip
    return Places(found, places)


def _accepted_by_mlx(ids: mx.array, numbers: mx.array, shape: DraftShape) -> Places:
    positions, slots, proposed, _, lengths = shape.cut(numbers)
    number = mx.arange(shape.rows)
    drawn = (ids != proposed) | (number == shape.rows - 1)
    counts = mx.argmax(mx.where(drawn, shape.rows - number, 0), axis=1).astype(mx.int32) + 1
    last = mx.arange(shape.sequences) * shape.rows + counts - 1
    first = mx.stack([positions[last], slots[last], lengths + counts])
    of_tokens = first + mx.arange(shape.num_tokens)[:, None, None]
    return Places(
        mx.broadcast_to(counts[:, None], (shape.sequences, 1 + shape.num_tokens)),
        mx.concatenate([of_tokens.reshape(-1, shape.sequences), last[None]]),
    )


def pick(logits: mx.array, found: mx.array, tokens: mx.array) -> mx.array:
    """Return `found` int32 [rows, columns] without its first column, and each row's next token.

    That is the most likely one; `tokens` int32 are those of the columns of `logits` [rows, n].
    """
    if pick_verdict(logits.dtype, logits.shape[1]) is not None:
        return _picked_by_mlx(logits, found, tokens)
    return _picked(logits, found, tokens)


def _picked_by_mlx(logits: mx.array, found: mx.array, tokens: mx.array) -> mx.array:
    best = tokens[mx.argmax(logits, axis=-1)][:, None]
    return mx.concatenate([found[:, 1:], best], axis=1)


def _picked(logits: mx.array, found: mx.array, tokens: mx.array) -> mx.array:
    vocab_size = logits.shape[1]
    simdgroups = logit_simdgroups(vocab_size)
    (out,) = launch.run(
        "pick",
        [logits, found, tokens],
        [("T", logits.dtype)],
        [
            ("V", vocab_size), ("VEC", vector_width(logits.dtype.size, vocab_size)),
            ("NSG", simdgroups), ("COLUMNS", found.shape[1]),
        ],
        threads=logits.shape[0] * simdgroups * 32,
        group=simdgroups * 32,
        shapes=[found.shape],
        dtypes=[mx.int32],
    )  # fmt: skip
    return out


def beside(parts: list[mx.array]) -> mx.array:
    """Return rows [n, dim] of arrays of one type side by side: [n, count * dim]."""
    if len(parts) != 3 or beside_verdict(parts[0].dtype) is not None:
        return mx.concatenate(parts, axis=-1)
    return _beside(*parts)


def _beside(a: mx.array, b: mx.array, c: mx.array) -> mx.array:
    rows, dim = a.shape
    vector = vector_width(a.dtype.size, dim)
    (out,) = launch.run(
        "beside", [a, b, c], [("T", a.dtype)], [("D", dim), ("VEC", vector)],
        threads=3 * rows * (dim // vector), group=256, shapes=[(rows, 3 * dim)], dtypes=[a.dtype],
    )  # fmt: skip
    return out


def norm_beside(
    table: mx.array,
    index: mx.array,
    hidden: mx.array,
    table_weight: mx.array,
    hidden_weight: mx.array,
    epsilon: float,
) -> mx.array:
    """Return [rows, 2 dim]: the RMS norm of rows of a table beside that of hidden states.

    The rows of `table` [n, dim] are those in the last column of `index` int32 [rows, columns].
    `hidden` is [rows, dim] in the table's type; the norms are times `table_weight` and
    `hidden_weight` [dim].
    """
    assert table.dtype == hidden.dtype, (table.dtype, hidden.dtype)
    rows, dim = hidden.shape
    vector = vector_width(hidden.dtype.size, dim)
    simdgroups = norm_simdgroups(dim, vector)
    threads = 32 * simdgroups
    (out,) = launch.run(
        "norm_beside",
        [table, index, hidden, table_weight, hidden_weight],
        [("T", hidden.dtype), ("W", table_weight.dtype)],
        [
            ("D", dim), ("VEC", vector), ("NSG", simdgroups), ("COLUMNS", index.shape[1]),
            ("EPSILON", launch.bits_of(epsilon)),
        ],
        threads=2 * rows * threads,
        group=threads,
        shapes=[(rows, 2 * dim)],
        dtypes=[hidden.dtype],
    )  # fmt: skip
    return out


def _compare_beside(dtype: mx.Dtype) -> str | None:
    parts = [mx.random.normal((5, 72), key=key).astype(dtype) for key in launch.random_keys(19, 3)]
    found, expected = _beside(*parts), mx.concatenate(parts, axis=-1)
    return None if mx.array_equal(found, expected).item() else "rows are not side by side"


#: None if the kernel of `beside` is right for a type, otherwise the problem.
beside_verdict = launch.Verdict(_compare_beside)


def _compare_places() -> str | None:
    shape = DraftShape(3, 5, 7, 4)
    ids = mx.arange(15, dtype=mx.int32).reshape(3, 5)
    proposed = mx.array([[0, 1, -2, -2, -2], [4, -2, -2, -2, -2], [10, 11, 12, 13, -2]], mx.int32)
    positions, tables = mx.arange(100, 130, dtype=mx.int32), mx.arange(200, 221, dtype=mx.int32)
    lengths = mx.array([300, 310, 320], mx.int32)
    numbers = mx.concatenate([positions, proposed.reshape(-1), tables, lengths])
    mx.eval(numbers)
    pairs = zip(_accepted(ids, numbers, shape), _accepted_by_mlx(ids, numbers, shape), strict=True)
    for name, (ours, expected) in zip(Places._fields, pairs, strict=True):
        if ours.tolist() != expected.tolist():
            return f"{name} is {ours.tolist()} instead of {expected.tolist()}"
    return None


#: None if the kernel of `accepted` is right, otherwise the problem.
accepted_verdict = launch.Verdict(_compare_places)


def _compare_picked(dtype: mx.Dtype, vocab_size: int) -> str | None:
    logits = mx.random.normal((3, vocab_size), key=mx.random.key(31))
    logits[1, vocab_size // 3 :: 5] = 99.0  # the first of equal ones
    logits = logits.astype(dtype)
    found = mx.arange(12, dtype=mx.int32).reshape(3, 4)
    tokens = 2 * mx.arange(vocab_size, dtype=mx.int32) + 1
    ours = _picked(logits, found, tokens)
    expected = _picked_by_mlx(logits, found, tokens)
    if ours.tolist() != expected.tolist():
        return f"tokens are {ours.tolist()} instead of {expected.tolist()}"
    return None


#: None if the kernel of `pick` is right for a type and number of logits, otherwise the problem.
pick_verdict = launch.Verdict(_compare_picked)


def _compare_norms(dtype: mx.Dtype) -> str | None:
    keys = launch.random_keys(17, 4)
    rows, dim = 3, 320
    table = mx.random.normal((7, dim), key=keys[0]).astype(dtype)
    hidden = (3 * mx.random.normal((rows, dim), key=keys[1])).astype(dtype)
    weights = [mx.random.uniform(0.5, 1.5, (dim,), key=key).astype(dtype) for key in keys[2:]]
    index = mx.array([[1, 6], [2, 0], [3, 2]], mx.int32)
    found = norm_beside(table, index, hidden, weights[0], weights[1], 1e-5)
    rows_of_table = mx.stack([table[row] for row in (6, 0, 2)])
    expected = mx.concatenate(
        [
            mx.fast.rms_norm(x.astype(mx.float32), by.astype(mx.float32), 1e-5)
            for x, by in ((rows_of_table, weights[0]), (hidden, weights[1]))
        ],
        axis=1,
    )
    return launch.difference({"norms": (found, expected)}, 1e-3 if dtype == mx.float32 else 3e-2)


#: None if the kernel of `norm_beside` is right for a type, otherwise the problem.
norm_verdict = launch.Verdict(_compare_norms)
