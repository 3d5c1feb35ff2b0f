"""What commands make of a registry's refusals: which error, how soon, after how many requests."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest

from modelpack.errors import DeniedError, RemoteTimeoutError
from modelpack.operations.remote import RemoteOptions
from modelpack.registry import RetryPolicy, Timeouts
from tests.registry.faults import answering, dripping, silent_after, with_headers
from tests.registry.faulty import FaultyRegistry
from tests.registry.faulty_auth import BasicAuth
from tests.scenarios.processes import run
from tests.scenarios.published import Published

DENIED = b'{"errors":[{"code":"DENIED","message":"not yours"}]}'


@pytest.mark.scenario(12)
def test_denied_is_told_at_once(published: Published) -> None:
    published.registry.faults.add("*", "/v2/", answering(403, DENIED), times=None)
    with pytest.raises(DeniedError, match="not yours") as caught:
        published.pull()
    assert caught.value.exit_code == 4
    assert published.registry.count("GET", "/v2/") == 1
    published.check_nothing_shows()


@pytest.mark.parametrize("form", ["seconds", "date"])
@pytest.mark.scenario(13)
def test_the_time_that_a_registry_asks_for(published: Published, form: str) -> None:
    now = datetime.now(UTC).replace(microsecond=0)
    later = "3" if form == "seconds" else format_datetime(now + timedelta(seconds=3), usegmt=True)
    busy = answering(429, Retry_After=later, Date=format_datetime(now, usegmt=True))
    published.registry.faults.add("GET", published.path, busy, times=2)
    waits: list[float] = []
    published.pull(RemoteOptions(retry=RetryPolicy(sleep=waits.append)))
    assert len(waits) == 2
    assert min(waits) >= 3
    published.check_whole()


@pytest.mark.scenario(15)
def test_a_wrong_password_names_its_source_and_is_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultyRegistry(auth=BasicAuth("ann", "right")) as registry:
        monkeypatch.setenv("MODELPACK_REGISTRY", registry.host)
        monkeypatch.setenv("MODELPACK_USERNAME", "ann")
        monkeypatch.setenv("MODELPACK_PASSWORD", "a-wrong-password")
        ended = run("--store", tmp_path / "store", "pull", f"{registry.host}/team/model:v1")
        assert ended.code == 4
        assert registry.host in ended.err
        assert "MODELPACK_PASSWORD" in ended.err
        assert "a-wrong-password" not in ended.err + ended.out
        assert len(registry.requests) <= 2


@pytest.mark.parametrize(
    "fault",
    [pytest.param(silent_after(10), id="silent"), pytest.param(dripping(1, 0.05), id="slow-loris")],
)
@pytest.mark.scenario(31)
def test_a_registry_that_keeps_us_waiting(published: Published, fault: object) -> None:
    published.registry.faults.add("GET", published.path, fault, times=None)  # type: ignore[arg-type]
    timeouts = Timeouts(connect=1, idle=0.2, minimum_speed=1000)
    remote = RemoteOptions(timeouts=timeouts, retry=RetryPolicy(tries=2, sleep=lambda _: None))
    started = time.monotonic()
    with pytest.raises(RemoteTimeoutError):
        published.pull(remote)
    assert time.monotonic() - started < 20
    published.check_nothing_shows()


def test_wrong_headers_of_a_blob_change_nothing(published: Published) -> None:
    odd = with_headers(Content_Type="text/html", Docker_Content_Digest="sha256:0", ETag='"x"')
    published.registry.faults.add("GET", published.path, odd, times=None)
    published.pull()
    published.check_whole()
