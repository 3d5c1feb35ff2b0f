"""Recurrence: what recurrent layers of mlx-lm compute, where mlx-lm has no kernel for it.

Its state spaces and delta rules are Metal kernels, and on other devices long chains of operations:
one a token for the delta rule, and products of single vectors, thousands a layer, for state spaces.
`install` puts other ways to the same results in their place, for what runs `in_use`.
"""

from modelpack_engine.recurrence.installing import in_use as in_use
from modelpack_engine.recurrence.installing import install as install
