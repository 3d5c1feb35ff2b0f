"""The page of a catalogue: one file of HTML that loads nothing else, and the list as JSON."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, Final

from modelpack.errors import ModelpackError
from modelpack.formats.units import format_decimal_size
from modelpack.operations.catalog import CatalogEntry

#: Grows when a field changes its meaning or goes away.
SCHEMA_VERSION: Final = 1
_STYLE: Final = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:72rem;padding:0 1rem}
table{border-collapse:collapse;width:100%}
th,td{text-align:left;vertical-align:top;padding:.4rem .8rem .4rem 0;border-bottom:1px solid #8884}
td:first-child{overflow-wrap:anywhere}
code,small{color:#777}
input{font:inherit;padding:.4rem;width:100%;max-width:30rem;margin:1rem 0}
@media (prefers-color-scheme:dark){body{background:#16181c;color:#e6e6e6}}
"""
_SCRIPT: Final = """
const field = document.querySelector("input");
field.hidden = false;
field.addEventListener("input", () => {
  const words = field.value.toLowerCase().split(/\\s+/);
  for (const row of document.querySelectorAll("tbody tr")) {
    const text = row.textContent.toLowerCase();
    row.hidden = !words.every((word) => text.includes(word));
  }
});
"""
_COLUMNS: Final = ("Model", "Parameters", "Quantisation", "Context", "Size", "Licence", "Attached")


def write_catalog(
    entries: Sequence[CatalogEntry], directory: Path, *, name: str, title: str = ""
) -> tuple[Path, Path]:
    """Write `index.html` and `index.json` to `directory`; return both paths.

    The same models give the same bytes. Raises `ModelpackError` if they cannot be written.
    """
    html, listed = directory / "index.html", directory / "index.json"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        html.write_text(page(entries, title or f"Models of {name}"), encoding="utf-8")
        text = json.dumps(as_json(entries, name), indent=2, ensure_ascii=False)
        listed.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise ModelpackError(f"{directory}: cannot be written: {error.strerror}") from error
    return html, listed


def as_json(entries: Sequence[CatalogEntry], name: str) -> dict[str, Any]:
    """Return the list of the models under `name`."""
    return {
        "schemaVersion": SCHEMA_VERSION,
        "name": name,
        "models": [entry.to_json() for entry in entries],
    }


def page(entries: Sequence[CatalogEntry], title: str) -> str:
    """Return the page; whatever models say about themselves is text in it."""
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    head = "".join(f"<th>{column}</th>" for column in _COLUMNS)
    rows = "\n".join(_row(entry) for entry in entries)
    return f"""<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
<h1>{escape(title)}</h1>
<p>{len(entries)} listed; for programs: <a href="index.json">index.json</a></p>
<input type="search" placeholder="Filter" aria-label="Filter" hidden>
<table>
<thead><tr>{head}</tr></thead>
<tbody>
{rows}
</tbody>
</table>
<script>{_SCRIPT}</script>
</html>
"""


def _row(entry: CatalogEntry) -> str:
    summary = entry.summary
    name = f"<strong>{escape(str(entry.reference))}</strong>"
    texts = (entry.title, entry.description, entry.problem)
    name += "".join(f"<br>{escape(text)}" for text in texts if text)
    if entry.digest is not None:
        name += f"<br><code>{entry.digest}</code>"
    if entry.variants:
        name += f"<br>{len(entry.variants)} variants"
    context = f"{summary.context_size:,}" if summary is not None and summary.context_size else ""
    cells = (
        name,
        escape(summary.parameters) if summary is not None else "",
        escape(summary.quantization) if summary is not None else "",
        context,
        format_decimal_size(summary.size) if summary is not None else "",
        "<br>".join(escape(one) for one in entry.licences),
        "<br>".join(f"<small>{escape(one)}</small>" for one in entry.attached),
    )
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
