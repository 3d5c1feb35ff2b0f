"""Every relative link of the documents leads to a file, and to a heading of it."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest

from tests.docs.blocks import ROOT

_LINK = re.compile(r"!?\[[^\]]*\]\(([^()\s]+(?:\([^()\s]*\))?)\)")
_ELSEWHERE = re.compile(r"[a-z]+:")
_CODE = re.compile(r"^(```|~~~).*?^\1$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^#{1,6} +(.+?)#*$", re.MULTILINE)

FOLDERS = ("docs", "spec", "benchmarks", "examples", "fixtures", "tests")
DOCUMENTS = sorted(ROOT.glob("*.md")) + [
    path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.md"))
]


@cache
def anchors(path: Path) -> frozenset[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: dict[str, int] = {}
    made = set()
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    for heading in _HEADING.findall(text):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip()
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        number = found.get(slug, 0)
        found[slug] = number + 1
        made.add(f"{slug}-{number}" if number else slug)
    return frozenset(made)


def links(path: Path) -> list[str]:
    text = _CODE.sub("", path.read_text())
    return [link for link in _LINK.findall(text) if not _ELSEWHERE.match(link)]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for link in links(document):
        path, _, anchor = unquote(link).partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.is_relative_to(ROOT), f"{link} leads out of the tree"
        assert target.exists(), f"there is no {link}"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{link}: no such heading"


def test_links_are_found() -> None:
    assert len(links(ROOT / "docs" / "serving.md")) > 10
