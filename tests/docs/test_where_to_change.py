"""docs/where-to-change.md names files that exist and names that stand in them."""

from __future__ import annotations

import re

from tests.docs.blocks import ROOT

_ROW = re.compile(r"^\| .+?\]\(\.\./([\w/]+\.py)\).*\| `(\w+)` \|$", re.MULTILINE)


def test_each_file_has_the_name_of_its_row() -> None:
    rows = _ROW.findall((ROOT / "docs" / "where-to-change.md").read_text())
    assert len(rows) >= 20
    missing = [
        f"{name} in {path}"
        for path, name in rows
        if not re.search(rf"\b{name}\b", (ROOT / path).read_text())
    ]
    assert missing == []
