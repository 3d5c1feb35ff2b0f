from __future__ import annotations

from typing import Any

import pytest

from modelpack.formats.units import any_value, fixed, trim

# Each value and its text as printed by Go 1.26.
ANY = [
    ("text", "text"),
    ("", ""),
    (None, "<nil>"),
    (True, "true"),
    (False, "false"),
    (0, "0"),
    (-0.0, "-0"),
    (100, "100"),
    (100000, "100000"),
    (1000000, "1e+06"),
    (123456789, "1.23456789e+08"),
    (1234567.25, "1.23456725e+06"),
    (12345678901234567890, "1.2345678901234567e+19"),
    (1e20, "1e+20"),
    (1e21, "1e+21"),
    (0.1, "0.1"),
    (1.5, "1.5"),
    (0.0001, "0.0001"),
    (0.00001, "1e-05"),
    (5e-324, "5e-324"),
    (1.7976931348623157e308, "1.7976931348623157e+308"),
    ([1, "a b", None, {"b": 1, "a": []}], "[1 a b <nil> map[a:[] b:1]]"),
]


@pytest.mark.parametrize(("value", "text"), ANY)
def test_any_value(value: Any, text: str) -> None:
    assert any_value(value) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (1e-5, "0.000010"),
        (1e-7, "0.000000"),
        (-0.0, "-0.000000"),
        (10000.0, "10000.000000"),
        (0.1234565, "0.123456"),
        (1e22, "10000000000000000000000.000000"),
        (float("nan"), "NaN"),
        (float("inf"), "+Inf"),
        (float("-inf"), "-Inf"),
    ],
)
def test_fixed(number: float, text: str) -> None:
    assert fixed(number) == text


@pytest.mark.parametrize(
    ("text", "trimmed"),
    [
        ("  a b\t\r\n", "a b"),
        ("\u00a0\u2003\u0085\u3000x\u1680", "x"),
        ("\x1cx\x1f", "\x1cx\x1f"),  # space to Python, not to Go
        ("\u200bx\ufeff", "\u200bx\ufeff"),
        ("\udc85x", "\udc85x"),  # the single byte 0x85 is not U+0085
        ("   ", ""),
    ],
)
def test_trim(text: str, trimmed: str) -> None:
    assert trim(text) == trimmed
