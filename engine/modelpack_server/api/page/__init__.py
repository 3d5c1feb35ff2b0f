"""Pages for browsers: the console at /, and the headers that restrict what a page may load.

`reference` has the API reference.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from collections.abc import Mapping
from importlib.resources import files

from fastapi import Request, Response
from starlette.responses import HTMLResponse, PlainTextResponse

_SCRIPTS = (
    "base.js", "markdown.js", "chat.js", "models.js", "requests.js", "metrics.js", "code.js",
    "tabs.js",
)  # fmt: skip
_INLINE = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


def root(request: Request) -> Response:
    """Answer GET /: browsers get the page, other clients a text that identifies the server."""
    headers = {"Vary": "Accept", "Cache-Control": "no-cache"}
    if not _takes_html(request.headers.get("accept", "")):
        return PlainTextResponse("Modelpack is running\n", headers=headers)
    return html_response(text(), headers)


def html_response(page: str, headers: Mapping[str, str] | None = None) -> Response:
    """Return a page with the headers that restrict what it may load."""
    own = {
        "Content-Security-Policy": policy(page),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
    }
    return HTMLResponse(page, headers={**(headers or {}), **own})


@functools.cache
def text() -> str:
    """Return the page, with its style and its scripts inside."""
    style, script = _source("page.css"), "".join(map(_source, _SCRIPTS))
    page = _source("page.html").replace("<style></style>", f"<style>\n{style}</style>")
    return page.replace("<script></script>", f"<script>\n{script}</script>")


def _source(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")


@functools.lru_cache(maxsize=4)
def policy(page: str) -> str:
    """Return the Content-Security-Policy, which allows only the page's own script and style, by
    hash, and requests to this server. Model output could not run as script even if it were HTML.
    """
    hashes: dict[str, list[str]] = {"script": [], "style": []}
    for kind, content in _INLINE.findall(page):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        hashes[kind].append(f"'sha256-{digest}'")
    none = "'none'"
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {' '.join(hashes['script']) or none}",
            f"style-src {' '.join(hashes['style'])}",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    )


def _takes_html(accept: str) -> bool:
    """Return whether `Accept` lists text/html; browsers do, while other clients send `*/*`."""
    for item in accept.split(","):
        media_type, *parameters = (part.strip().lower() for part in item.split(";"))
        if media_type == "text/html":
            return not any(re.fullmatch(r"q\s*=\s*0(\.0*)?", part) for part in parameters)
    return False
