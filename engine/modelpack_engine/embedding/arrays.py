"""A batch of inputs as MLX's arrays."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import mlx.core as mx

from modelpack_engine.embedding.inputs import Prepared


def as_arrays(batch: Sequence[Prepared]) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Return ids and types int32 [texts, tokens], filled up with 0; lengths and skipped [texts]."""
    longest = max(map(len, batch))

    def filled(rows: Iterable[tuple[int, ...]]) -> mx.array:
        return mx.array([[*row, *[0] * (longest - len(row))] for row in rows], mx.int32)

    return (
        filled(each.token_ids for each in batch),
        filled(each.type_ids for each in batch),
        mx.array([len(each) for each in batch], mx.int32),
        mx.array([each.skipped for each in batch], mx.int32),
    )
