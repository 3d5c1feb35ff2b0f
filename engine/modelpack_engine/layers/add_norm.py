"""Residual sums of a step, deferred so that the kernel of the following RMSNorm computes them.

A block's `x + r` is usually read only by a norm and by the next sum. It stays an unevaluated MLX
array, and the norm's kernel (`add_norm`) computes it together with the norm. `r` may also be the
partial sums of a matmul. The norm of a single row is deferred, too: the kernel of the matmul that
reads it computes all three. Norms and SwiGLU of more rows are computed in the order in which a
matmul reads them (`packed_wide`), and not in rows if nothing else reads these.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import mlx.core as mx

from modelpack_engine.layers import adapters, kernels
from modelpack_engine.layers.adapters import RowAdapters
from modelpack_engine.layers.dots import Normed
from modelpack_engine.layers.matmul import (
    Arranged,
    Parts,
    multiply,
    multiply_in_parts,
    multiply_normed,
    swiglu,
    swiglu_in_order,
)
from modelpack_engine.layers.weights import Weights


@dataclass(slots=True)
class _Sum:
    """`total` is `a` + the sum of `parts`; `made` is the equal array that a kernel computed.

    With `adapted`, the parts are the sum of other parts and of what adapters add to these.
    """

    total: mx.array
    a: mx.array
    parts: Parts
    adapted: tuple[Parts, RowAdapters] | None = None
    made: mx.array | None = None


class Sums:
    """The sums of the current step, by the identity of their result."""

    def __init__(self) -> None:
        self._sums: dict[int, _Sum] = {}
        self._parts: dict[int, tuple[mx.array, Parts, tuple[Parts, RowAdapters] | None]] = {}
        self._normed: dict[int, tuple[mx.array, mx.array, Normed]] = {}
        self._arranged: dict[int, tuple[mx.array, Arranged]] = {}

    def of_parts(self, parts: Parts, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
        """Return the sum of `parts` in this shape and type, and record its parts."""
        total = parts.array if parts.count == 1 else parts.array.sum(axis=0)
        total = total.astype(dtype).reshape(shape)
        self._parts[id(total)] = total, parts, None
        return total

    def of_adapted(
        self, parts: Parts, rows: RowAdapters, shape: tuple[int, ...], dtype: mx.Dtype
    ) -> mx.array:
        """Return the sum of `parts` and of what adapters add, and record both."""
        whole = Parts(adapters.add(parts, rows), 1)
        total = self.of_parts(whole, shape, dtype)
        self._parts[id(total)] = total, whole, (parts, rows)
        return total

    def add(self, a: mx.array, b: mx.array) -> mx.array:
        """Return a + b, and record its terms."""
        a = self.value(a)
        total = a + b
        _, parts, adapted = self._parts.get(id(b), (b, Parts(b, 1), None))
        self._sums[id(total)] = _Sum(total, a, parts, adapted)
        return total

    def take(self, array: mx.array, rows: mx.array) -> mx.array:
        """Return the rows `rows` (int32 [n]) of `array`; for a sum of parts, those of the parts."""
        known = self._parts.get(id(array))
        if known is None:
            whole = self.value(array)
            taken = kernels.take_rows(whole.reshape(whole.shape[0], -1), rows)
            return taken.reshape(rows.shape[0], *whole.shape[1:])
        parts = known[1]
        taken = kernels.take_rows(parts.array, rows)
        shape = (rows.shape[0], *array.shape[1:])
        return self.of_parts(Parts(taken, parts.count), shape, array.dtype)

    def parts(self, array: mx.array) -> Parts:
        """Return the parts whose sum an array is: itself, if they are unknown."""
        known = self._parts.get(id(array))
        return Parts(array, 1) if known is None else known[1]

    def terms(self, total: mx.array) -> tuple[mx.array, Parts] | None:
        """Return the terms of a sum, `a` and its parts; None if unknown or already computed."""
        known = self._sums.get(id(total))
        return None if known is None or known.made is not None else (known.a, known.parts)

    def value(self, array: mx.array) -> mx.array:
        """Return `array`, or the equal array that a kernel has computed."""
        known = self._sums.get(id(array))
        return array if known is None or known.made is None else known.made

    def set_made(self, total: mx.array, made: mx.array) -> None:
        """Record that a kernel has computed `total` as `made`."""
        self._sums[id(total)].made = made

    def norm(self, total: mx.array, weight: mx.array, epsilon: float) -> mx.array | None:
        """Return the RMS norm of a sum, or of other rows [rows, 1, dim], times `weight`.

        None if the sum was computed before.
        """
        if id(total) not in self._sums:  # the input of the first layer
            if total.ndim != 3 or total.shape[1] != 1 or weight.dtype != total.dtype:
                return None
            return kernels.add_norm(total, total, 0, weight, epsilon)[1]
        terms = self.terms(total)
        if terms is None or terms[0].dtype != total.dtype:
            return None
        a, parts = terms
        adapted = self._sums[id(total)].adapted
        if adapted is not None and adapted[1].takes_norm(a.dtype):
            made, out = adapters.add_norm(a, *adapted, weight, epsilon)
        else:
            made, out = kernels.add_norm(a, parts.array, parts.count, weight, epsilon)
        self.set_made(total, made)
        if a.size == a.shape[-1]:
            row = Normed(a, parts.array, parts.count, weight, epsilon)
            self._normed[id(out)] = out, total, row
        elif adapted is None:
            known = self._sums[id(total)]

            @cache
            def arranged(bits: int) -> mx.array:
                known.made, in_order = kernels.add_norm(
                    a, parts.array, parts.count, weight, epsilon, arranged=bits
                )
                return in_order

            self._arranged[id(out)] = out, arranged
        return out

    def multiply(self, x: mx.array, weights: Weights, *, in_rows: bool = False) -> Parts:
        """Return the partial sums of rows x [rows, ...] times the weights.

        With `in_rows`, something else reads x, so that it is computed in rows in any case.
        """
        product = self._multiply_normed(x, weights, gated=False)
        if product is not None:
            return Parts(product, 1)
        return multiply_in_parts(x, weights, None if in_rows else self._in_order(x))

    def _in_order(self, x: mx.array) -> Arranged | None:
        """Return what computes rows x in the order of `packed_wide`; None if nothing does."""
        known = self._arranged.get(id(x))
        return None if known is None else known[1]

    def whole(self, x: mx.array, weights: Weights) -> mx.array:
        """Return rows x [rows, ...] times the weights, [rows, outputs] in x's type."""
        product = self._multiply_normed(x, weights, gated=False)
        if product is not None:
            return product.astype(x.dtype)
        return multiply(x.reshape(x.shape[0], -1), weights, self._in_order(x))

    def swiglu(self, x: mx.array, weights: Weights) -> mx.array:
        """Return silu(gate) * up [rows, n] for rows x [rows, ...] and joint weights [2 n, in]."""
        product = None
        if weights.num_outputs % 2 == 0:
            product = self._multiply_normed(x, weights, gated=True)
        if product is not None:
            return product
        given = self._in_order(x)
        found = swiglu(x, weights, given)
        in_order = swiglu_in_order(x, weights, given)
        if in_order is not None:
            self._arranged[id(found)] = found, in_order
        return found

    def _multiply_normed(self, x: mx.array, weights: Weights, *, gated: bool) -> mx.array | None:
        """Compute a sum, its norm `x` and the product in one kernel; None if that is impossible."""
        known = self._normed.get(id(x))
        if known is None:
            return None
        _, total, row = known
        found = multiply_normed(row, weights, swiglu=gated)
        if found is None:
            return None
        product, made = found
        self.set_made(total, made)
        return product

    def clear(self) -> None:
        """Forget all sums: identities are reused once their arrays are freed."""
        self._sums.clear()
        self._parts.clear()
        self._normed.clear()
        self._arranged.clear()
