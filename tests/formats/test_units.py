from __future__ import annotations

import pytest

from modelpack.formats.units import (
    format_decimal_parameters,
    format_decimal_size,
    format_gguf_size,
    format_parameters,
)

# Number, then format P, format Z, format S of parameters and format S of sizes.
TABLE = [
    (0, "0", "0B", "0.00", "n/a"),
    (1, "1", "1B", "1.00", "1.00B"),
    (999, "999", "999B", "999.00", "999.00B"),
    (1000, "1K", "1KB", "1.00K", "1.00kB"),
    (1023, "1.02K", "1.02KB", "1.02K", "1.02kB"),
    (1024, "1.02K", "1KiB", "1.02K", "1.02kB"),
    (999999, "1000K", "976.56KiB", "1000.00K", "1000.00kB"),
    (1000000, "1M", "1MB", "1.00M", "1.00MB"),
    (1048575, "1.05M", "1.05MB", "1.05M", "1.05MB"),
    (1048576, "1.05M", "1MiB", "1.05M", "1.05MB"),
    (361820000, "361.82M", "345.06MiB", "361.82M", "361.82MB"),
    (7241732096, "7.24B", "6.74GiB", "7.24B", "7.24GB"),
    (4368438944, "4.37B", "4.07GiB", "4.37B", "4.37GB"),
    (1000000000000000, "1Q", "1PB", "1000.00T", "1.00PB"),
    (18446744073709551584, "18446.74Q", "16384PiB", "18446744.07T", "18.45EB"),
]


@pytest.mark.parametrize(("number", "p", "z", "s_count", "s_size"), TABLE)
def test_formats(number: int, p: str, z: str, s_count: str, s_size: str) -> None:
    assert format_parameters(number) == p
    assert format_gguf_size(number) == z
    assert format_decimal_parameters(number) == s_count
    assert format_decimal_size(number) == s_size


def test_no_size_below_zero() -> None:
    assert format_decimal_size(-5) == "n/a"
