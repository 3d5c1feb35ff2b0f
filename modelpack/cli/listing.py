"""`modelpack list`."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import click

from modelpack.cli.describe import age
from modelpack.cli.options import Settings, common_options
from modelpack.cli.output import human_size, note, show_json, table
from modelpack.operations.listing import Listed
from modelpack.operations.listing import list_models as listing

_HEADER = (
    "MODEL NAME", "PARAMETERS", "QUANTIZATION", "ARCHITECTURE", "MODEL ID", "CREATED", "CONTEXT",
    "SIZE",
)  # fmt: skip


@click.command("list")
@click.argument("model", required=False)
@common_options
def list_models(settings: Settings, model: str | None) -> None:
    """List stored models: all, or those named MODEL. With --quiet, their ids only."""
    found = listing(settings.store(), model)
    if settings.json:
        show_json({"models": [_json(item) for item in found]})
    elif settings.quiet:
        for digest in dict.fromkeys(item.digest for item in found):
            click.echo(digest.short)
    else:
        now = datetime.now(UTC)
        rows = [row for item in found for row in _rows(item, now)]
        rows.sort(key=lambda row: row[0].lower())
        click.echo(table(_HEADER, rows))
    for item in found:
        if item.problem:
            note(settings, f"note: {item.digest.short}: {item.problem}")


def _rows(item: Listed, now: datetime) -> list[tuple[str, ...]]:
    cells = ("", "", "")
    created = context = size = ""
    if item.model:
        known = item.model.config
        cells = (known.parameters, known.quantization, known.architecture)
        created = age(known.created, now)
        context = str(known.context_size) if known.context_size is not None else ""
        size = human_size(item.model.manifest.total_size)
    rest = (*cells, item.digest.short, created, context, size)
    names = [reference.familiar for reference in item.references] or ["<none>"]
    return [(name, *rest) for name in names]


def _json(item: Listed) -> dict[str, Any]:
    value: dict[str, Any] = {
        "digest": str(item.digest),
        "tags": [str(reference) for reference in item.references],
    }
    if item.model:
        config = item.model.config
        value |= {
            "size": item.model.manifest.total_size,
            "created": config.created,
            "format": config.format,
            "parameters": config.parameters,
            "quantization": config.quantization,
            "architecture": config.architecture,
            "contextSize": config.context_size,
        }
    if item.problem:
        value["problem"] = item.problem
    return value
