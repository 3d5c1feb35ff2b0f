"""The HTML page of a catalogue: one file with its style and script, readable without the script."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING

from modelpack.formats.units import format_decimal_size

if TYPE_CHECKING:
    from modelpack.operations.catalog import CatalogEntry


def page(entries: Sequence[CatalogEntry], title: str) -> str:
    """Return the HTML page; texts from models are escaped, and the page runs no other script."""
    style, script = _source("page.css"), _source("page.js")
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; "
        "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'; "
        "trusted-types 'none'"
    )
    items = "\n".join(map(_item, entries))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{escape(title)}</title>
<style>{style}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
<p><span role="status">{len(entries)} listed</span>; for programs:
<a href="index.json">index.json</a></p>
<div id="controls" hidden>
<label>Search <input type="search" id="search" autocomplete="off"></label>
<label>Sort by <select id="order" autocomplete="off">
<option value="name">name</option>
<option value="newest">newest</option>
<option value="smallest">smallest size</option>
<option value="largest">largest size</option>
<option value="context">longest context</option>
</select></label>
</div>
</header>
<main>
<ul role="list">
{items}
</ul>
</main>
<script>{script}</script>
</body>
</html>
"""


def _source(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _item(entry: CatalogEntry) -> str:
    name, summary = escape(str(entry.reference)), entry.summary
    sortable: dict[str, int | str | None] = {}
    facts: dict[str, Sequence[str]] = {}
    if summary is not None:
        sortable = {
            "size": summary.size,
            "context": summary.context_size,
            "created": summary.created,
        }
        facts = {
            "Format": [summary.format],
            "Parameters": [summary.parameters],
            "Quantisation": [summary.quantization],
            "Context": [f"{summary.context_size:,} tokens" if summary.context_size else ""],
            "Size": [format_decimal_size(summary.size)],
        }
    facts |= {
        "Variants": [str(len(entry.variants) or "")],
        "Capabilities": entry.capabilities,
        "Licence": entry.licences,
        "Attached": entry.attached,
        "Digest": [str(entry.digest or "")],
    }
    data = "".join(f' data-{key}="{escape(str(one))}"' for key, one in sortable.items() if one)
    lines = [f"<li{data}>", f"<h2>{name}</h2>"]
    texts = {"title": entry.title, "description": entry.description, "problem": entry.problem}
    lines += [f'<p class="{key}">{escape(text)}</p>' for key, text in texts.items() if text]
    if not entry.problem:
        lines.append(f'<p class="pull"><code>modelpack pull {name}</code></p>')
    lines.append("<dl>")
    for term, values in facts.items():
        shown = "".join(f"<dd>{escape(value)}</dd>" for value in values if value)
        if shown:
            lines.append(f"<div><dt>{term}</dt>{shown}</div>")
    lines.append("</dl>")
    if entry.card:
        lines.append(
            "<details><summary>Model card</summary>"
            f'<div class="card" role="region" aria-label="Model card of {name}" tabindex="0">'
            f"{escape(entry.card)}</div></details>"
        )
    return "\n".join([*lines, "</li>"])
