"""ClassSwaps: let one module answer calls differently, and take that back.

The instance gets a subclass of its class. Its contents (weights, parameter names) stay where they
are. Swaps are undone when a model turns out not to run in the tier that they were made for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.nn as nn

Call = Callable[..., Any]


class ClassSwaps:
    """Swaps of one model, in the order they were made."""

    def __init__(self) -> None:
        self._made: list[tuple[nn.Module, type[nn.Module]]] = []

    def override(self, module: nn.Module, call: Call, method: str = "__call__") -> None:
        """Let `call(original, module, *args, **kwargs)` answer `method` of this instance.

        `original` is what the method was, as a function of the instance.
        """
        kind = type(module)
        original = getattr(kind, method)

        def replaced(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return call(original, self, *args, **kwargs)

        self._made.append((module, kind))
        module.__class__ = type(kind.__name__, (kind,), {method: replaced})

    def undo(self) -> None:
        """Give every module its first class back."""
        while self._made:
            module, original = self._made.pop()
            module.__class__ = original
