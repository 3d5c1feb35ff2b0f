"""The hooks of mkdocs: add pages from outside docs/, and rewrite the links of all pages.

Documents have links that work in the repository. The hooks rewrite links to documents into links to
pages of the site, and links to other files (code, tests) into URLs below `extra.code` of
mkdocs.yml.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT)]

from scripts.documents import references  # noqa: E402
from scripts.documents.links import relinked  # noqa: E402

#: Documents outside docs/ -> their paths in the site.
_MORE = {
    "README.md": "index.md",
    **{name: name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")},
}
_FOLDERS = ("spec", "benchmarks/results")
_MADE = {
    "reference/commands.md": references.all_commands,
    "reference/errors.md": references.errors,
    "reference/python.md": references.python,
}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the measurements to the navigation, named by the first words of their titles."""
    pages = sorted((ROOT / "benchmarks" / "results").glob("*.md"))
    titles = {path: path.read_text().split("\n", 1)[0].removeprefix("# ") for path in pages}
    assert config.nav is not None
    config.nav.append({
        "Measurements": [
            {re.split(r"[,:] ", title)[0]: path.relative_to(ROOT).as_posix()}
            for path, title in titles.items()
        ]
    })  # fmt: skip
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the documents outside docs/, and the generated references."""
    more = dict(_MORE)
    for folder in _FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".md", ".json") and path.is_file():
                place = path.relative_to(ROOT).as_posix()
                more[place] = place
    for source, place in more.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
    for place, make in _MADE.items():
        files.append(File.generated(config, place, content=make()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite the links of a page for the site."""
    place = page.file.src_uri
    if place in _MADE:
        return markdown
    sources = {site: source for source, site in _MORE.items()}
    places = {
        sources.get(file.src_uri, _in_tree(file)): file.src_uri
        for file in files
        if not file.inclusion.is_excluded()
    }
    return relinked(markdown, sources.get(place, _in_tree(page.file)), places, config.extra["code"])


def _in_tree(file: File) -> str:
    """Return the path of a page in the repository; mkdocs removes the prefix docs/."""
    elsewhere = (*_MORE, *(f"{folder}/" for folder in _FOLDERS))
    return file.src_uri if file.src_uri.startswith(elsewhere) else f"docs/{file.src_uri}"
