"""Rewrite the links of a document in the repository for the site."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping

_LINK = re.compile(r"(?P<image>!?)\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<to>[^()\s]+)\)")
_CODE = re.compile(r"(^(?:```|~~~).*?^(?:```|~~~)$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)


def relinked(markdown: str, source: str, places: Mapping[str, str], code: str) -> str:
    """Return `markdown`, the document at `source` in the repository, with links for the site.

    `places` maps the path of each page in the repository to its path in the site. Links to other
    files get the prefix `code`, a URL; if it is empty, they become plain text.
    """
    here = places[source]

    def link(found: re.Match[str]) -> str:
        path, mark, anchor = found["to"].partition("#")
        if not path or re.match(r"[a-z]+:", path):
            return found[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        page = places.get(target) or places.get(f"{target}/README.md")
        if page is not None:
            to = posixpath.relpath(page, posixpath.dirname(here) or ".")
            return f"{found['image']}[{found['text']}]({to}{mark}{anchor})"
        return f"[{found['text']}]({code}/{target})" if code else found["text"]

    # Odd pieces are code, which has no links. Code in the text of a link is hidden first, so that
    # it does not split the link.
    pieces = _CODE.split(_hidden_labels(markdown))
    pieces[::2] = [_LINK.sub(link, piece) for piece in pieces[::2]]
    return _with_bars("".join(pieces).replace(_TICK, "`"))


def _with_bars(markdown: str) -> str:
    """Return the text without escapes of bars in code in tables, as mkdocs requires."""
    return re.sub(
        r"^\|.*$",
        lambda row: re.sub(r"`[^`]+`", lambda code: code[0].replace("\\|", "|"), row[0]),
        markdown,
        flags=re.MULTILINE,
    )


_TICK = "\N{SYMBOL FOR NULL}"


def _hidden_labels(markdown: str) -> str:
    """Return the text with the backticks of `[`code`](link)` replaced by placeholders."""
    return re.sub(
        r"\[[^\[\]\n]*`[^\[\]\n]*\]\(", lambda found: found[0].replace("`", _TICK), markdown
    )
