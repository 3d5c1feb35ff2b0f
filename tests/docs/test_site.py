"""The site builds strictly and whole; links lead somewhere, nothing comes from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

from modelpack.cli.main import COMMANDS
from scripts.documents.links import relinked
from tests.docs.blocks import ROOT

pytestmark = pytest.mark.long

_LINK = re.compile(r'(?:href|src)="?([^"\s>]+)')
_LOADED = re.compile(r'<(?:script|img|iframe)[^>]* src="?https?:|<link[^>]*stylesheet[^>]*https?:')


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", target],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return target


def test_all_pages_are_there(site: Path) -> None:
    for page in (ROOT / "docs").rglob("*.md"):
        made = site / page.relative_to(ROOT / "docs").with_suffix(".html")
        assert made.exists(), page
    for page in ("index", "spec/manifest", "reference/errors", "reference/python", "CHANGELOG"):
        assert (site / f"{page}.html").exists(), page


def test_links_lead_to_files_of_the_site(site: Path) -> None:
    followed = 0
    for page in site.rglob("*.html"):
        text = page.read_text()
        assert not _LOADED.search(text), f"{page.name} loads something from elsewhere"
        if page.name == "404.html":  # its links are absolute: it is shown at any address
            continue
        for link in _LINK.findall(text):
            path = unquote(urldefrag(link).url)
            if path and not re.match(r"[a-z]+:", path):
                assert (page.parent / path).exists(), f"{page.relative_to(site)}: {link}"
                followed += 1
    assert followed > 1000


def test_the_references_are_of_the_code(site: Path) -> None:
    commands = (site / "reference" / "commands.html").read_text()
    for name in COMMANDS:
        assert f'id="modelpack-{name}"' in commands.replace("id=modelpack", 'id="modelpack'), name
    assert "UntrustedError" in (site / "reference" / "errors.html").read_text()
    assert "modelpack.operations.pull.pull" in (site / "reference" / "python.html").read_text()


PLACES = {"docs/a.md": "a.md", "spec/README.md": "spec/README.md", "README.md": "index.md"}


@pytest.mark.parametrize(
    ("source", "link", "there", "without"),
    [
        ("docs/a.md", "[x](../spec/README.md#y)", "[x](spec/README.md#y)", None),
        ("docs/a.md", "[x](../spec)", "[x](spec/README.md)", None),
        ("docs/a.md", "[`x`](../README.md)", "[`x`](index.md)", None),
        ("README.md", "[x](docs/a.md)", "[x](a.md)", None),
        ("spec/README.md", "[x](../docs/a.md)", "[x](../a.md)", None),
        ("docs/a.md", "[`x`](../tests/y.py)", "[`x`](https://code/tests/y.py)", "`x`"),
        ("docs/a.md", "[x](https://y)", "[x](https://y)", None),
        ("docs/a.md", "[x](#y)", "[x](#y)", None),
        ("docs/a.md", "| `a\\|b` | c\\|d |", "| `a|b` | c\\|d |", None),
        ("docs/a.md", "`[x](../tests)`", "`[x](../tests)`", None),
        ("docs/a.md", "```text\n[x](../tests)\n```", "```text\n[x](../tests)\n```", None),
    ],
)
def test_links_of_the_tree_as_links_of_the_site(
    source: str, link: str, there: str, without: str | None
) -> None:
    assert relinked(link, source, PLACES, "https://code") == there
    assert relinked(link, source, PLACES, "") == (there if without is None else without)
