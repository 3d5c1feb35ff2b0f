"""The log of serve and gateway on stderr: text for people, JSON for programs."""

from __future__ import annotations

import json
import logging
import sys
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from typing import Any, Literal

import click

from modelpack.cli.options import Settings
from modelpack.cli.output import one_line, request_log, visible

LogFormat = Literal["text", "json"]

#: The option that `serving_log` takes as `log_format`.
log_format_option = click.option(
    "--log-format", type=click.Choice(["text", "json"]),
    help="Write the log on stderr as text, or as one JSON object per line. [default: text on a "
    "terminal, else json]",
)  # fmt: skip


def serving_log(settings: Settings, log_format: LogFormat | None) -> AbstractContextManager[None]:
    """Write request logs and warnings to stderr in the block; with --quiet, only warnings."""
    is_text = sys.stderr.isatty() if log_format is None else log_format == "text"
    return request_log(settings, TextFormatter() if is_text else JsonFormatter())


class TextFormatter(logging.Formatter):
    """Formats a record as local time, level and message; a request as its main figures."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        """Return the text of a record; a request is one line."""
        fields = _request_in(record)
        if fields is None:
            return visible(super().format(record))
        return one_line(
            f"{self.formatTime(record, self.datefmt)} {record.levelname} {_text(fields)}"
        )


class JsonFormatter(logging.Formatter):
    """Formats a record as a line of JSON: a request's fields, else `logger` and `message`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        found: dict[str, Any] = {"time": time, "level": record.levelname}
        fields = _request_in(record)
        if fields is None:
            fields = {"logger": record.name, "message": record.getMessage()}
            if record.exc_info:
                fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(found | fields, separators=(",", ":"))


def _request_in(record: logging.LogRecord) -> dict[str, Any] | None:
    """Return the fields of `Trace.to_json`, None for the record of another event."""
    fields = getattr(record, "request", None)
    return fields if isinstance(fields, dict) else None


def _text(fields: dict[str, Any]) -> str:
    """Return a request as `POST /v1/… 200 model=m tokens=12+34 ttft=0.050s duration=1.200s`."""
    words = [fields["method"], fields["path"], str(fields.get("status", "-"))]
    completion = fields.get("completion_tokens", fields.get("counted_tokens"))
    prompt = fields.get("prompt_tokens")
    tokens = None if prompt is None and completion is None else f"{prompt or 0}+{completion or 0}"
    shown = {
        "model": fields.get("model"),
        "tokens": tokens,
        "cached": fields.get("cached_tokens") or None,
        **{name: _seconds(fields.get(f"{name}_s")) for name in ("queue", "ttft", "duration")},
        **{name: fields.get(name) for name in ("finish", "refused", "key", "caller", "upstream")},
    }
    return " ".join([*words, *(f"{name}={value}" for name, value in shown.items() if value)])


def _seconds(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}s"
