"""How long a model stays loaded after its last use, as clients write it."""

from __future__ import annotations

import math
import re

from modelpack.errors import UsageError

#: Seconds.
DEFAULT_KEEP_ALIVE = 300.0
FOREVER = math.inf
# Seconds, about what a Go duration can hold: as long as for ever, and a date can still be told.
_LONGEST = 250 * 365 * 86400

_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PIECE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)")


def parse_keep_alive(value: str | float) -> float:
    """Return seconds: of a number, of a text that is one, or of a Go duration ("5m", "1h30m").

    Negative, or hundreds of years, is for ever (`math.inf`), 0 not at all. Raises `UsageError`.
    """
    if isinstance(value, (int, float)):
        if isinstance(value, float) and math.isnan(value):
            raise UsageError("keep_alive is not a number")
        return FOREVER if value < 0 or value > _LONGEST else float(value)
    text = value.strip()
    try:
        return parse_keep_alive(float(text))
    except ValueError:
        pass
    sign, rest = ("-", text[1:]) if text.startswith("-") else ("", text.removeprefix("+"))
    pieces = _PIECE.findall(rest)
    if not pieces or "".join(number + unit for number, unit in pieces) != rest:
        raise UsageError(f"keep_alive is {value!r}, expected seconds or a duration like 5m")
    seconds = sum(float(number) * _UNITS[unit] for number, unit in pieces)
    return parse_keep_alive(-1 if sign else seconds)


def show_keep_alive(seconds: float) -> str:
    """Return the seconds as a Go duration; "-1" for ever."""
    if seconds == FOREVER:
        return "-1"
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(int(minutes), 60)
    shown = f"{rest:g}s"
    if hours:
        return f"{hours}h{minutes}m{shown}"
    return f"{minutes}m{shown}" if minutes else shown
