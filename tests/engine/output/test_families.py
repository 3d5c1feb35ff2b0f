"""For each family, the result does not depend on the division into pieces."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelpack_server.tool_parsers.families import FAMILIES
from tests.engine.output.cases import CASES
from tests.engine.output.reading import read
from tests.engine.output.writing import Case

by_name = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.family}-{case.name}")


def test_every_family_has_cases() -> None:
    assert {case.family for case in CASES} == set(FAMILIES)


@by_name
def test_whole(case: Case) -> None:
    assert read(case.family, [case.written]) == case.found


@by_name
def test_by_characters(case: Case) -> None:
    assert read(case.family, case.written) == case.found


@by_name
def test_cut_in_two_anywhere(case: Case) -> None:
    for at in range(len(case.written)):
        assert read(case.family, [case.written[:at], case.written[at:]]) == case.found


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_cut_anyhow(data: st.DataObject) -> None:
    case = data.draw(st.sampled_from(CASES))
    cuts = data.draw(st.lists(st.integers(0, len(case.written)), max_size=12))
    ends = [0, *sorted(cuts), len(case.written)]
    pieces = [case.written[a:b] for a, b in itertools.pairwise(ends)]
    assert read(case.family, pieces) == case.found
