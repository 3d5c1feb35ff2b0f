"""Counts and sizes as short text, in the number formats that Docker Model Runner writes.

Each format has its own units and rounding; other readers compare the text, so it is kept to the
letter. The names P, Z and S are ours.
"""

from __future__ import annotations

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
    """Return a GGUF parameter count in format P: `7.24B`, `134.52M`, `1K`, `999`."""
    return _largest_that_fits(count, _P_UNITS)


def format_gguf_size(size: int) -> str:
    """Return a GGUF size in format Z: `92.10MiB`, `1KB`. SI and IEC units both occur."""
    return _largest_that_fits(size, _Z_UNITS) + "B"


def format_decimal_parameters(count: int) -> str:
    """Return a safetensors parameter count in format S: `22.71M`, `7.00`."""
    return _divided_by_thousands(count, _S_PARAMETER_UNITS)


def format_decimal_size(size: int) -> str:
    """Return a safetensors or DDUF size in format S: `90.87MB`; `n/a` where there is none."""
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
