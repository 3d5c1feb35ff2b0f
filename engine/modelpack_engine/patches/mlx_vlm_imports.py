"""The import of mlx-vlm's model classes without the rest of mlx-vlm.

`mlx_vlm/__init__.py` imports its generator, server and converters, which need datasets, OpenCV and
mlx-audio: several hundred megabytes that no model class uses. So `prepare` puts the package into
`sys.modules` and never runs its `__init__.py`; as that would, it tells transformers, which the
processors use, not to warn that there is no PyTorch. This can be removed when `import
mlx_vlm.models.llava` imports none of them.

Packages of models import their processors, and transformers with them: half a second of CPU time.
Where only transformers is to know the processor, its module runs when something in it is used.
`import_processors` imports transformers' image processors meanwhile.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_NAME = "mlx_vlm"
_PROCESSOR = re.compile(r"mlx_vlm\.models\.\w+\.processing_\w+")
_lock = threading.Lock()
_imports: threading.Thread | None = None


def is_installed() -> bool:
    """Return whether mlx-vlm and Pillow, the extra `vision`, are installed."""
    return all(importlib.util.find_spec(name) is not None for name in (_NAME, "PIL"))


def prepare() -> None:
    """Put the bare package into `sys.modules`, unless mlx-vlm is imported or not installed.

    Waits for `import_processors`: transformers puts another module in its place in `sys.modules`,
    and a thread that imports it meanwhile would get the first.
    """
    with _lock:
        imports = _imports
    if imports is not None:
        imports.join()
    with _lock:
        if _NAME in sys.modules:
            return
        spec = importlib.util.find_spec(_NAME)
        if spec is not None:
            os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
            sys.modules[_NAME] = importlib.util.module_from_spec(spec)
            sys.meta_path.insert(0, _Processors())


def import_processors() -> None:
    """Import transformers' image processors in a thread, while weights are read.

    Call `prepare` before using them. Who then imports them gets the error if this failed.
    """
    global _imports

    def run() -> None:
        with suppress(Exception):
            importlib.import_module("transformers.models.auto.image_processing_auto")

    with _lock:
        if _imports is None:
            thread = threading.Thread(target=run, name="modelpack-imports", daemon=True)
            thread.start()
            _imports = thread


class _Processor(ModuleType):
    """A module that runs when something in it is used first.

    `importlib.util.LazyLoader` gives a second thread the module before it has run, until Python
    3.11.9 and 3.12.3.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # those that imports ask for
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        with self.__dict__["__lock"]:  # of another thread, until the module has run
            if type(self) is _Processor and not self.__dict__.get("__runs"):
                self.__dict__["__runs"] = True
                try:
                    spec = self.__spec__
                    assert spec is not None
                    spec.loader_state.exec_module(self)
                    module: ModuleType = self
                    module.__class__ = ModuleType
                finally:
                    self.__dict__["__runs"] = False
        try:
            return self.__dict__[name]
        except KeyError:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}") from None


class _Later(Loader):
    """Makes a `_Processor`; its loader is the spec's `loader_state`."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        made = _Processor(spec.name)
        made.__dict__["__lock"] = threading.RLock()
        return made

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing yet."""


class _Processors(MetaPathFinder):
    """Finds the modules of processors, which are to run later."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if _PROCESSOR.fullmatch(fullname) is None:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader, spec.loader_state = _Later(), spec.loader
        return spec
