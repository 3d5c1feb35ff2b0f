"""Load commands and functions that other packages register as entry points.

`modelpack_server` and `modelpack_engine` register their commands and functions here, so that no
module of `modelpack` imports them. Source: the entry points specification of the Python Packaging
Authority.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

#: The group of entry points that are click commands; their names are those of the commands.
COMMANDS = "modelpack.commands"
#: The group of entry points that `load_function` returns.
FUNCTIONS = "modelpack.functions"


def command_names() -> list[str]:
    """Return the names of the registered commands, sorted."""
    from importlib.metadata import entry_points

    return sorted(entry_points(group=COMMANDS).names)


def load_command(name: str) -> Any | None:
    """Return the registered command `name`, or None."""
    return _load(COMMANDS, name)


def load_function(name: str) -> Callable[..., Any] | None:
    """Return the registered function `name`, or None.

    Raises `ModuleNotFoundError` if its module needs a package that is not installed.
    """
    function: Callable[..., Any] | None = _load(FUNCTIONS, name)
    return function


def _load(group: str, name: str) -> Any | None:
    from importlib.metadata import entry_points

    return next((point.load() for point in entry_points(group=group, name=name)), None)
