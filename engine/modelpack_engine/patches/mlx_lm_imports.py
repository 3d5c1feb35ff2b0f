"""The import of mlx-lm without transformers and without a lower limit of open files.

The engine needs the classes below `mlx_lm.models` only. `mlx_lm/__init__.py` imports all of mlx-lm,
and transformers with it: a second of CPU time, as much as loading a small model. So `prepare` puts
the package into `sys.modules` and runs its `__init__.py` at the first use of a name that it
defines; after that the package is an ordinary module again. `mlx_lm.utils` sets RLIMIT_NOFILE to
(2048, 4096) when it is imported: a server would run out of sockets, and a process cannot raise a
lowered hard limit again. Both can be removed when `import mlx_lm.models.llama` imports no
transformers and mlx-lm leaves the limit alone.
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
    """`mlx_lm` before its `__init__.py` has run; its submodules can be imported."""

    def __getattribute__(self, name: str) -> Any:
        value = ModuleType.__getattribute__(self, name)
        # `mlx_lm.generate` is a function, also if the submodule of that name is imported.
        if isinstance(value, ModuleType) and name != "models":
            _complete(self)
            value = ModuleType.__getattribute__(self, name)
        return value

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__version__":  # those that imports ask for
            raise AttributeError(f"module {_NAME!r} has no attribute {name!r}")
        _complete(self)
        try:
            return self.__dict__[name]
        except KeyError:
            raise AttributeError(f"module {_NAME!r} has no attribute {name!r}") from None


_completing = False


def _complete(package: ModuleType) -> None:
    """Run the package's `__init__.py` once; the thread that runs it sees the unfinished package."""
    global _completing
    with _lock:
        if type(package) is ModuleType or _completing:
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
    """Put the lean package into `sys.modules` unless mlx-lm is imported or not installed."""
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
    """Ignore changes of RLIMIT_NOFILE by this thread while it imports mlx-lm."""
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
