"""A second stream of the CPU, for work that divides in two.

MLX runs the operations of a CPU stream one after the other, in one thread. What may run beside them
goes to a stream of its own.
"""

from __future__ import annotations

import os

import mlx.core as mx


def usable_processors() -> int:
    """Return how many processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def second_stream() -> mx.Stream | None:
    """Return a new stream of the calling thread, None where there is no processor for it."""
    return mx.new_stream(mx.cpu) if usable_processors() > 1 else None
