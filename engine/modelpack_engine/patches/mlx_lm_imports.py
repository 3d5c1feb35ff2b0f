"""The import of mlx-lm without transformers and without a lower limit of open files.

The engine needs the classes below `mlx_lm.models`, and the loader in `mlx_lm.utils`.
`mlx_lm/__init__.py` imports all of mlx-lm, and transformers with it: a second of CPU time, as much
as loading a small model. So `prepare` puts the package into `sys.modules` and runs its
`__init__.py` at the first use of a name that it defines; after that the package is an ordinary
module again. `mlx_lm.utils` imports transformers for tokenizers, which the engine has its own of:
`utils` lets it import a stand-in for `mlx_lm.tokenizer_utils`, which imports the module when a
tokenizer is loaded. `mlx_lm.utils` also sets RLIMIT_NOFILE to (2048, 4096) when it is imported: a
server would run out of sockets, and a process cannot raise a lowered hard limit again. All of this
can be removed when `import mlx_lm.utils` imports no transformers and leaves the limit alone.
"""

from __future__ import annotations

import importlib
import importlib.util
import resource
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

_NAME = "mlx_lm"
_UTILS, _TOKENIZERS = f"{_NAME}.utils", f"{_NAME}.tokenizer_utils"
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
            _use_tokenizers()
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


def utils() -> Any:
    """Return the module `mlx_lm.utils`."""
    with _lock, kept_file_limit():
        if _UTILS in sys.modules or _TOKENIZERS in sys.modules:
            return importlib.import_module(_UTILS)
        sys.modules[_TOKENIZERS] = stand_in = ModuleType(_TOKENIZERS)
        stand_in.__dict__.update(TokenizerWrapper=_Tokenizer, load=_load_tokenizer)
        stand_in.__dict__["__getattr__"] = _real
        try:
            return importlib.import_module(_UTILS)
        finally:
            del sys.modules[_TOKENIZERS]


class _Tokenizer:
    """Stands for `TokenizerWrapper` in annotations."""


def _real(name: str) -> Any:
    """Return another name, for a thread that has imported the stand-in meanwhile."""
    if name.startswith("__"):  # those that imports ask for
        raise AttributeError(f"module {_TOKENIZERS!r} has no attribute {name!r}")
    return getattr(_use_tokenizers(), name)


def _load_tokenizer(*args: Any, **kwargs: Any) -> Any:
    return _use_tokenizers().load(*args, **kwargs)


def _use_tokenizers() -> Any:
    """Put the names of `mlx_lm.tokenizer_utils` into `mlx_lm.utils`; return the module."""
    with _lock:
        used, found = importlib.import_module(_UTILS), importlib.import_module(_TOKENIZERS)
        used.__dict__.update(TokenizerWrapper=found.TokenizerWrapper, _load_tokenizer=found.load)
        return found


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
