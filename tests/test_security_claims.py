"""SECURITY.md: every claim names a test, and every test that it names exists."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
_TEXT = (TESTS.parent / "SECURITY.md").read_text()
_ROW = re.compile(r"^\| (?P<claim>.+?) \| (?P<tests>`[^|]+`) \|$", re.MULTILINE)
CLAIMS = {row["claim"]: re.findall(r"`([^`]+)`", row["tests"]) for row in _ROW.finditer(_TEXT)}


@cache
def functions(place: str) -> frozenset[str]:
    tree = ast.parse((TESTS / place).read_bytes())
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, kinds))


def test_no_claim_is_without_a_test() -> None:
    table = _TEXT.partition("## Claims")[2].partition("## What is not")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ") and "Claim |" not in line]
    assert len(rows) == len(CLAIMS) > 20


@pytest.mark.parametrize("claim", CLAIMS)
def test_the_tests_of_a_claim_exist(claim: str) -> None:
    for test in CLAIMS[claim]:
        place, _, name = test.partition("::")
        assert name.startswith("test_"), test
        assert name in functions(place), f"there is no {test}"
