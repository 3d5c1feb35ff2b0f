"""Format values and sizes as Go does: the text in configs.

Go and Python trim, round and print some values differently, and the digest of a config depends on
every byte.
"""

from __future__ import annotations

import math
from typing import Any

#: The white space of Go's `unicode.IsSpace`. `str.strip()` would also remove U+001C to U+001F.
_SPACE = (
    "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000"
)


def trim(text: str) -> str:
    """Return `text` without white space at both ends, as Go's `strings.TrimSpace`."""
    return text.strip(_SPACE)


def fixed(number: float) -> str:
    """Return `number` with six decimals, as Go's `%f`."""
    return _special(number) or f"{number:.6f}"


def any_value(value: Any) -> str:
    """Return the text of Go's `%v` for a value decoded from JSON.

    Go decodes JSON numbers as 64-bit floats: a million is `1e+06`.
    """
    if value is None:
        return "<nil>"
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return _shortest(float(value))
    if isinstance(value, list):
        return "[" + " ".join(any_value(item) for item in value) + "]"
    if isinstance(value, dict):
        keys = sorted(value, key=lambda key: key.encode(errors="surrogateescape"))
        return "map[" + " ".join(f"{key}:{any_value(value[key])}" for key in keys) + "]"
    raise TypeError(f"{type(value).__name__} is not a JSON type")


def _shortest(number: float) -> str:
    """Return `number` as Go's `%g` with the fewest digits that identify it."""
    special = _special(number)
    if special:
        return special
    mantissa, _, exponent_text = f"{abs(number)!r}".partition("e")
    whole, _, fraction = mantissa.partition(".")
    digits = (whole + fraction).lstrip("0")
    point = len(digits) - len(fraction) + int(exponent_text or 0)
    digits = digits.rstrip("0")
    sign = "-" if math.copysign(1.0, number) < 0 else ""
    if not digits:
        return sign + "0"
    exponent = point - 1
    if exponent < -4 or exponent >= 6:
        tail = f".{digits[1:]}" if len(digits) > 1 else ""
        return f"{sign}{digits[0]}{tail}e{exponent:+03d}"
    if point <= 0:
        return f"{sign}0.{'0' * -point}{digits}"
    if point >= len(digits):
        return sign + digits + "0" * (point - len(digits))
    return f"{sign}{digits[:point]}.{digits[point:]}"


def _special(number: float) -> str:
    if math.isnan(number):
        return "NaN"
    if math.isinf(number):
        return "+Inf" if number > 0 else "-Inf"
    return ""


_P_UNITS = ((1e15, "Q"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))
_Z_UNITS = (
    (2.0**50, "Pi"),
    (1e15, "P"),
    (2.0**40, "Ti"),
    (1e12, "T"),
    (2.0**30, "Gi"),
    (1e9, "G"),
    (2.0**20, "Mi"),
    (1e6, "M"),
    (2.0**10, "Ki"),
    (1e3, "K"),
)
_S_PARAMETER_UNITS = ("", "K", "M", "B", "T")
_S_SIZE_UNITS = ("B", "kB", "MB", "GB", "TB", "PB", "EB")


def format_parameters(count: int) -> str:
    """Return a GGUF parameter count in format P of spec/config.md: `7.24B`, `1K`, `999`."""
    return _largest_that_fits(count, _P_UNITS)


def format_gguf_size(size: int) -> str:
    """Return a GGUF size in format Z of spec/config.md: `92.10MiB`, `1KB` (SI or IEC units)."""
    return _largest_that_fits(size, _Z_UNITS) + "B"


def format_decimal_parameters(count: int) -> str:
    """Return a safetensors parameter count in format S of spec/config.md: `22.71M`, `7.00`."""
    return _divided_by_thousands(count, _S_PARAMETER_UNITS)


def format_decimal_size(size: int) -> str:
    """Return a safetensors or DDUF size in format S of spec/config.md: `90.87MB`, or `n/a`."""
    return _divided_by_thousands(size, _S_SIZE_UNITS) if size > 0 else "n/a"


def _largest_that_fits(number: int, units: tuple[tuple[float, str], ...]) -> str:
    value = float(number)
    base, unit = next(((base, unit) for base, unit in units if value >= base), (1.0, ""))
    return f"{value / base:.2f}".removesuffix(".00") + unit


def _divided_by_thousands(number: int, units: tuple[str, ...]) -> str:
    value, step = float(number), 0
    while value >= 1000 and step < len(units) - 1:
        value /= 1000
        step += 1
    return f"{value:.2f}{units[step]}"
