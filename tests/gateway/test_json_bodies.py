"""The bounded JSON parser: it agrees with json.loads, within its limits."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelpack_server.gateway import json_bodies
from modelpack_server.gateway.json_bodies import (
    INLINE,
    MAX_CONTAINERS,
    MAX_DEPTH,
    MAX_ITEMS,
    MAX_MEMBERS,
    MAX_VALUES,
    BodyError,
    ComplexityError,
    in_worker,
    parse,
)

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=40,
)


@pytest.fixture
def piecewise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse small bodies as large ones."""
    monkeypatch.setattr(json_bodies, "_QUICK", -1)


def parsed_piecewise(raw: bytes) -> Any:
    return json_bodies._Reader(raw).document()


def test_large_bodies_are_not_searched_in_one_step() -> None:
    class Unsearched(bytes):
        """Bytes that reject a search of the whole, which would block all threads."""

        def __contains__(self, part: object) -> bool:
            raise AssertionError(f"searched for {part!r}")

    text = "x" * 2 * json_bodies._QUICK
    assert parse(Unsearched(f'"{text}"'.encode())).value == text


def _refuse(constant: str) -> Any:
    raise ValueError(constant)


@given(JSON, st.booleans(), st.sampled_from([None, 1, "\t"]))
def test_it_agrees_with_the_standard_library(value: Any, ascii_only: bool, indent: Any) -> None:
    raw = json.dumps(value, ensure_ascii=ascii_only, indent=indent).encode(errors="replace")
    expected = json.loads(json.dumps(value, ensure_ascii=False).encode(errors="replace"))
    assert parsed_piecewise(raw) == expected == parse(raw).value


@given(st.text(alphabet='{}[]:,"\\u0123dDeE+-. \ntrueflsn', max_size=30))
def test_it_refuses_what_the_standard_library_refuses(text: str) -> None:
    try:
        expected = json.loads(text, parse_constant=_refuse)
    except ValueError:
        with pytest.raises(BodyError):
            parsed_piecewise(text.encode())
    else:
        assert repr(parsed_piecewise(text.encode())) == repr(expected)


@pytest.mark.parametrize("text", ["x" * 5_000_000, "é" * 3_000_000, "\U0001f600" * 700_000,
                                  "\n\"\\" * 300_000, "a\ud83d" * 1000])  # fmt: skip
@pytest.mark.parametrize("ascii_only", [True, False])
def test_long_strings(text: str, ascii_only: bool) -> None:
    raw = json.dumps([text], ensure_ascii=ascii_only).encode(errors="replace")
    assert parsed_piecewise(raw) == [text.encode(errors="replace").decode()]


@pytest.mark.parametrize("raw", [b'"a\\ud800"', b'{"\\uDFFF": "\\udfff\\ud800"}'])
def test_half_a_surrogate_pair_is_a_question_mark(raw: bytes) -> None:
    assert "?" in json.dumps(parse(raw).value, ensure_ascii=False).encode().decode()


@pytest.mark.parametrize("raw", [b"NaN", b"[Infinity]", b'{"a": -Infinity}', b"[NaN,1]"])
def test_constants_that_are_not_json(raw: bytes) -> None:
    for read in (parse, parsed_piecewise):
        with pytest.raises(BodyError):
            read(raw)


@pytest.mark.usefixtures("piecewise")
def test_keys_of_the_outermost_object_are_kept_as_often_as_they_occur() -> None:
    raw = b'{"model": "a", "x": {"model": 1}, "model": "b"}'
    assert parse(raw).keys == ("model", "x", "model")


def test_the_same_keys_are_kept_of_small_bodies() -> None:
    raw = b'{"model": "a", "x": {"model": 1}, "model": "b"}'
    assert parse(raw).keys == ("model", "x", "model")
    assert parse(b'[{"model": 1}]').keys == ()


@pytest.mark.sample(4)
@pytest.mark.parametrize(
    ("raw", "limit"),
    [
        (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), f"nested deeper than {MAX_DEPTH}"),
        (b"[" * 3_000_000, f"nested deeper than {MAX_DEPTH}"),
        (b'{"a":' * 3_000_000, f"nested deeper than {MAX_DEPTH}"),
        (b"[" + (b"[" + b"{}," * 4000 + b"{}],") * 5 + b"1]", f"more than {MAX_CONTAINERS} arrays"),
        (b"[" + b"1," * MAX_VALUES + b"1]", f"more than {MAX_VALUES} values"),
        (b"[" + (b"[" + b'"",' * 4000 + b'""],') * 550 + b"1]", f"more than {MAX_VALUES} values"),
        (b"[" + b'"",' * MAX_ITEMS + b'""]', f"more than {MAX_ITEMS} items"),
        (b'{"a":["",' + b"1," * 100_000 + b"1]}", f"more than {MAX_ITEMS} items"),
        (b"[" + b"1," * 100_000 + b"true]", f"more than {MAX_ITEMS} items"),
        (b"{" + b'"a":1,' * MAX_MEMBERS + b'"a":1}', f"more than {MAX_MEMBERS} members"),
    ],
)
def test_limits(raw: bytes, limit: str) -> None:
    with pytest.raises(ComplexityError, match=limit):
        parse(raw)


@pytest.mark.parametrize(
    "raw", [b"1" * 5000, b"[1." + b"1" * 5000 + b"]", b'"' + b"\xff" * 2_000_000 + b'"',
            b'"' + b"x" * 2_000_000, b" " * 2_000_000, b"\xff", b"\x00", b"", b"[1]" * 500_000],
)  # fmt: skip
def test_no_json(raw: bytes) -> None:
    with pytest.raises(BodyError):
        parsed_piecewise(raw)


def test_what_is_within_the_limits_is_parsed() -> None:
    ids = list(range(1_000_000))
    assert parse(json.dumps(ids).encode()).value == ids
    deep = b"[" * MAX_DEPTH + b"]" * MAX_DEPTH
    assert parse(deep).value == parsed_piecewise(deep)
    messages = [{"role": "user", "content": "word " * 20}] * 4000
    assert parse(json.dumps(messages).encode()).value == messages


_PICTURE = b'{"url": "data:image/jpeg;base64,' + b"AB+/" * 200_000 + b'"}'


@pytest.mark.parametrize(
    ("pieces", "is_light"),
    [
        ([b"{}"], True),
        ([b"\\" * INLINE], True),
        ([_PICTURE], True),
        ([_PICTURE[:99], _PICTURE[99:]], True),
        ([b"[" + b"1," * 200 + b'"' + b"A" * INLINE + b'"]'], True),
        ([b"[" + b"1," * 300 + b'"' + b"A" * INLINE + b'"]'], False),
        ([b"[" * 300 + b" " * INLINE], False),
        ([b"{" * 150, b"{" * 150 + b" " * INLINE], False),
        ([b'"' + b"\\n" * INLINE + b'"'], False),
        ([_PICTURE, _PICTURE], False),
        ([b" "] * 16 + [b"1," * INLINE], False),
        ([b"1,"] * INLINE, False),
        ([b" " * 64] * INLINE, False),
    ],
)
def test_bodies_with_few_values_need_no_thread(pieces: list[bytes], is_light: bool) -> None:
    thread = asyncio.run(in_worker(pieces, threading.current_thread))
    assert (thread is threading.current_thread()) is is_light


@pytest.mark.parametrize(
    ("raw", "values", "containers"),
    [
        (_PICTURE, 1, 1),  # the comma of the data: URL
        (b'[1, 2, {"a": []}]', 2, 3),
        (b"[" + b"1," * MAX_ITEMS + b"1]", MAX_ITEMS + 2, 1),  # counted exactly
    ],
)
def test_the_memory_of_values_is_estimated(raw: bytes, values: int, containers: int) -> None:
    memory = len(raw) + 64 * values + 256 * containers
    assert parse(raw).memory == memory


def test_bodies_of_many_values_are_read_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    def whole(raw: bytes) -> Any:
        raise AssertionError("parsed in one call")

    monkeypatch.setattr(json_bodies, "_quick", whole)
    for raw in (b"[" + b"1," * MAX_ITEMS + b"1]", b"[" + b"{}," * 3000 + b"{}]"):
        assert len(parse(raw).value) > 3000
    with pytest.raises(AssertionError, match="in one call"):
        parse(_PICTURE)
