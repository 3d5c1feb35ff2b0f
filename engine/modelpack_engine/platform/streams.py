"""MLX's CPU streams for the threads of models, reused when a thread ends.

MLX starts a thread for each CPU stream and never ends it, so that a server which loads and unloads
models would collect threads until the system refuses new ones.
"""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from modelpack_engine.platform import blas

if TYPE_CHECKING:
    import mlx.core as mx

_log = logging.getLogger(__name__)

#: The streams that no thread uses.
_idle: list[mx.Stream] = []


class _Used(threading.local):
    """The streams that this thread uses; None in a thread without `reused_streams`."""

    streams: list[mx.Stream] | None = None


_used = _Used()


def cpu_stream() -> mx.Stream:
    """Return a CPU stream that nothing else in this thread uses."""
    import mlx.core as mx

    if _used.streams is None:
        return mx.new_stream(mx.cpu)
    try:
        stream = _idle.pop()
    except IndexError:
        # Any thread may use it, though only one at a time.
        stream = mx.new_thread_unsafe_stream(mx.cpu)
    _used.streams.append(stream)
    return stream


@contextmanager
def reused_streams() -> Iterator[None]:
    """Run a model's thread on CPU streams that later threads use again; free its memory at the end.

    The model must be unreachable by then, except from reference cycles.
    """
    blas.prepare()  # must run before MLX is imported
    import mlx.core as mx

    _used.streams = []
    mx.set_default_stream(cpu_stream())
    try:
        yield
    finally:
        gc.collect()  # a model has reference cycles
        try:
            _has_finished(None)
            _idle.extend(stream for stream in _used.streams if _has_finished(stream))
        finally:
            _used.streams = None
            mx.clear_cache()
            mx.clear_streams()  # of the GPU; otherwise MLX aborts the process at exit


def _has_finished(stream: mx.Stream | None) -> bool:
    """Wait for a stream, None for the default one; return False if it has an error.

    Such a stream is not used again.
    """
    import mlx.core as mx

    try:
        mx.synchronize(stream)
    except Exception:  # noqa: BLE001 - the memory of the others is freed
        _log.exception("a stream failed")
        return False
    return True
