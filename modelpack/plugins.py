"""What other packages add to the toolkit: commands and functions, found by their entry points.

The serving side registers its commands and what the toolkit needs of the engine, so that nothing in
`modelpack` imports the engine. Source: the entry points specification of the Python Packaging
Authority.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

#: Entry points of this group are click commands, named as they are typed.
COMMANDS = "modelpack.commands"
#: Entry points of this group are functions that `load_function` returns.
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

    for point in entry_points(group=group, name=name):
        return point.load()
    return None
