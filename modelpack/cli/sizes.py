"""Numbers of bytes, as people type them."""

from __future__ import annotations

import re
from typing import Any

import click

from modelpack.errors import UsageError

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Return bytes of a size like 24GiB, 8G (1000s) or a bare number; raises `UsageError`."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise UsageError(f"{text!r} is no size", hint="like 24GiB")
    number, unit, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** " kmgt".index(unit.lower() or " "))


class _Size(click.ParamType[int]):
    """A number of bytes, like 64MiB, 10MB or 4096."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            size = parse_size(value)
        except UsageError as error:
            self.fail(error.message, param, ctx)
        if size < 1:
            self.fail(f"{value!r} is nothing", param, ctx)
        return size


SIZE = _Size()
