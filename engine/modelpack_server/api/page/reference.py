"""The API reference at /docs and /redoc: one page without scripts, made from the OpenAPI document.

FastAPI's own pages load Swagger UI and Redoc from another host, which the browser then trusts.
"""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Iterable, Iterator, Mapping
from html import escape
from typing import Any

from fastapi import FastAPI, Request, Response

from modelpack_server.api.page import html_response

_STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 60rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
nav a { margin-right: 1rem; }
code { font-size: .9em; }
section { margin: 1rem 0; padding: .25rem 1rem; border: 1px solid light-dark(#ddd, #444); }
table { border-collapse: collapse; width: 100%; }
td, th { padding: .2rem .5rem; border-top: 1px solid light-dark(#ddd, #444); text-align: left; }
"""
# Keywords of JSON Schema that are shown with a field's type.
_LIMITS = ("default", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minLength",
           "maxLength", "minItems", "maxItems", "pattern")  # fmt: skip


def add_reference(app: FastAPI) -> None:
    """Add the routes; requires an `app` without FastAPI's own."""

    @functools.cache
    def page() -> str:
        return reference(app.openapi())

    async def read_reference(_: Request) -> Response:
        return html_response(await asyncio.to_thread(page))

    for path in ("/docs", "/redoc"):
        app.add_route(path, read_reference, include_in_schema=False)


def reference(document: Mapping[str, Any]) -> str:
    """Return the page that describes the operations and schemas of an OpenAPI document."""
    title = escape(f"{document['info']['title']} {document['info']['version']}")
    groups: dict[str, list[str]] = {}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            tag = (operation.get("tags") or ["other"])[0]
            groups.setdefault(tag, []).append(_operation(method.upper(), path, operation))
    schemas = document.get("components", {}).get("schemas", {})
    groups["schemas"] = [_schema(name, schema) for name, schema in sorted(schemas.items())]
    links = "\n".join(f'<a href="#{escape(tag)}">{escape(tag)}</a>' for tag in groups)
    parts = [
        f'<h2 id="{escape(tag)}">{escape(tag)}</h2>\n' + "\n".join(sections)
        for tag, sections in groups.items()
    ]
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{title}: API</title>\n<link rel="icon" href="data:,">\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{title}: API</h1>\n"
        f'<nav>{links}\n<a href="openapi.json">openapi.json</a></nav>\n'
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _operation(method: str, path: str, operation: Mapping[str, Any]) -> str:
    fields = [
        (f"{p['name']} ({p['in']})", p["schema"], p.get("required", False))
        for p in operation.get("parameters", ())
    ]
    text = escape(operation.get("description") or operation.get("summary", ""))
    body = operation.get("requestBody", {}).get("content", {})
    takes = [f"<p>Body: {_content(body)}</p>"] if body else []
    returns = [
        f"<li>{escape(status)}: {escape(answer.get('description', ''))} "
        f"{_content(answer.get('content', {}))}</li>"
        for status, answer in operation.get("responses", {}).items()
    ]
    return "\n".join(
        ["<section>", f"<h3><code>{method} {escape(path)}</code></h3>", f"<p>{text}</p>",
         *_table(fields), *takes, "<ul>", *returns, "</ul>", "</section>"]
    )  # fmt: skip


def _schema(name: str, schema: Mapping[str, Any]) -> str:
    required = schema.get("required", ())
    fields = [(key, part, key in required) for key, part in schema.get("properties", {}).items()]
    text = escape(schema.get("description", "")) if fields else _type(schema)
    head = f'<section id="schema-{escape(name)}">\n<h3><code>{escape(name)}</code></h3>'
    return "\n".join([head, f"<p>{text}</p>", *_table(fields), "</section>"])


def _content(content: Mapping[str, Any]) -> str:
    """Return the media types and the schemas of a body."""
    return ", ".join(
        f"<code>{escape(media_type)}</code> {_type(body.get('schema', {}))}"
        for media_type, body in content.items()
    )


def _table(fields: Iterable[tuple[str, Mapping[str, Any], bool]]) -> Iterator[str]:
    """Yield the lines of a table of names, types, and whether they are required."""
    rows = [
        f"<tr><td><code>{escape(name)}</code>{' *' if required else ''}</td>"
        f"<td>{_type(schema)}</td></tr>"
        for name, schema, required in fields
    ]
    if rows:
        yield "<table>\n<tr><th>Field (* required)</th><th>Type</th></tr>"
        yield from rows
        yield "</table>"


def _type(schema: Mapping[str, Any]) -> str:
    """Return the type that a schema describes, with its limits and links to named schemas."""
    limits = [
        f"{key} {json.dumps(schema[key]).removesuffix('.0')}" for key in _LIMITS if key in schema
    ]
    return _kind(schema) + (escape(f" ({', '.join(limits)})") if limits else "")


def _kind(schema: Mapping[str, Any]) -> str:
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#schema-{name}">{name}</a>'
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return " or ".join(map(_type, schema[key]))
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if values is not None:
        return ", ".join(f"<code>{escape(json.dumps(value))}</code>" for value in values)
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    if schema.get("type") == "object" and "properties" in schema:
        members = schema["properties"].items()
        return "{" + ", ".join(f"{escape(name)}: {_type(part)}" for name, part in members) + "}"
    kind = schema.get("type", "any")
    return escape(kind if isinstance(kind, str) else " or ".join(kind))
