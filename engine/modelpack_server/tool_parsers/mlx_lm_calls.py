"""mlx-lm's own tool parsers, for the formats that have no reader here.

They parse finished blocks, so nothing streams before a block is closed. Their modules are read from
where mlx-lm is installed without importing `mlx_lm` itself, which would load MLX and transformers.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modelpack_server.tool_parsers.calls import Found
from modelpack_server.tool_parsers.source import NotACall, Reading, Source, stops

_MAX_BLOCK = 1 << 15  # characters; their regular expressions take quadratic time at worst
_PACKAGE = "modelpack_server.tool_parsers._mlx_lm_tool_parsers"


@functools.cache
def tool_parser(name: str) -> types.ModuleType | None:
    """Return mlx-lm's parser module of this name; None if mlx-lm does not have it (any more)."""
    try:
        installed = importlib.util.find_spec("mlx_lm")
    except ValueError:  # somebody put a module in its place
        return None
    if installed is None or not installed.submodule_search_locations:
        return None
    folder = Path(installed.submodule_search_locations[0]) / "tool_parsers"
    if _PACKAGE not in sys.modules:  # a package without code, for their imports of one another
        package = types.ModuleType(_PACKAGE)
        package.__path__ = [str(folder)]
        sys.modules[_PACKAGE] = package
    try:
        return importlib.import_module(f"{_PACKAGE}.{name}")
    except Exception:  # noqa: BLE001 - foreign code, and a format less is no reason to fail
        return None


def read_mlx_lm_block(parser: str, closing: str, source: Source, found: Found) -> Reading[None]:
    """Read a block up to `closing`, and have mlx-lm's parser take it apart."""
    text, _ = yield from source.until(stops(closing), _MAX_BLOCK)
    module = tool_parser(parser)
    if module is None:
        raise NotACall
    tools = [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                "description": tool.description,
                "parameters": dict(tool.parameters),
            },
        }
        for tool in found.tools.values()
    ]
    try:
        parsed = module.parse_tool_call(text, tools)
    except Exception:  # noqa: BLE001 - foreign code: whatever it raises, this is not a call
        raise NotACall from None
    calls = parsed if isinstance(parsed, list) else [parsed]
    for call in calls:
        _check(call, found)
    for call in calls:
        found.whole(call["name"], call["arguments"], call.get("id"))


def _check(call: Any, found: Found) -> None:
    if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
        raise NotACall
    if not isinstance(call.get("arguments"), Mapping):
        raise NotACall
    found.known(call["name"])
