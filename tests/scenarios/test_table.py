"""Every scenario has a test that is named after it, and no test is named after none."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.scenarios.table import SCENARIOS

TESTS = Path(__file__).parents[1]
# These number the scenarios of other specifications.
OTHERS = ("engine", "gateway", "interop")
_NUMBERED = re.compile(r"test_([0-9]{2})_")
_PARAMETER = re.compile(r"([0-9]{2})-[a-z]")


def test_the_table_is_whole() -> None:
    assert list(SCENARIOS) == list(range(1, 36))


@pytest.mark.parametrize("number", SCENARIOS)
def test_a_scenario_has_a_test(number: int) -> None:
    assert NAMED.get(number), f"no test for scenario {number}: {SCENARIOS[number]}"


def test_no_test_has_a_number_of_none() -> None:
    assert set(NAMED) <= set(SCENARIOS), {n: NAMED[n] for n in NAMED if n not in SCENARIOS}


def _numbers(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield the scenarios that functions, or the ids of their parameters, are named after."""
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef) or not function.name.startswith("test_"):
            continue
        if match := _NUMBERED.match(function.name):
            yield int(match[1]), function.name
        for node in (node for mark in function.decorator_list for node in ast.walk(mark)):
            if isinstance(node, ast.keyword) and node.arg == "id":
                name = ast.literal_eval(node.value)
                if match := _PARAMETER.match(name):
                    yield int(match[1]), f"{function.name}[{name}]"


def _named() -> dict[int, list[str]]:
    found: dict[int, list[str]] = defaultdict(list)
    for path in sorted(TESTS.rglob("test_*.py")):
        place = path.relative_to(TESTS)
        if place.parts[0] not in OTHERS:
            for number, name in _numbers(ast.parse(path.read_bytes())):
                found[number].append(f"{place}::{name}")
    return dict(found)


NAMED = _named()
