"""Format the times in configs and layers: RFC 3339, as Go's `time.Time` prints it.

That is up to nine fractional digits without trailing zeros, and `Z` for an offset of zero.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from datetime import UTC, datetime

from modelpack.artifacts.json_document import checked_time
from modelpack.errors import ManifestError, UsageError

#: The default time, a constant so that equal files give equal digests.
EPOCH = "1970-01-01T00:00:00Z"
#: https://reproducible-builds.org/specs/source-date-epoch/
SOURCE_DATE_EPOCH = "SOURCE_DATE_EPOCH"

_BILLION = 10**9
_YEAR_10000 = 253_402_300_800
_PARTS = re.compile(r"([^.Z+]+?)(?:\.([0-9]+))?(Z|[+-][0-9:]{5})\Z")


def created_time(created: str | datetime | None, environ: Mapping[str, str]) -> str:
    """Return the time of creation for `created`: `now`, RFC 3339, a datetime or None.

    None means `source_time`, which is reproducible. Raises `UsageError` for an invalid time.
    """
    if created is None:
        return source_time(environ)
    if created == "now":
        created = datetime.now(UTC).replace(microsecond=0)
    if isinstance(created, datetime):
        if created.tzinfo is None:
            raise UsageError(f"the time of creation {created} has no time zone")
        created = created.isoformat()
    try:
        checked_time(created, "created")
    except ManifestError:
        raise UsageError(
            f"{created[:100]!r} is not a time of creation",
            hint="write `now` or RFC 3339, such as 2025-01-02T03:04:05Z",
        ) from None
    return _canonical(created)


def source_time(environ: Mapping[str, str]) -> str:
    """Return the time in the variable `SOURCE_DATE_EPOCH`, by default 1970.

    Raises `UsageError` if its value is not a number of seconds.
    """
    text = environ.get(SOURCE_DATE_EPOCH, "")
    if not text:
        return EPOCH
    if not re.match(r"[0-9]{1,12}\Z", text) or int(text) >= _YEAR_10000:
        raise UsageError(
            f"{SOURCE_DATE_EPOCH} is {text[:100]!r}, expected seconds since 1970 as a number"
        )
    return _canonical(datetime.fromtimestamp(int(text), UTC).isoformat())


def local_time(nanoseconds: int) -> str:
    """Return a file's time in the time zone of this machine, as Docker Model Runner writes it.

    Raises `ValueError` for a year outside RFC 3339.
    """
    seconds, fraction = divmod(nanoseconds, _BILLION)
    try:
        moment = time.localtime(seconds)
    except (OverflowError, OSError) as error:
        raise ValueError(f"{seconds} seconds are out of range") from error
    if not 1 <= moment.tm_year <= 9999:
        raise ValueError(f"the year {moment.tm_year} is out of range")
    digits = f".{fraction:09}".rstrip("0") if fraction else ""
    return (
        f"{moment.tm_year:04}-{moment.tm_mon:02}-{moment.tm_mday:02}"
        f"T{moment.tm_hour:02}:{moment.tm_min:02}:{moment.tm_sec:02}"
        f"{digits}{_offset(moment.tm_gmtoff)}"
    )


def _offset(seconds: int) -> str:
    if seconds == 0:
        return "Z"
    minutes = abs(seconds) // 60  # Go truncates the seconds of historic zones
    sign = "-" if seconds <= -60 else "+"
    return f"{sign}{minutes // 60:02}:{minutes % 60:02}"


def _canonical(text: str) -> str:
    match = _PARTS.match(text)
    assert match is not None, f"{text!r} was checked before"
    clock, fraction, offset = match.groups(default="")
    fraction = fraction.rstrip("0")
    if offset[1:] == "00:00":
        offset = "Z"
    return clock + (f".{fraction}" if fraction else "") + offset
