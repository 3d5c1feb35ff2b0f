"""Every scenario has a test with the mark `scenario(number)`, and every such mark a scenario."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.scenarios.table import SCENARIOS

TESTS = Path(__file__).parents[1]


def test_the_table_is_whole() -> None:
    assert list(SCENARIOS) == list(range(1, 36))


@pytest.mark.parametrize("number", SCENARIOS)
def test_a_scenario_has_a_test(number: int) -> None:
    assert named().get(number), f"no test for scenario {number}: {SCENARIOS[number]}"


def test_every_mark_has_a_scenario() -> None:
    assert {n: tests for n, tests in named().items() if n not in SCENARIOS} == {}


def _numbers(function: ast.FunctionDef) -> Iterator[int]:
    """Yield the numbers in the marks `scenario` of a test and of its parameters."""
    for mark in function.decorator_list:
        for call in ast.walk(mark):
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "pytest.mark.scenario":
                yield from map(ast.literal_eval, call.args)


@cache
def named() -> dict[int, list[str]]:
    found: dict[int, list[str]] = defaultdict(list)
    for path in sorted(TESTS.rglob("test_*.py")):
        source = path.read_bytes()
        if b"mark.scenario" not in source:
            continue
        for function in ast.walk(ast.parse(source)):
            if isinstance(function, ast.FunctionDef) and function.name.startswith("test_"):
                for number in _numbers(function):
                    found[number].append(f"{path.relative_to(TESTS)}::{function.name}")
    return dict(found)
