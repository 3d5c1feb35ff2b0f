"""mlx-lm without what its import brings along: transformers, and a lower limit of open files.

The engine needs the classes below `mlx_lm.models`. `mlx_lm/__init__.py` imports the whole of
mlx-lm, and transformers with it: a second of processor time, as much as loading a small model. So
the package is put in place first and its `__init__.py` is run when somebody asks for what it
defines. `mlx_lm.utils` sets RLIMIT_NOFILE to (2048, 4096) as it is imported: a server would run
out of sockets, and a lowered hard limit cannot be raised again.
"""

from __future__ import annotations

import importlib.util
import resource
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

_NAME = "mlx_lm"
_lock = threading.RLock()


class _LeanPackage(ModuleType):
    """`mlx_lm` before its `__init__.py` has run. Submodules can be imported already."""

    def __getattribute__(self, name: str) -> Any:
        value = ModuleType.__getattribute__(self, name)
        # `mlx_lm.generate` is a function in the end, whatever was imported before.
        if isinstance(value, ModuleType) and name != "models":
            _complete(self)
            value = ModuleType.__getattribute__(self, name)
        return value

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {_NAME!r} has no attribute {name!r}")
        _complete(self)
        try:
            return self.__dict__[name]
        except KeyError:
            raise AttributeError(f"module {_NAME!r} has no attribute {name!r}") from None


_completing = False


def _complete(package: ModuleType) -> None:
    """Run the package's own code, once; the thread that runs it sees it as it is."""
    global _completing
    with _lock:
        was_completed = type(package) is ModuleType
        if was_completed or _completing:
            return
        _completing = True
        try:
            spec = package.__spec__
            assert spec is not None
            assert spec.loader is not None
            with kept_file_limit():
                spec.loader.exec_module(package)
            package.__class__ = ModuleType
        finally:
            _completing = False


def prepare() -> None:
    """Put the lean package in place, unless mlx-lm was imported already or is not installed."""
    with _lock:
        if _NAME in sys.modules:
            return
        spec = importlib.util.find_spec(_NAME)
        if spec is None or spec.loader is None:
            return
        package = importlib.util.module_from_spec(spec)
        package.__class__ = _LeanPackage
        sys.modules[_NAME] = package


@contextmanager
def kept_file_limit() -> Iterator[None]:
    """Import mlx-lm in this context: this thread's changes of RLIMIT_NOFILE are passed over."""
    with _lock:
        own, setrlimit = threading.get_ident(), resource.setrlimit

        def guarded(which: int, limits: tuple[int, int], /) -> None:
            if which != resource.RLIMIT_NOFILE or threading.get_ident() != own:
                setrlimit(which, limits)

        resource.setrlimit = guarded
        try:
            yield
        finally:
            resource.setrlimit = setrlimit
