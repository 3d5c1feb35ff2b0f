"""JSON that is scanned piece by piece, and completed if it ends early."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelpack_server.tool_parsers.json_text import MAX_DEPTH, JsonScanner, dump, load_object

text = st.text(max_size=8)
floats = st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | floats | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=12,
)
objects = st.dictionaries(text, values, max_size=4)
written = st.builds(
    lambda value, ascii_only, indent: json.dumps(value, ensure_ascii=ascii_only, indent=indent),
    objects,
    st.booleans(),
    st.sampled_from([None, 0, 2]),
)


def scanned(pieces: Any) -> tuple[str, JsonScanner, int]:
    scanner = JsonScanner()
    taken, read = "", 0
    for piece in pieces:
        if scanner.done or scanner.failed:
            break
        read += scanner.scan(piece)
        taken += scanner.take()
    return taken, scanner, read


@given(written, st.text(max_size=5))
def test_what_is_json_passes_unchanged_and_no_more_is_read(json_text: str, rest: str) -> None:
    taken, scanner, read = scanned([json_text + rest])
    assert scanner.done
    assert read == len(json_text)
    expected = json.loads(dump(json.loads(json_text)))  # lone surrogates are replaced
    assert json.loads(taken) == expected
    if "\\u" not in json_text:
        assert taken == json_text
    assert scanned(json_text)[0] == taken


@given(written, st.data())
def test_it_can_be_completed_wherever_it_breaks_off(json_text: str, data: st.DataObject) -> None:
    cut = data.draw(st.integers(1, len(json_text)))
    taken, scanner, _ = scanned([json_text[:cut]])
    assert not scanner.failed
    assert isinstance(json.loads(taken + scanner.completion()), dict)


@given(st.text('{}[]",:\\ua0dDeE1-.tfn \n', max_size=40))
def test_whatever_comes_can_be_completed(nonsense: str) -> None:
    taken, scanner, read = scanned(["{" + nonsense])
    assert isinstance(json.loads(taken + scanner.completion()), dict)
    assert scanner.done or scanner.failed or read == len(nonsense) + 1
    assert scanned("{" + nonsense)[0] == taken


@pytest.mark.parametrize(
    ("given_text", "mended"),
    [
        ('{"a": "x\ny"}', {"a": "x\ny"}),
        ('{"a": "\\d\\\'"}', {"a": "\\d'"}),
        ('{"a": "\\u00zz"}', {"a": "\\u00zz"}),
        ('{"a": "\\ud83d\\ude00"}', {"a": "😀"}),
        ('{"a": "\\ud83dx\\ude00"}', {"a": "\ufffdx\ufffd"}),
        ('{"a": "\\ud83d\\ud83d\\ude00"}', {"a": "\ufffd😀"}),
        ('{"a": "\\ud83d"}', {"a": "\ufffd"}),
        ('{"a": "\\ud83d\\n"}', {"a": "\ufffd\n"}),
        ('{"a": 1, }', {"a": 1}),
        ('{"a": [1, 2, ], }', {"a": [1, 2]}),
        ('{"a\\u00e9": 1}', {"aé": 1}),
    ],
)
def test_slips_are_mended(given_text: str, mended: dict[str, Any]) -> None:
    for pieces in ([given_text], given_text):
        taken, scanner, _ = scanned(pieces)
        assert scanner.done
        assert json.loads(taken) == mended


@pytest.mark.parametrize(
    "broken",
    ['{"a": NaN', '{"a" 1', "{a: 1}", '{"a": 01 ', '{"a": tru ', "{,", '{"a": }', '{"a": 1]'],
)
def test_what_is_no_json_stops_it(broken: str) -> None:
    taken, scanner, _ = scanned([broken])
    assert scanner.failed
    assert json.loads(taken + scanner.completion()) in ({}, {"a": 1})


def test_nesting_and_numbers_have_limits() -> None:
    for deep in ('{"a":' * (MAX_DEPTH + 1), '{"a":' + "[" * 100_000):
        taken, scanner, _ = scanned([deep])
        assert scanner.failed
        json.loads(taken + scanner.completion())
    assert scanned(['{"a": ' + "1" * 10_000])[1].failed


def test_dumping_and_loading_have_one_kind_of_failure() -> None:
    assert dump({"a": "\ud83d", "b": "é"}) == '{"a": "\ufffd", "b": "é"}'
    for value in (float("nan"), {1, 2}, b"x"):
        with pytest.raises(ValueError, match=r".+"):
            dump(value)
    for bad in ("[1]", "{", "[" * 100_000, '{"a":' * 100_000):
        with pytest.raises(ValueError, match=r".+"):
            load_object(bad)
