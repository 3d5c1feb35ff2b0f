"""The blocks of code in a document, and what is said about running them.

An HTML comment on the line before a block, which no reader of the page sees, may say:

    <!-- not run: REASON -->      nobody runs it; a test that does so elsewhere is a good reason
    <!-- server -->               runs on in the background, once it printed where it listens
    <!-- long -->                 needs real weights: run by `make test-long` only
    <!-- fails: 5 -->             ends with this exit code
    <!-- file: trust.toml -->     is this file, which later blocks find where they run
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
#: Languages of blocks that a reader would run.
RUNNABLE = ("sh", "python")
#: What else blocks may be; a block without a language is not allowed.
OTHERS = ("text", "json", "toml", "yaml", "jsonl")

_FENCE = re.compile(r"^ *(`{3,}|~{3,}) *(.*)$")
_COMMENT = re.compile(r"^<!-- (not run|server|long|fails|file)(?:: (.+))? -->$")
_INDENTED = re.compile(r"^(?: {4}|\t)")
_LIST = re.compile(r"^ *(?:[-*]|\d+\.) ")


@dataclass(frozen=True)
class Block:
    """Code of a document; `line` is that of its first line, counted from 1."""

    page: str
    line: int
    language: str
    code: str
    not_run: str | None = None
    server: bool = False
    long: bool = False
    exit_code: int = 0
    file: str | None = None

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[str]:
    """The documents whose blocks are run, by their paths from the root."""
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
    found += sorted((ROOT / "docs").rglob("*.md"))
    return [str(path.relative_to(ROOT)) for path in found]


def read(page: str) -> list[Block]:
    """Return the blocks of a document in their order; raises ValueError for what is none."""
    return parse(page, (ROOT / page).read_text())


def parse(page: str, text: str) -> list[Block]:
    """Return the blocks of `text`; raises ValueError for unclosed ones and comments before none."""
    found: list[Block] = []
    lines = text.splitlines()
    said: dict[str, str] = {}
    at, in_list = 0, False
    while at < len(lines):
        line = lines[at]
        at += 1
        if comment := _COMMENT.match(line):
            said[comment[1]] = comment[2] or ""
            continue
        if fence := _FENCE.match(line):
            end = next((i for i in range(at, len(lines)) if lines[i].strip() == fence[1]), None)
            if end is None:
                raise ValueError(f"{page}:{at}: a block that does not end")
            code = "\n".join(lines[at:end])
            found.append(_block(page, at + 1, fence[2].split(" ")[0], code, said))
            at, said = end + 1, {}
            continue
        if said:
            raise ValueError(f"{page}:{at}: a comment about a block, but no block follows")
        in_list = bool(_LIST.match(line)) or (in_list and (not line or line.startswith(" ")))
        if _INDENTED.match(line) and not in_list and line.strip():
            raise ValueError(f"{page}:{at}: an indented block: fence it, and say its language")
    return found


def _block(page: str, line: int, language: str, code: str, said: dict[str, str]) -> Block:
    if "not run" in said and not said["not run"]:
        raise ValueError(f"{page}:{line}: a block that is not run needs a reason")
    return Block(
        page,
        line,
        language,
        code,
        not_run=said.get("not run"),
        server="server" in said,
        long="long" in said,
        exit_code=int(said.get("fails", 0)),
        file=said.get("file"),
    )
