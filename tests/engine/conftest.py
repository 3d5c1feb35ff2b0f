"""All tests of the engine compute with the BLAS that users get; it has to come before MLX."""

from __future__ import annotations

from modelpack_engine import blas

blas.prepare()
