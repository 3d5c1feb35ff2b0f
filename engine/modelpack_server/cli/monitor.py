"""`modelpack logs` and `requests`: what a running server logs, and its latest requests."""

from __future__ import annotations

from typing import Any

import click

from modelpack.cli.help import command
from modelpack.cli.options import Settings, common_options_without
from modelpack.cli.output import one_line, show_json, table
from modelpack.errors import UsageError
from modelpack_server.cli.client import host_option
from modelpack_server.server_client import call_server, read_lines

_HEADER = ("AGE", "CALLER", "MODEL", "PATH", "STATUS", "TOKENS", "FIRST TOKEN", "DURATION")


@command()
@click.option("-f", "--follow", is_flag=True, help="Print new lines as the server logs them.")
@host_option
@common_options_without("store", "quiet", "progress")
def logs(settings: Settings, follow: bool, host: str) -> None:
    """Print the last lines of a server's log."""
    if follow and settings.json:
        raise UsageError("--follow cannot be combined with --json")
    lines = read_lines(host, "/logs?follow=true" if follow else "/logs")
    if settings.json:
        show_json({"lines": list(lines)})
        return
    for line in lines:
        click.echo(one_line(line))


@command()
@host_option
@common_options_without("store", "progress")
def requests(settings: Settings, host: str) -> None:
    """List the latest requests to a server, the newest first. With --quiet, print only their ids.

    TOKENS are those of the prompt and of the reply.
    """
    answer = call_server(host, "GET", "/pool/requests")
    if settings.json:
        show_json(answer)
    elif settings.quiet:
        for request in answer["requests"]:
            click.echo(one_line(request["id"]))
    else:
        click.echo(table(_HEADER, [_row(request) for request in answer["requests"]]))


def _row(request: dict[str, Any]) -> tuple[str, ...]:
    """Return the cells of a request; a value that is not known is empty."""
    prompt = request.get("prompt_tokens")
    completion = request.get("completion_tokens", request.get("counted_tokens"))
    known = prompt is not None or completion is not None
    return (
        _age(request["age_s"]),
        request.get("key") or request.get("caller") or "",
        request.get("model") or "",
        request["path"],
        "running" if request["running"] else str(request.get("status") or "left"),
        f"{prompt or 0}+{completion or 0}" if known else "",
        _seconds(request.get("ttft_s")),
        _seconds(request.get("duration_s")),
    )


def _age(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length:.0f} {unit}"
    return f"{seconds:.0f} s"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.3f} s"
