"""MLX's CPU streams for the threads of models, reused when a thread ends.

MLX starts a thread for each CPU stream and never ends it, so that a server which loads and unloads
models would collect threads until the system refuses new ones.
"""

from __future__ import annotations

import gc
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from modelpack_engine.platform import blas

if TYPE_CHECKING:
    import mlx.core as mx

_log = logging.getLogger(__name__)

# Seconds to wait for another thread's garbage collection. It may itself wait for this thread: a
# caller's `__del__` may close the engine.
_COLLECTION = 5.0
# Collections after which a model that is still in use counts as kept for longer.
_TRIES = 3
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
def reused_streams() -> Iterator[Callable[[object], None]]:
    """Run a model's thread on CPU streams that later threads use again; free its memory at the end.

    It yields a function that is to be called with the model. At the end, the model must be
    unreachable, except from reference cycles and, for moments, from other threads.

    MLX keeps what it has compiled for each thread. A thread that frees a compiled function removes
    it there, and holds the interpreter's lock while it waits for access. `clear_streams` clears it
    all, and waits for the interpreter's lock meanwhile. So it must not run while other threads
    free the model's functions, or both threads wait forever (MLX 0.32.4).
    """
    blas.prepare()  # must run before MLX is imported
    import mlx.core as mx

    models: list[weakref.ref[object]] = []
    _used.streams = []
    mx.set_default_stream(cpu_stream())
    try:
        yield lambda model: models.append(weakref.ref(model))
    finally:
        is_freed = _collect(models)
        try:
            _has_finished(None)
            _idle.extend(stream for stream in _used.streams if _has_finished(stream))
        finally:
            _used.streams = None
            mx.clear_cache()
            if is_freed:
                mx.clear_streams()  # of the GPU; otherwise MLX aborts the process at exit
            else:
                _log.warning("MLX's streams are left: a garbage collection takes too long")


def _collect(models: list[weakref.ref[object]]) -> bool:
    """Free the models, which have reference cycles; return False if that cannot be known.

    `gc.collect` does nothing while another thread collects, and then it is tried again.
    """
    own, collected = threading.get_ident(), False

    def note(phase: str, info: dict[str, Any]) -> None:
        nonlocal collected
        if phase == "stop" and info["generation"] == 2 and threading.get_ident() == own:
            collected = True

    until, tries = time.monotonic() + _COLLECTION, 0
    gc.callbacks.append(note)
    try:
        while True:
            collected = False
            gc.collect()
            tries += collected
            if collected and (tries == _TRIES or all(model() is None for model in models)):
                return True
            if time.monotonic() > until:
                return False
            time.sleep(0.001)
    finally:
        gc.callbacks.remove(note)


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
