"""`modelpack ps`, `unload` and `configure`: what a running server has loaded."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from typing import Any

import click

from modelpack.cli.options import Settings, common_options, model_argument, model_names
from modelpack.cli.output import human_size, show, show_json, table
from modelpack.errors import (
    AuthError,
    ConflictError,
    ModelpackError,
    NotFoundError,
    RemoteUnavailableError,
    UsageError,
)

_DEFAULT_HOST = "http://127.0.0.1:12434"
_TIMEOUT = (5, 600)  # connecting; unloading waits for requests
_HEADER = ("MODEL NAME", "STATE", "REQUESTS", "CONTEXT", "MEMORY", "UNTIL")

host_option = click.option(
    "--host", metavar="URL", envvar="MODELPACK_HOST", default=_DEFAULT_HOST, show_default=True,
    help="The server. [env: MODELPACK_HOST; its key: MODELPACK_API_KEY]",
)  # fmt: skip


@click.command()
@host_option
@common_options
def ps(settings: Settings, host: str) -> None:
    """List the models that a server has loaded."""
    answer = call_server(host, "GET", "/pool")
    if settings.json:
        show_json(answer)
        return
    if settings.quiet:
        for model in answer["models"]:
            click.echo(model["name"])
        return
    click.echo(table(_HEADER, [_row(model) for model in answer["models"]]))


@click.command()
@click.argument("models", metavar="[MODEL]...", nargs=-1, shell_complete=model_names)
@click.option("--all", "everything", is_flag=True, help="Unload all models.")
@click.option("--now", is_flag=True, help="Do not wait for requests under way: they fail.")
@host_option
@common_options
def unload(
    settings: Settings, models: tuple[str, ...], everything: bool, now: bool, host: str
) -> None:
    """Have a server unload MODELs; they are loaded again when they are next used."""
    if everything == bool(models):
        raise UsageError("name the models to unload, or give --all")
    body = {"models": list(models), "all": everything, "wait": not now}
    answer = call_server(host, "POST", "/pool/unload", body)
    show(settings, answer, "\n".join(answer["unloaded"]))


@click.command(
    context_settings={"ignore_unknown_options": True},
    epilog="Flags after -- are those of llama.cpp and vLLM: -- --temp 0.7 --top-k 40",
)
@model_argument()
@click.option("--context-size", type=click.IntRange(min=2), help="Longest context, in tokens.")
@click.option("--preset", help="Settings for a use: code, chat, creative or long-context.")
@click.option("--keep-alive", metavar="TIME", help="How long it stays unused, like 5m; -1: always.")
@click.argument("flags", metavar="[-- FLAGS...]", nargs=-1, type=click.UNPROCESSED)
@host_option
@common_options
def configure(
    settings: Settings,
    model: str,
    context_size: int | None,
    preset: str | None,
    keep_alive: str | None,
    flags: tuple[str, ...],
    host: str,
) -> None:
    """Say how a server runs MODEL from its next use on; without options, as all others."""
    given = {"context_size": context_size, "preset": preset, "keep_alive": keep_alive}
    body: dict[str, Any] = {"model": model, "runtime_flags": list(flags)}
    body |= {name: value for name, value in given.items() if value is not None}
    show(settings, call_server(host, "POST", "/pool/configure", body), "")


def call_server(
    host: str, method: str, path: str, body: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Ask the server; raise what its answer means."""
    import requests

    url = host if "://" in host else f"http://{host}"
    key = os.environ.get("MODELPACK_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        response = requests.request(
            method, url.rstrip("/") + path, json=body, headers=headers, timeout=_TIMEOUT
        )
        answer = response.json()
    except requests.JSONDecodeError:
        raise ModelpackError(f"{url} answered {response.status_code}, and no JSON") from None
    except requests.RequestException as error:
        raise RemoteUnavailableError(
            f"no server answers at {url}",
            hint="start one with `modelpack serve`, or say where it is: --host URL",
        ) from error
    if response.ok and isinstance(answer, dict):
        return answer
    raise problem_of(response.status_code, answer)


def problem_of(status: int, answer: Any) -> ModelpackError:
    """Return the error that a server's answer means."""
    detail = answer.get("error") if isinstance(answer, dict) else None
    text = detail.get("message") if isinstance(detail, dict) else f"HTTP {status}"
    kinds: dict[int, type[ModelpackError]] = {
        400: UsageError, 401: AuthError, 403: AuthError, 404: NotFoundError, 409: ConflictError,
    }  # fmt: skip
    return kinds.get(status, ModelpackError)(str(text))


def _row(model: dict[str, Any]) -> tuple[str, ...]:
    until = "pinned" if model["pinned"] else "in use" if model["users"] else "always"
    if model["expires_at"]:
        left = datetime.fromisoformat(model["expires_at"]) - datetime.now(UTC)
        until = f"{max(0, round(left.total_seconds()))} s from now"
    return (
        model["name"],
        model["state"],
        str(model["users"]),
        str(model["context_size"] or ""),
        human_size(model["memory"]),
        until,
    )
