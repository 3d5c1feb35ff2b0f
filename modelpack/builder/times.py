"""Times as configs and layers hold them: RFC 3339, written as Go's `time.Time` writes itself.

Up to nine fractional digits without trailing zeros, `Z` for an offset of zero.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from datetime import UTC, datetime

from modelpack.artifacts.json_document import checked_time
from modelpack.errors import ManifestError, UsageError

#: The time of everything where the caller names none: the same files give the same digest.
EPOCH = "1970-01-01T00:00:00Z"
#: https://reproducible-builds.org/specs/source-date-epoch/
SOURCE_DATE_EPOCH = "SOURCE_DATE_EPOCH"

_BILLION = 10**9
_YEAR_10000 = 253_402_300_800
_PARTS = re.compile(r"([^.Z+]+?)(?:\.([0-9]+))?(Z|[+-][0-9:]{5})\Z")


def created_time(created: str | datetime | None, environ: Mapping[str, str]) -> str:
    """Return the time of creation that `created` asks for: `now`, RFC 3339, or reproducibly None.

    Raises `UsageError`.
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
    """Return the time that `SOURCE_DATE_EPOCH` holds, in seconds, else 1970.

    Raises `UsageError` if it holds something else.
    """
    text = environ.get(SOURCE_DATE_EPOCH, "")
    if not text:
        return EPOCH
    if not re.match(r"[0-9]{1,12}\Z", text) or int(text) >= _YEAR_10000:
        raise UsageError(
            f"{SOURCE_DATE_EPOCH} is {text[:100]!r}, expected seconds since 1970 as a number"
        )
    moment = time.gmtime(int(text))
    return _clock(moment) + "Z"


def local_time(nanoseconds: int) -> str:
    """Return a file's time in this machine's time zone, which is what Docker Model Runner writes.

    Raises `ValueError` for a year that RFC 3339 does not have.
    """
    seconds, fraction = divmod(nanoseconds, _BILLION)
    try:
        moment = time.localtime(seconds)
    except (OverflowError, OSError) as error:
        raise ValueError(f"{seconds} seconds are out of range") from error
    if not 1 <= moment.tm_year <= 9999:
        raise ValueError(f"the year {moment.tm_year} is out of range")
    digits = f".{fraction:09}".rstrip("0") if fraction else ""
    return _clock(moment) + digits + _offset(moment.tm_gmtoff)


def _clock(moment: time.struct_time) -> str:
    return (
        f"{moment.tm_year:04}-{moment.tm_mon:02}-{moment.tm_mday:02}"
        f"T{moment.tm_hour:02}:{moment.tm_min:02}:{moment.tm_sec:02}"
    )


def _offset(seconds: int) -> str:
    if seconds == 0:
        return "Z"
    minutes = abs(seconds) // 60  # Go drops the seconds of historic zones, towards zero
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
