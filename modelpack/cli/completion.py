"""`modelpack completion`: the scripts that complete commands, options and stored models."""

from __future__ import annotations

from typing import Final

import click

from modelpack.cli.help import command
from modelpack.cli.options import Settings, common_options_without

_SETUP: Final = {
    "bash": 'eval "$(modelpack completion bash)"   # in ~/.bashrc',
    "zsh": 'eval "$(modelpack completion zsh)"    # in ~/.zshrc',
    "fish": "modelpack completion fish | source    # in ~/.config/fish/config.fish",
}
# Bash splits words at the characters of COMP_WORDBREAKS, so at the colon of a tag, and replaces
# only the last part. The script joins the parts for click, and removes them from its completions.
_BASH: Final = r"""_modelpack_completion() {
    local IFS=$'\n' words=() word='' joined='' known='' type value
    for word in "${COMP_WORDS[@]:0:COMP_CWORD+1}"; do
        if [[ ${#words[@]} -gt 0 && ( $joined || $word == :* ) ]]; then
            words[-1]+=$word
        else
            words+=("$word")
        fi
        [[ $word == : ]] && joined=1 || joined=''
    done
    word=${words[-1]}
    [[ ${COMP_WORDBREAKS-} == *:* ]] && known=${word%"${word##*:}"}
    while IFS=, read -r type value; do
        case $type in
            dir) compopt -o dirnames ;;
            file) compopt -o default ;;
            plain) COMPREPLY+=("${value#"$known"}") ;;
        esac
    done < <(COMP_WORDS="${words[*]}" COMP_CWORD=$((${#words[@]} - 1)) \
        _MODELPACK_COMPLETE=bash_complete "$1")
}
complete -o nosort -F _modelpack_completion modelpack"""


def completion_script(shell: str) -> str:
    """Return the completion script for bash, zsh or fish."""
    from click.shell_completion import get_completion_class

    from modelpack.cli.main import cli

    if shell == "bash":
        return _BASH
    completion_class = get_completion_class(shell)
    assert completion_class is not None
    return completion_class(cli, {}, "modelpack", "_MODELPACK_COMPLETE").source()


@command(epilog="\b\n" + "\n".join(_SETUP.values()))
@click.argument("shell", type=click.Choice(sorted(_SETUP)))
@common_options_without("store", "json", "quiet", "progress")
def completion(settings: Settings, shell: str) -> None:
    """Print the completion script of SHELL for commands, options and stored models."""
    click.echo(completion_script(shell))
