"""What a system keeps of a program in share/: pages of the manual, and completions for shells."""

from __future__ import annotations

from pathlib import Path

from click.shell_completion import get_completion_class

from modelpack.cli.main import cli
from scripts.documents.commands import commands
from scripts.documents.manuals import manual

#: Where each shell looks for the completions of a program.
COMPLETIONS = {
    "bash": "bash-completion/completions/modelpack",
    "zsh": "zsh/site-functions/_modelpack",
    "fish": "fish/vendor_completions.d/modelpack.fish",
}


def write(share: Path) -> None:
    """Write all of it below `share`."""
    pages = share / "man" / "man1"
    pages.mkdir(parents=True)
    for command in commands():
        (pages / f"{command.page}.1").write_text(manual(command))
    for shell, place in COMPLETIONS.items():
        path = share / place
        path.parent.mkdir(parents=True)
        path.write_text(completion(shell))


def completion(shell: str) -> str:
    """Return what `modelpack completion` prints: the code that completes our commands."""
    found = get_completion_class(shell)
    assert found is not None
    made = found(cli, {}, "modelpack", "_MODELPACK_COMPLETE")
    # `source()` would also run bash, to warn of old ones.
    return f"{made.source_template % made.source_vars()}\n"
