"""Sums: residual sums of a step, deferred so that the following RMSNorm computes them.

A block's `x + r` is usually read only by a norm and by the next sum. It stays an unevaluated node,
and the norm's kernel computes it together with its own result. `r` may also stand for the partial
sums of a matmul.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from modelpack_engine.layers import kernels
from modelpack_engine.layers.matmul import Parts


@dataclass(slots=True)
class _Sum:
    """`total` = `a` + the sum of `parts`; `made` is the same, by a kernel."""

    total: mx.array
    a: mx.array
    parts: Parts
    made: mx.array | None = None


class Sums:
    """What has been summed in this step, by the identity of the result."""

    def __init__(self) -> None:
        self._sums: dict[int, _Sum] = {}
        self._parts: dict[int, tuple[mx.array, Parts]] = {}

    def of_parts(self, parts: Parts, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
        """Return the sum of `parts` in this shape and type, and remember them."""
        total = parts.array if parts.count == 1 else parts.array.sum(axis=0)
        total = total.astype(dtype).reshape(shape)
        self._parts[id(total)] = total, parts
        return total

    def add(self, a: mx.array, b: mx.array) -> mx.array:
        """Return a + b, and remember of what it was made."""
        a = self.value(a)
        total = a + b
        known = self._parts.get(id(b))
        parts = Parts(b, 1) if known is None else known[1]
        self._sums[id(total)] = _Sum(total, a, parts)
        return total

    def take(self, array: mx.array, rows: mx.array) -> mx.array:
        """Return rows int32 [n] of `array`; where it is a sum of parts, of these."""
        known = self._parts.get(id(array))
        if known is None:
            whole = self.value(array)
            taken = kernels.take_rows(whole.reshape(whole.shape[0], -1), rows)
            return taken.reshape(rows.shape[0], *whole.shape[1:])
        parts = known[1]
        few = parts.count > 1
        taken = parts.array[:, rows] if few else kernels.take_rows(parts.array, rows)
        shape = (rows.shape[0], *array.shape[1:])
        return self.of_parts(Parts(taken, parts.count), shape, array.dtype)

    def terms(self, total: mx.array) -> tuple[mx.array, Parts] | None:
        """Return a and the parts of what was summed, unless it has been made already."""
        known = self._sums.get(id(total))
        return None if known is None or known.made is not None else (known.a, known.parts)

    def value(self, array: mx.array) -> mx.array:
        """Return `array`, or the same as a kernel made it."""
        known = self._sums.get(id(array))
        return array if known is None or known.made is None else known.made

    def set_made(self, total: mx.array, made: mx.array) -> None:
        """Note that a kernel has made `total`."""
        self._sums[id(total)].made = made

    def clear(self) -> None:
        """Forget all; identities mean nothing once arrays are gone."""
        self._sums.clear()
        self._parts.clear()
