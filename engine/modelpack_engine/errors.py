"""The engine's errors, part of Modelpack's tree of exceptions."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from modelpack.errors import ModelpackError

#: Seconds after which a request may be sent again if a queue was full or a model was not ready
#: (Retry-After).
RETRY_AFTER = 1.0


class EngineError(ModelpackError):
    """Any failure that the engine reports."""


class ModelLoadError(EngineError):
    """A model cannot be loaded: it is damaged, incomplete, or of an unknown architecture."""


class LoadCancelledError(EngineError):
    """A load was stopped because no request waits for the model any more."""


class OutOfMemoryError(EngineError):
    """The weights or the KV cache do not fit into the memory budget."""


class RequestError(EngineError, ValueError):
    """One request cannot be served; `param` names the invalid field, if there is one."""

    exit_code = 2

    def __init__(self, message: str, *, param: str | None = None, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.param = param


class ContextLengthError(RequestError):
    """A prompt is longer than the context of the model, or than the whole KV cache.

    `tokens` is the prompt's length, or a lower bound of it, if it is known.
    """

    tokens: int | None = None


class RetryLaterError(EngineError):
    """The client may retry after `retry_after` seconds."""

    exit_code = 7

    def __init__(self, message: str, *, retry_after: float, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.retry_after = retry_after


class QueueFullError(RetryLaterError):
    """A queue of waiting requests is full."""


class LoadingError(RetryLaterError):
    """The model is not ready yet."""


class BusyError(EngineError):
    """The model is in use: it cannot be unloaded or reconfigured now."""

    exit_code = 7


P = ParamSpec("P")
T = TypeVar("T")

#: Exceptions that end a program, a generator or a task; they are never converted.
_ENDINGS = (KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError)


def as_error(error: BaseException, what: str) -> Exception:
    """Return `error` if it is an Exception, otherwise an `EngineError`: "{what} failed: {error}".

    Raises `error` again if it ends a program or a task.
    """
    if isinstance(error, Exception):
        return error
    if isinstance(error, _ENDINGS):
        raise error
    return EngineError(f"{what} failed: {str(error)[:500] or type(error).__name__}")


def no_panics(what: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Make a function raise `EngineError`, naming `what`, if a Rust library panics."""

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
