"""`modelpack list`."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import click

from modelpack.cli.describe import age
from modelpack.cli.options import Settings, common_options
from modelpack.cli.output import human_size, note, show_json, table
from modelpack.operations.listing import Summarized, summarize_models

_HEADER = (
    "MODEL NAME", "PARAMETERS", "QUANTIZATION", "ARCHITECTURE", "MODEL ID", "CREATED", "CONTEXT",
    "SIZE",
)  # fmt: skip


@click.command("list")
@click.argument("model", required=False)
@common_options
def list_models(settings: Settings, model: str | None) -> None:
    """List stored models: all, or those named MODEL. With --quiet, their ids only.

    Of a model that was pulled in part, the size says how much of it is here.
    """
    found = summarize_models(settings.store(), model)
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


def _rows(item: Summarized, now: datetime) -> list[tuple[str, ...]]:
    cells = ("", "", "")
    created = context = size = ""
    known = item.summary
    if known:
        cells = (known.parameters, known.quantization, known.architecture)
        created = age(known.created, now)
        context = str(known.context_size) if known.context_size is not None else ""
        size = human_size(known.size)
        if item.missing:
            here = known.size - sum(blob.size for blob in item.missing)
            size = f"{human_size(here)} of {size}"
    rest = (*cells, item.digest.short, created, context, size)
    names = [reference.familiar for reference in item.references] or ["<none>"]
    return [(name, *rest) for name in names]


def _json(item: Summarized) -> dict[str, Any]:
    value: dict[str, Any] = {
        "digest": str(item.digest),
        "tags": [str(reference) for reference in item.references],
    }
    known = item.summary
    if known:
        value |= {
            "size": known.size,
            "created": known.created,
            "format": known.format,
            "parameters": known.parameters,
            "quantization": known.quantization,
            "architecture": known.architecture,
            "contextSize": known.context_size,
        }
    if item.missing:
        value["missing"] = [str(blob.digest) for blob in item.missing]
        value["missingSize"] = sum(blob.size for blob in item.missing)
    if item.problem:
        value["problem"] = item.problem
    return value
