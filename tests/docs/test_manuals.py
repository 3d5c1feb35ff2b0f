"""Manuals and completions: of every command, made by click alone, well-formed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.documents.commands import Command, commands
from scripts.documents.manuals import escaped, manual
from scripts.documents.shared import COMPLETIONS, write
from tests.cli.running import succeed
from tests.peers import require

COMMANDS = list(commands())
_MACROS = {".TH", ".SH", ".PP", ".TP", ".nf", ".fi"}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.page)
def test_a_page_tells_of_every_option(command: Command) -> None:
    page = manual(command)
    rows = command.options + command.registry_options + command.common_options
    assert rows
    for name, _ in rows + command.subcommands:
        assert f"\\fB{escaped(name)}\\fP\n" in page
    used = set(re.findall(r"^(\.\S*)", page, re.MULTILINE))
    assert used <= _MACROS, "a line that is no macro"
    assert not re.search(r"^'", page, re.MULTILINE)


def test_all_commands_are_there() -> None:
    names = {command.name for command in COMMANDS}
    assert {"modelpack", "modelpack pull", "modelpack index create"} <= names
    for command in COMMANDS:
        assert command.summary, f"{command.name} does not say what it does"
        below = {f"{command.name} {name}" for name, _ in command.subcommands}
        assert below <= names


def test_text_that_roff_would_take_for_a_request() -> None:
    assert escaped(".gguf\n'a'\n\\b -x") == "\\&.gguf\n\\&'a'\n\\eb \\-x"


@pytest.mark.peer("groff")
def test_a_formatter_has_nothing_to_object_to() -> None:
    groff = require("groff")
    for command in COMMANDS:
        done = subprocess.run(
            [groff, "-man", "-Tutf8", "-Kutf8", "-ww"],
            input=manual(command).encode(),
            capture_output=True,
            check=True,
        )
        assert done.stderr == b"", command.name


def test_completions_are_those_that_the_command_prints(tmp_path: Path) -> None:
    write(tmp_path / "share")
    for shell, place in COMPLETIONS.items():
        made = (tmp_path / "share" / place).read_text()
        assert made.rstrip("\n") == succeed("completion", shell).out


def test_building_a_wheel_needs_click_only(tmp_path: Path) -> None:
    """As hatch runs it: no package is there but click."""
    import click

    (tmp_path / "click").symlink_to(Path(click.__file__).parent)
    root = Path(__file__).parents[2]
    code = (
        f"import sys; sys.path[:0] = [{str(root)!r}, {str(tmp_path)!r}];"
        "from pathlib import Path; from scripts.documents.shared import write;"
        f"write(Path({str(tmp_path / 'share')!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "share" / "man" / "man1" / "modelpack-pull.1").exists()
