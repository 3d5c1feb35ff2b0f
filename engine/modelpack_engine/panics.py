"""Panics of Rust libraries (tokenizers, llguidance) become our errors.

They derive from BaseException, so `except Exception` lets them pass, and whoever waits for the
result of a thread or a task would wait for ever.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from modelpack_engine.errors import EngineError

P = ParamSpec("P")
T = TypeVar("T")

#: What ends a program, a generator or a task: never turned into an error.
_ENDINGS = (KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError)


def as_error(error: BaseException, what: str) -> Exception:
    """Return `error` if it is an Exception, else an `EngineError` that says that `what` failed.

    Raises `error` again if it ends a program or a task.
    """
    if isinstance(error, Exception):
        return error
    if isinstance(error, _ENDINGS):
        raise error
    return EngineError(f"{what} failed: {str(error)[:500] or type(error).__name__}")


def no_panics(what: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Make a function raise `EngineError`, naming `what`, where a Rust library panics."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
            try:
                return function(*args, **kwargs)
            except Exception:
                raise
            except BaseException as error:
                raise as_error(error, what) from error

        return guarded

    return decorate
