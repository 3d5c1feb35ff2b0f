"""`modelpack completion`: print the shell code that completes commands."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from modelpack.cli.options import Settings, common_options

_HELP = {
    "bash": 'eval "$(modelpack completion bash)"   # in ~/.bashrc',
    "zsh": 'eval "$(modelpack completion zsh)"    # in ~/.zshrc',
    "fish": "modelpack completion fish | source    # in ~/.config/fish/config.fish",
}


@click.command(epilog="\b\n" + "\n".join(_HELP.values()))
@click.argument("shell", type=click.Choice(sorted(_HELP)))
@common_options
def completion(settings: Settings, shell: str) -> None:
    """Print the completion script of SHELL for commands, options and stored models."""
    from modelpack.cli.main import cli

    completion_class = get_completion_class(shell)
    assert completion_class is not None
    source = completion_class(cli, {}, "modelpack", "_MODELPACK_COMPLETE").source()
    click.echo(source)
