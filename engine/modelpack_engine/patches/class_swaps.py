"""ClassSwaps: replace methods of single modules of a model, and restore their classes.

The instance gets a subclass of its class; its weights and parameter names stay. Swaps are undone
when a model fails in the tier that they were made for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.nn as nn

Call = Callable[..., Any]


class ClassSwaps:
    """The swaps of one model, in the order in which they were made."""

    def __init__(self) -> None:
        self._made: list[tuple[nn.Module, type[nn.Module]]] = []

    def override(self, module: nn.Module, call: Call, method: str = "__call__") -> None:
        """Replace `method` of this instance by `call(original, module, *args, **kwargs)`.

        `original` is the replaced method, as a function of the instance.
        """
        kind = type(module)
        original = getattr(kind, method)

        def replaced(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return call(original, self, *args, **kwargs)

        self._made.append((module, kind))
        module.__class__ = type(kind.__name__, (kind,), {method: replaced})

    def undo(self) -> None:
        """Restore the class of every module."""
        while self._made:
            module, original = self._made.pop()
            module.__class__ = original
