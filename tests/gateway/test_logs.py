"""The log of serve and gateway: text on a terminal, JSON elsewhere, no probes."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
from typing import Any

import pytest

from modelpack.cli.options import Settings
from modelpack_server.cli.logs import LogFormat, serving_log
from modelpack_server.gateway.families import Family
from modelpack_server.gateway.trace_spans import log_request
from modelpack_server.gateway.traces import Trace


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def trace(method: str = "POST", path: str = "/v1/chat/completions", **known: Any) -> Trace:
    given = {"id": "r1", "family": Family.OPENAI, "started": 10.0, "ended": 12.5, "status": 200}
    return Trace(method=method, path=path, **{**given, **known})


ANSWERED = {
    "model": "team/m", "prompt_tokens": 12, "cached_tokens": 4, "completion_tokens": 34,
    "first_token_at": 10.25, "finish": "stop", "key": "alice",
}  # fmt: skip


def logged(
    monkeypatch: pytest.MonkeyPatch,
    *traces: Trace,
    stderr: io.StringIO | None = None,
    log_format: LogFormat | None = None,
    quiet: bool = False,
) -> list[str]:
    stderr = stderr or io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    with serving_log(Settings(quiet=quiet), log_format):
        for one in traces:
            log_request(one)
        logging.getLogger("modelpack_server.pool").warning("cannot load %s\x1b[2J", "m")
    return stderr.getvalue().splitlines()


def test_text_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = logged(monkeypatch, trace(**ANSWERED), stderr=Terminal())
    assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in lines)
    assert [line[9:] for line in lines] == [
        "INFO POST /v1/chat/completions 200 model=team/m tokens=12+34 cached=4 ttft=0.250s "
        "duration=2.500s finish=stop key=alice",
        "WARNING cannot load m\ufffd[2J",
    ]


def test_json_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = map(json.loads, logged(monkeypatch, trace(**ANSWERED)))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", first.pop("time"))
    assert first.pop("level") == "INFO"
    assert first == trace(**ANSWERED).to_json()
    assert second["message"] == "cannot load m\x1b[2J"
    assert (second["level"], second["logger"]) == ("WARNING", "modelpack_server.pool")


def test_the_option_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = logged(monkeypatch, trace(), stderr=Terminal(), log_format="json")
    assert all(line.startswith("{") for line in lines)
    assert not logged(monkeypatch, trace(), log_format="text")[0].startswith("{")
    assert len(logged(monkeypatch, trace(), quiet=True)) == 1


@pytest.mark.parametrize(
    ("one", "is_logged"),
    [
        (trace("GET", "/health", status=503), False),
        (trace("HEAD", "/metrics"), False),
        (trace("GET", "/"), False),
        (trace("GET", "/favicon.ico", status=404), False),
        (trace("GET", "/metrics", status=403, refused="metrics_not_allowed"), True),
        (trace("POST", "/"), True),
        (trace("GET", "/v1/models"), True),
    ],
)
def test_probes_and_page_assets_are_not_logged(
    monkeypatch: pytest.MonkeyPatch, one: Trace, is_logged: bool
) -> None:
    assert (len(logged(monkeypatch, one)) == 2) is is_logged


def test_a_path_cannot_forge_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = logged(monkeypatch, trace(path="/x\n10:00:00 INFO forged"), log_format="text")
    assert len(lines) == 2
