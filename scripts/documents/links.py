"""Links of a document of the tree, as they are in the site."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping

_LINK = re.compile(r"(?P<image>!?)\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<to>[^()\s]+)\)")
_CODE = re.compile(r"(^(?:```|~~~).*?^(?:```|~~~)$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)


def relinked(markdown: str, source: str, places: Mapping[str, str], code: str) -> str:
    """Return `markdown`, which is at `source` in the tree, with the links that it has in the site.

    `places` has the place in the site of each page, by its path in the tree. Links to anything else
    lead below the address `code`; where there is none, their text stays.
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

    # Text in the odd pieces is code, where nothing is a link. A link's own text may be code, too:
    # such links are put together again first.
    pieces = _CODE.split(_hidden_labels(markdown))
    pieces[::2] = [_LINK.sub(link, piece) for piece in pieces[::2]]
    return _with_bars("".join(pieces).replace(_TICK, "`"))


def _with_bars(markdown: str) -> str:
    """Return the text with the bars in code of tables as mkdocs wants them: not escaped."""
    return re.sub(
        r"^\|.*$",
        lambda row: re.sub(r"`[^`]+`", lambda code: code[0].replace("\\|", "|"), row[0]),
        markdown,
        flags=re.MULTILINE,
    )


_TICK = "\N{SYMBOL FOR NULL}"


def _hidden_labels(markdown: str) -> str:
    """Return the text with the ticks of `[`code`](link)` put aside, as they begin no code here."""
    return re.sub(
        r"\[[^\[\]\n]*`[^\[\]\n]*\]\(", lambda found: found[0].replace("`", _TICK), markdown
    )
