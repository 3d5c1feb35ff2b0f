"""Accepted times, and their output."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelpack.artifacts.json_document import checked_time
from modelpack.builder.times import EPOCH, created_time, local_time, source_time
from modelpack.errors import UsageError

T = "2025-01-02T03:04:05"


@pytest.mark.parametrize(
    ("given_time", "written"),
    [
        (f"{T}Z", f"{T}Z"),
        (f"{T}+02:00", f"{T}+02:00"),
        (f"{T}-09:30", f"{T}-09:30"),
        (f"{T}+00:00", f"{T}Z"),
        (f"{T}-00:00", f"{T}Z"),
        (f"{T}.000Z", f"{T}Z"),
        (f"{T}.120Z", f"{T}.12Z"),
        (f"{T}.123456789+01:00", f"{T}.123456789+01:00"),
        (datetime(2025, 1, 2, 3, 4, 5, tzinfo=UTC), f"{T}Z"),
        (datetime(2025, 1, 2, 3, 4, 5, 120_000, tzinfo=UTC), f"{T}.12Z"),
        (datetime(2025, 1, 2, 3, 4, 5, tzinfo=timezone(timedelta(hours=-3))), f"{T}-03:00"),
    ],
)
def test_created_is_written_as_go_does(given_time: str | datetime, written: str) -> None:
    assert created_time(given_time, {"SOURCE_DATE_EPOCH": "1"}) == written


@pytest.mark.parametrize(
    "given_time",
    [
        "",
        "today",
        "2025-01-02",
        T,
        f"{T}z",
        "2025-01-02 03:04:05Z",
        "2025-02-30T00:00:00Z",
        "2025-01-02T24:00:00Z",
        "2025-01-02T03:04:60Z",
        f"{T}.1234567891Z",
        f"{T}+2:00",
        f"{T}+24:00",
        f"{T}Z\n",
        datetime(2025, 1, 2),
        datetime(1800, 1, 1, tzinfo=timezone(timedelta(seconds=3208))),
    ],
)
def test_other_times_are_refused(given_time: str | datetime) -> None:
    with pytest.raises(UsageError, match="time"):
        created_time(given_time, {})


def test_now_is_now() -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    written = created_time("now", {})
    assert before <= datetime.fromisoformat(written) <= datetime.now(UTC)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", written)


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (None, EPOCH),
        ("", EPOCH),
        ("0", EPOCH),
        ("1735787045", f"{T}Z"),
        ("253402300799", "9999-12-31T23:59:59Z"),
    ],
)
def test_source_date_epoch(value: str | None, written: str) -> None:
    environ = {} if value is None else {"SOURCE_DATE_EPOCH": value}
    assert source_time(environ) == written
    assert created_time(None, environ) == written


@pytest.mark.parametrize(
    "value", ["-1", "1.5", "now", " 1", "1\n", "253402300800", "9" * 5000, "١"]
)
def test_source_date_epoch_that_is_no_time(value: str) -> None:
    with pytest.raises(UsageError, match="SOURCE_DATE_EPOCH"):
        source_time({"SOURCE_DATE_EPOCH": value})


@pytest.mark.parametrize(
    ("zone", "nanoseconds", "written"),
    [
        ("UTC", 1_735_787_045 * 10**9, f"{T}Z"),
        ("UTC", 1_735_787_045 * 10**9 + 1, f"{T}.000000001Z"),
        ("UTC", 1_735_787_045 * 10**9 + 123_450_000, f"{T}.12345Z"),
        ("UTC", -1, "1969-12-31T23:59:59.999999999Z"),
        ("Europe/Berlin", 1_735_787_045 * 10**9, "2025-01-02T04:04:05+01:00"),
        ("Europe/Berlin", 1_751_000_000 * 10**9, "2025-06-27T06:53:20+02:00"),
        ("Asia/Kathmandu", 0, "1970-01-01T05:30:00+05:30"),
        ("America/St_Johns", 0, "1969-12-31T20:30:00-03:30"),
        ("Europe/London", 1_735_787_045 * 10**9, f"{T}Z"),
        ("LMT0:00:30", 0, "1969-12-31T23:59:30+00:00"),
        ("Africa/Monrovia", 0, "1969-12-31T23:15:30-00:44"),  # 44 minutes and 30 seconds
    ],
)
def test_local_times(
    time_zone: Callable[[str], None], zone: str, nanoseconds: int, written: str
) -> None:
    time_zone(zone)
    assert local_time(nanoseconds) == written


@pytest.mark.usefixtures("utc")
@pytest.mark.parametrize("seconds", [253_402_300_800, 2**62, -(2**62), -62_167_219_201])
def test_years_beyond_the_format(seconds: int) -> None:
    with pytest.raises(ValueError, match="out of range"):
        local_time(seconds * 10**9)


@settings(deadline=None)
@given(st.integers(-62_135_596_800 * 10**9, 253_402_300_799 * 10**9 + 999_999_999))
def test_local_times_keep_every_nanosecond(nanoseconds: int) -> None:
    written = checked_time(local_time(nanoseconds), "mtime")
    clock, fraction, zone = re.fullmatch(  # type: ignore[union-attr]
        r"([^.Z+]*T[0-9:]+)(?:\.([0-9]+))?(Z|[+-].*)", written
    ).groups(default="")
    moment = datetime.fromisoformat(clock + zone) - datetime(1970, 1, 1, tzinfo=UTC)
    seconds = moment.days * 86_400 + moment.seconds
    assert seconds * 10**9 + int(f"{fraction:<09}") == nanoseconds
