"""The files of the wheel for share/ of a system: manual pages and shell completions."""

from __future__ import annotations

from pathlib import Path

from modelpack.cli.completion import completion_script
from scripts.documents.commands import commands
from scripts.documents.manuals import manual

#: The path of the completion script for each shell.
COMPLETIONS = {
    "bash": "bash-completion/completions/modelpack",
    "zsh": "zsh/site-functions/_modelpack",
    "fish": "fish/vendor_completions.d/modelpack.fish",
}


def write(share: Path) -> None:
    """Write all files to the directory `share`."""
    pages = share / "man" / "man1"
    pages.mkdir(parents=True)
    for command in commands():
        (pages / f"{command.page}.1").write_text(manual(command))
    for shell, place in COMPLETIONS.items():
        path = share / place
        path.parent.mkdir(parents=True)
        path.write_text(f"{completion_script(shell)}\n")
